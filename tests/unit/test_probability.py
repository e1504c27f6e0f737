"""What logits mean, for classes that exclude each other and for those that do not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from client.losses import segmentation_loss, soft_dice_loss, softened_logit_loss
from common.probability import background, logits_of, masks_of, probabilities

SHAPES = st.sampled_from([(1, 4, 4), (3, 2, 5), (2, 1, 3, 3), (2, 4, 3, 2)])


def logits_like(shape: tuple[int, ...], seed: int, spread: float = 4.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


@given(st.integers(0, 200), st.floats(0.0, 1.0))
def test_with_one_class_exclusive_changes_no_bit(seed: int, threshold: float) -> None:
    logits, other = logits_like((2, 1, 4, 4), seed), logits_like((2, 1, 4, 4), seed + 1)
    target = (other > 0).float()
    one, two = (probabilities(logits, exclusive) for exclusive in (False, True))
    assert torch.equal(one, two)
    assert torch.equal(one, logits.sigmoid())
    for function in (masks_of, logits_of):
        assert torch.equal(function(one, False), function(one, True))
    assert torch.equal(masks_of(one, False, threshold), masks_of(one, True, threshold))
    assert torch.equal(segmentation_loss(logits, target, False), segmentation_loss(logits, target, True))
    losses = [softened_logit_loss(logits, other, 2.0, exclusive) for exclusive in (False, True)]
    assert torch.equal(*losses)


@given(SHAPES, st.integers(0, 200))
def test_exclusive_probabilities_leave_the_rest_to_the_background(shape: tuple[int, ...], seed: int) -> None:
    logits = logits_like(shape, seed)
    found = probabilities(logits, True)
    assert found.shape == logits.shape
    weight = logits.double().exp()
    assert torch.allclose(found.double(), weight / (1 + weight.sum(-3, keepdim=True)), atol=1e-6)
    assert torch.allclose(background(found).double(), 1 / (1 + weight.sum(-3, keepdim=True)), atol=1e-6)


@given(SHAPES, st.integers(0, 200), st.booleans())
def test_logits_of_inverts_probabilities(shape: tuple[int, ...], seed: int, exclusive: bool) -> None:
    logits = logits_like(shape, seed, spread=1.5)
    assert torch.allclose(logits_of(probabilities(logits, exclusive), exclusive), logits, atol=2e-2)


def test_certain_probabilities_have_finite_logits() -> None:
    sure = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    for exclusive in (False, True):
        logits = logits_of(sure, exclusive)
        assert torch.isfinite(logits).all()
        assert torch.allclose(probabilities(logits, exclusive), sure, atol=1e-3)


@given(SHAPES, st.integers(0, 200))
def test_exclusive_masks_are_the_largest_of_background_and_classes(shape: tuple[int, ...], seed: int) -> None:
    logits = logits_like(shape, seed)
    masks = masks_of(probabilities(logits, True), True)
    winner = torch.cat([torch.zeros_like(logits.narrow(-3, 0, 1)), logits], -3).argmax(-3)
    for index in range(shape[-3]):
        assert torch.equal(masks.select(-3, index), winner == index + 1)


@given(SHAPES, st.integers(0, 200), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_exclusive_masks_never_overlap_and_shrink_with_the_threshold(
    shape: tuple[int, ...], seed: int, one: float, two: float
) -> None:
    found = probabilities(logits_like(shape, seed), True)
    small, large = (masks_of(found, True, threshold) for threshold in (max(one, two), min(one, two)))
    assert (large.sum(-3) <= 1).all()
    assert (large | ~small).all()
    assert (masks_of(found, True, 0.0).sum(-3) == 1).all()


def test_independent_masks_may_overlap() -> None:
    found = torch.tensor([0.7, 0.5, 0.4])[:, None, None]
    assert masks_of(found, False).flatten().tolist() == [True, True, False]


# -- losses ------------------------------------------------------------------------------------------


def test_the_exclusive_loss_by_hand() -> None:
    """One pixel a row: cross-entropy over background and classes, plus Dice of the softmax."""
    logits = logits_like((2, 3, 1, 4), 0)
    labels = torch.tensor([[0, 1, 2, 3], [3, 0, 0, 2]])[:, None]  # 0: background
    target = F.one_hot(labels, 4).permute(0, 3, 1, 2)[:, 1:].float()
    weight = torch.cat([torch.ones(2, 1, 1, 4), logits.exp()], 1)
    shares = weight / weight.sum(1, keepdim=True)
    cross = -shares.gather(1, labels[:, None]).log().mean()
    expected = cross + soft_dice_loss(shares[:, 1:], target)
    assert segmentation_loss(logits, target, True) == pytest.approx(float(expected), abs=1e-5)
    assert segmentation_loss(logits, target, False) != pytest.approx(float(expected), abs=1e-2)


@given(st.floats(0.5, 8.0), st.integers(0, 100))
def test_the_exclusive_softened_loss_is_the_divergence_of_two_softmaxes(
    temperature: float, seed: int
) -> None:
    student, teacher = logits_like((1, 3, 2, 2), seed), logits_like((1, 3, 2, 2), seed + 1)
    assert softened_logit_loss(teacher, teacher, temperature, True) == pytest.approx(0, abs=1e-5)
    ours, theirs = (
        torch.cat([torch.zeros(1, 1, 2, 2), logits], 1).double() / temperature
        for logits in (student, teacher)
    )
    wanted = theirs.softmax(1)
    divergence = (wanted * (wanted.log() - ours.softmax(1).log())).sum(1).mean() * temperature**2
    found = softened_logit_loss(student, teacher, temperature, True)
    assert found == pytest.approx(float(divergence), rel=1e-3, abs=1e-5)
    assert found > 0
