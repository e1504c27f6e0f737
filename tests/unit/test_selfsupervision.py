"""Pre-training on a site's own images: it reads no mask, repeats, and learns what it is asked."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from client.deadline import Deadline
from client.patients import Patient
from client.selfsupervision import pretrain
from client.selfsupervision.contrast import MOMENTUM, TEMPERATURE, MomentumContrast, contrast
from client.selfsupervision.masking import MaskedAutoencoder, MaskedImage, hidden_order
from client.selfsupervision.pretraining import Course
from client.selfsupervision.views import view
from client.students import STUDENTS, UNetXS, ViTTiny
from common.errors import DataError, DeadlinePassed
from common.recipe import Start

FOREVER = Deadline(float("inf"))
LEARNED = (Start.mae, Start.moco)


def course(start: Start, steps: int = 2, seed: int = 0) -> Course:
    return Course(start, steps, 32, seed)


def weights(student: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in student.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def fresh(kind: str = "unet-xs") -> Any:
    torch.manual_seed(0)
    return STUDENTS[kind](1)


@pytest.mark.parametrize("start", LEARNED)
def test_no_mask_is_read(start: Start, patients: list[Patient]) -> None:
    """A mask that cannot be touched does no harm, and other masks make no other weights."""

    class Untouchable:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"a mask was read: {name}")

        def __len__(self) -> int:
            raise AssertionError("a mask was read")

    found = []
    for mask in (patients[0].samples[0].mask, None, Untouchable()):
        hidden = [
            replace(p, samples=tuple(replace(s, mask=mask) for s in p.samples))  # type: ignore[arg-type]
            for p in patients
        ]
        student = fresh()
        pretrain(student, hidden, course(start), FOREVER)
        found.append(weights(student))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


@pytest.mark.parametrize("kind", STUDENTS)
@pytest.mark.parametrize("start", LEARNED)
def test_it_repeats_and_leaves_the_head_alone(start: Start, kind: str, patients: list[Patient]) -> None:
    made = []
    for seed in (0, 0, 1):
        student = fresh(kind)
        before = weights(student)
        torch.manual_seed(np.random.default_rng().integers(1 << 30))  # whatever ran before
        losses = pretrain(student, patients, course(start, 1, seed), FOREVER)
        after = weights(student)
        assert len(losses) == 1
        assert before.keys() == after.keys()
        assert torch.equal(before_head := fresh(kind).head.weight, student.head.weight), before_head
        assert not same(before, after)
        assert not student.training
        assert all(one.requires_grad for one in student.parameters())
        made.append(after)
    assert same(made[0], made[1])
    assert not same(made[0], made[2])


def test_labelled_and_unlabelled_images_count(patients: list[Patient]) -> None:
    """The same images without their labels give the same weights: nobody is left out."""
    bare = [replace(p, samples=tuple(replace(s, mask=None) for s in p.samples)) for p in patients]
    one, other = fresh(), fresh()
    pretrain(one, patients, course(Start.mae), FOREVER)
    pretrain(other, bare, course(Start.mae), FOREVER)
    assert same(weights(one), weights(other))
    third = fresh()
    pretrain(third, patients[:3], course(Start.mae), FOREVER)
    assert not same(weights(one), weights(third))


def test_what_cannot_be_learned_is_refused(patients: list[Patient]) -> None:
    with pytest.raises(DataError, match="no image"):
        pretrain(fresh(), [], course(Start.mae), FOREVER)
    with pytest.raises(ValueError, match="no pre-training"):
        pretrain(fresh(), patients, course(Start.shipped), FOREVER)
    student = fresh()
    own = student.head
    with pytest.raises(DeadlinePassed, match="pre-training the student by mae"):
        pretrain(student, patients, course(Start.mae), Deadline(-1))
    assert student.head is own, "a head that was lent comes back"


@pytest.mark.parametrize(("kind", "start"), [("unet-xs", "mae"), ("vit-tiny", "mae"), ("unet-xs", "moco")])
def test_the_task_is_learned(kind: str, start: str, patients: list[Patient]) -> None:
    """Patients whose images have stripes of their own, and for a contrast a colour too: the loss falls."""
    colours = [(0.9, 0.1, 0.1), (0.1, 0.9, 0.1), (0.1, 0.1, 0.9)]
    colours += [(0.8, 0.8, 0.1), (0.1, 0.8, 0.8), (0.8, 0.1, 0.8)]
    wave = torch.arange(64).expand(3, 64, 64)
    told_apart = []
    for number, (patient, colour) in enumerate(zip(patients, colours, strict=True)):
        look = 0.6 + 0.4 * torch.sin(wave / (1 + number))
        if start == Start.moco:
            look = look * torch.tensor(colour)[:, None, None]
        samples = tuple(replace(sample, image=look.contiguous()) for sample in patient.samples)
        told_apart.append(replace(patient, samples=samples))
    losses = pretrain(fresh(kind), told_apart, course(Start(start), 30), FOREVER)
    assert np.mean(losses[-6:]) < 0.94 * np.mean(losses[:3])


# -- masks of pixels ---------------------------------------------------------------------------------


def test_as_many_patches_are_hidden_in_every_image() -> None:
    order = hidden_order(5, 12, torch.Generator().manual_seed(0))
    assert torch.equal(order.sort(1).values, torch.arange(12).expand(5, 12))
    assert len({tuple(row.tolist()) for row in order}) == 5
    covered = MaskedImage(UNetXS(1), 0)._cover(torch.rand(4, 3, 64, 96))
    assert covered.shape == (4, 1, 64, 96)
    blocks = covered.unfold(2, 16, 16).unfold(3, 16, 16).flatten(4)
    assert (blocks.min(-1).values == blocks.max(-1).values).all(), "whole patches"
    assert (covered.mean((1, 2, 3)) * 24).round().tolist() == [14.0] * 4


def test_a_convolutional_student_sees_nothing_of_a_hidden_patch() -> None:
    """What lies below the grey changes the target, not the answer."""
    pretext = MaskedImage(fresh(), 0)
    shown: list[torch.Tensor] = []
    pretext.student.register_forward_pre_hook(lambda _, given: shown.append(given[0]))
    image = torch.rand(1, 3, 64, 64)
    pretext.loss(image)
    covered = (shown[0] == 0.45).all(1)
    assert 0.5 < covered.float().mean() < 0.7
    assert torch.equal(shown[0][0][:, ~covered[0]], image[0][:, ~covered[0]])


def test_a_told_image_costs_nothing() -> None:
    """Hand-made answer: the normalised image itself has loss 0, and a constant costs its distance."""
    pretext, image = MaskedImage(fresh(), 0), torch.rand(2, 3, 64, 64)
    spread = image.var((2, 3), keepdim=True, unbiased=False).add(1e-3).sqrt()
    wanted = (image - image.mean((2, 3), keepdim=True)) / spread
    for offset in (0.0, 0.5):
        pretext.student.forward = lambda _, offset=offset: wanted + offset  # type: ignore[method-assign]
        assert pretext.loss(image).item() == pytest.approx(offset, abs=1e-5)


def test_mae_encodes_a_quarter_of_the_patches_and_tells_the_rest() -> None:
    student = fresh("vit-tiny")
    pretext = MaskedAutoencoder(student, 0)
    seen: list[int] = []
    student.encoder.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    image = torch.rand(2, 3, 96, 96, requires_grad=True)
    pretext.loss(image).backward()
    assert seen == [9]
    unused = [name for name, one in student.encoder.named_parameters() if one.grad is None]
    assert unused == []
    assert all(one.grad is None for one in student.decoder.parameters())


def test_mae_puts_each_token_back_in_its_place() -> None:
    """With an encoder that answers its input, a scattered token lies where it was taken from."""
    pretext = MaskedAutoencoder(fresh("vit-tiny"), 0)
    seen, encoded = torch.tensor([[4, 1]]), torch.randn(1, 2, 192)
    given: list[torch.Tensor] = []
    pretext.blocks.register_forward_pre_hook(lambda _, tokens: given.append(tokens[0]))
    with torch.no_grad():
        pretext.positions.zero_()
        pretext._told(encoded, seen, torch.Size([2, 3]))
        narrow = pretext.narrow(encoded)
    assert torch.equal(given[0][0, [4, 1]], narrow[0])
    assert torch.equal(given[0][0, [0, 2, 3, 5]], pretext.blank[0].expand(4, -1))


# -- views -------------------------------------------------------------------------------------------


def test_the_contrast_is_that_of_the_paper() -> None:
    """Against a loop, with two crops of one patient that are no opposites."""
    queries, keys = torch.randn(4, 8), torch.randn(4, 8)
    whose = [0, 1, 1, 2]
    alike = torch.tensor([[a == b for b in whose] for a in whose])
    terms = []
    for row in range(4):
        scores = {
            other: torch.cosine_similarity(queries[row], keys[other], 0).item() / TEMPERATURE
            for other in range(4)
            if other == row or whose[other] != whose[row]
        }
        terms.append(-math.log(math.exp(scores[row]) / sum(map(math.exp, scores.values()))))
    assert contrast(queries, keys, alike).item() == pytest.approx(2 * TEMPERATURE * np.mean(terms), rel=1e-5)


def test_the_slow_encoder_follows_and_never_learns() -> None:
    pretext = MomentumContrast(fresh(), 0, steps=10)
    name = "student.body.model.0.conv.unit0.conv.weight"
    slow, quick = (dict(one.named_parameters())[name] for one in (pretext.slow, pretext.quick))
    assert torch.equal(slow, quick)
    loss = pretext.loss(torch.rand(3, 3, 32, 32), [0, 1, 2])
    loss.backward()
    assert all(one.grad is None for one in pretext.slow.parameters())
    with torch.no_grad():
        quick.add_(1)
    before = slow.clone()
    pretext.step = 0
    pretext.follow()
    assert torch.allclose(slow - before, torch.full_like(slow, 1 - MOMENTUM), atol=1e-5)
    pretext.step = 10
    before = slow.clone()
    pretext.follow()
    assert torch.equal(slow, before), "at the end it stands still"


def test_what_lies_behind_the_deep_features_is_not_contrasted() -> None:
    student = fresh()
    pretext = MomentumContrast(student, 0, 5)
    pretext.loss(torch.rand(3, 3, 32, 32), [0, 1, 2]).backward()
    assert student.head.weight.grad is None
    assert any(one.grad is not None for one in student.body.parameters())


def test_views_differ_stay_in_range_and_show_the_same_image() -> None:
    images = torch.rand(6, 3, 48, 48)
    rng = np.random.default_rng(0)
    first, second = view(images, rng), view(images, rng)
    assert first.shape == images.shape
    assert first.min() >= 0
    assert first.max() <= 1
    assert all((a - b).abs().mean() > 0.02 for a, b in zip(first, second, strict=True))
    again = np.random.default_rng(0)
    assert torch.equal(view(images, again), first)
    halves = torch.zeros(40, 3, 48, 48)
    halves[20:] = 0.8  # dark stays dark beside bright: brightness moves by less than that
    seen = view(halves, np.random.default_rng(1)).mean((1, 2, 3))
    assert seen[:20].max() < seen[20:].min()


def test_a_part_of_the_image_is_enlarged() -> None:
    """A ramp keeps its order along one of the axes, and spans less than the whole."""
    from client.selfsupervision.views import _part

    ramp = torch.linspace(0, 1, 64).expand(30, 3, 64, 64)
    spans = [(one.max() - one.min()).item() for one in _part(ramp, np.random.default_rng(0))]
    assert 0.5 < min(spans) < 0.75
    assert max(spans) <= 1
    assert len({round(span, 3) for span in spans}) > 20


def test_a_view_of_a_transformer_is_its_tokens() -> None:
    pretext = MomentumContrast(ViTTiny(1), 0, 5)
    assert pretext.quick(torch.rand(2, 3, 32, 64)).shape == (2, 128)
