"""The terms of distillation against plain loops, and that what is switched off changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import client.distillation as distillation
from client.deadline import Deadline
from client.distillation import Symmetry, distil
from client.losses import (
    boundary_loss,
    certainty_weights,
    feature_loss,
    segmentation_loss,
    signed_distances,
    soft_dice_loss,
    softened_logit_loss,
)
from client.patients import Patient
from client.sampling import PatchSampler
from client.students import Student, build_student
from client.transfer.labelling import gather, teacher_outputs
from client.transfer.sets import TransferSet, real_crops
from client.variants import VARIANTS
from common.config import load_recipe
from common.errors import ConfigError
from common.plan import RunPlan
from common.probability import probabilities
from common.recipe import Distillation, SyntheticLabels
from common.teacher import initial_adapter, resident_teacher

FOREVER = Deadline(1e9)


@pytest.fixture
def transfer(smoke_plan: RunPlan, patients: list[Patient]) -> TransferSet:
    teacher = resident_teacher(smoke_plan.teacher, smoke_plan.data)
    with teacher.visit(initial_adapter(smoke_plan.teacher, smoke_plan.data, 0)) as network:
        found = gather(real_crops(patients, smoke_plan, 0), None)
        assert found is not None
        said = vars(teacher_outputs(network, found.images, False))
    return replace(found, **said, synthetic=torch.arange(len(found)) % 3 == 0)


def with_student(plan: RunPlan, **changes: object) -> RunPlan:
    return replace(plan, student=replace(plan.student, **changes))  # type: ignore[arg-type]


def trained(
    plan: RunPlan, patients: list[Patient], transfer: TransferSet | None
) -> tuple[Student, list[float]]:
    student = build_student("unet-xs", plan.data, True, 0)
    return student, distil(student, patients, transfer, plan, 5, FOREVER)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


# -- the terms ---------------------------------------------------------------------------------------


def nearest(plane: np.ndarray, row: int, column: int) -> float:  # type: ignore[type-arg]
    """Distance of a pixel to the nearest one of the other kind, by looking at all of them."""
    others = np.argwhere(plane != plane[row, column])
    return float(np.sqrt(((others - [row, column]) ** 2).sum(1)).min())


def test_signed_distances_are_those_of_a_plain_loop() -> None:
    rng = np.random.default_rng(3)
    masks = torch.from_numpy(rng.random((3, 2, 9, 9)) < 0.3)
    found = signed_distances(masks)
    assert found.dtype == torch.float32
    for image in range(3):
        for number in range(2):
            plane = masks[image, number].numpy()
            for row in range(9):
                for column in range(9):
                    far = nearest(plane, row, column)
                    wanted = -(far - 1) if plane[row, column] else far
                    assert found[image, number, row, column] == pytest.approx(wanted / 9, abs=1e-6)


@pytest.mark.parametrize("value", [False, True])
def test_a_class_without_a_boundary_has_no_distances(value: bool) -> None:
    assert not signed_distances(torch.full((1, 1, 8, 8), value)).any()


def test_the_boundary_term_is_a_plain_sum_and_prefers_what_lies_inside() -> None:
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 2:6, 2:6] = True
    distances, probability = signed_distances(mask), torch.rand(1, 1, 8, 8)
    wanted = sum(
        float(probability[0, 0, row, column]) * float(distances[0, 0, row, column])
        for row in range(8)
        for column in range(8)
    )
    assert boundary_loss(probability, distances) == pytest.approx(wanted / 64, abs=1e-6)
    near, far = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    near[..., 1, 3] = far[..., 7, 7] = 1
    exact = boundary_loss(mask.float(), distances)
    assert exact < 0 < boundary_loss(near, distances) < boundary_loss(far, distances)


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_certain_pixel_counts_more_and_all_together_as_before(exclusive: bool) -> None:
    shares = torch.tensor([[0.5, 0.98, 0.02, 0.8], [0.4, 0.01, 0.02, 0.1]]).view(1, 2, 2, 2)
    weights = certainty_weights(shares, exclusive, 1.0)
    assert weights.mean() == pytest.approx(1, abs=1e-6)
    plain = []
    for pixel in shares.flatten(2)[0].T.tolist():
        sets = [[*pixel, max(1 - sum(pixel), 0)]] if exclusive else [[p, 1 - p] for p in pixel]
        most = math.log(3 if exclusive else 2)
        plain.append([1 - sum(-p * math.log(p) for p in found if p > 0) / most for found in sets])
    wanted = torch.tensor(plain).T.reshape(1, -1, 2, 2)
    assert torch.allclose(weights, wanted / wanted.mean(), atol=1e-5)
    assert torch.equal(certainty_weights(shares, exclusive, 0.0), torch.ones_like(weights))


@pytest.mark.parametrize("exclusive", [False, True])
def test_weights_of_the_softened_loss_weigh_pixel_by_pixel(exclusive: bool) -> None:
    student, teacher = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)
    alike = torch.ones(2, 1 if exclusive else 2, 4, 4)
    plain = softened_logit_loss(student, teacher, 2.0, exclusive)
    assert softened_logit_loss(student, teacher, 2.0, exclusive, alike) == pytest.approx(
        float(plain), rel=1e-5
    )
    one = torch.zeros_like(alike)
    one[0, :, 1, 2] = 1
    pixel = (slice(0, 1), slice(None), slice(1, 2), slice(2, 3))
    alone = softened_logit_loss(student[pixel], teacher[pixel], 2.0, exclusive)
    weighted = softened_logit_loss(student, teacher, 2.0, exclusive, one)
    assert weighted * 32 == pytest.approx(float(alone), rel=1e-4)


def test_the_feature_loss_is_one_less_the_cosine() -> None:
    student, teacher = torch.randn(2, 5, 3, 4, requires_grad=True), torch.randn(2, 5, 3, 4)
    wanted = (1 - F.cosine_similarity(student, teacher, dim=1)).mean()
    (gradient,) = torch.autograd.grad(wanted, student)
    found = feature_loss(student, teacher)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), abs=1e-6)
    assert torch.allclose(torch.autograd.grad(found, student)[0], gradient, atol=1e-7)
    nowhere = torch.zeros(1, 5, 2, 2, requires_grad=True)
    feature_loss(nowhere, teacher[:1, :, :2, :2]).backward()
    assert nowhere.grad is not None
    assert bool(nowhere.grad.isfinite().all())


def test_a_stride_compares_features_on_a_grid_that_moves_and_covers_everything(
    smoke_plan: RunPlan, patients: list[Patient], transfer: TransferSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, grids = [], []
    assert transfer.features is not None
    side = transfer.features.shape[-1]
    places = torch.arange(side * side).view(1, 1, side, side).expand_as(transfer.features)

    def seen(student: Tensor, teacher: Tensor) -> Tensor:
        sizes.append(tuple(student.shape[-2:]))
        grids.append(frozenset(teacher[0, 0].flatten().long().tolist()))
        return feature_loss(student, teacher)

    monkeypatch.setattr(distillation, "feature_loss", seen)
    plan = with_student(smoke_plan, steps=12, feature_stride=2)
    trained(plan, patients, replace(transfer, features=places.float()))
    late = grids[1::2]
    assert set(sizes[1::2]) == {(side // 2, side // 2)}
    assert len(set(late)) > 1
    assert frozenset.union(*late) == frozenset(range(side * side))


def test_a_symmetry_sees_the_same_grid_whether_it_reads_all_or_every_so_many_th_position() -> None:
    stored = torch.arange(2 * 7 * 7.0).view(1, 2, 7, 7)
    for flips, turn, stride in product([(), (2,), (3,), (2, 3)], [False, True], [1, 2, 3]):
        view = Symmetry(flips, turn)
        for row, column in product(range(stride), repeat=2):
            rows, columns = view.every(stride, row, column, 7)
            wanted = view(stored)[..., row::stride, column::stride]
            assert torch.equal(view(stored[..., rows, columns]), wanted)


# -- what is off changes nothing ---------------------------------------------------------------------


def as_it_was(student: Student, patients: list[Patient], transfer: TransferSet, plan: RunPlan) -> None:
    """The distillation that had labels, outputs and features and nothing else, in a plain loop."""
    settings, seed = plan.student, 5
    sampler = PatchSampler(patients, plan.data.image_size, seed, labelled=True)
    rng = np.random.default_rng(seed)
    assert transfer.logits is not None
    assert transfer.tokens is not None
    assert transfer.features is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        deep = nn.Conv2d(student.deep_channels, transfer.tokens.shape[1], 1)
        late = nn.Conv2d(student.late_channels, transfer.features.shape[1], 1)

    def loss_at() -> Tensor:
        batch = sampler.batch(settings.batch_size)
        loss = settings.supervised_weight * segmentation_loss(student(batch.images), batch.masks, False)
        painted = round(settings.transfer_batch_size * settings.synthetic_share)
        kinds = np.flatnonzero(transfer.synthetic), np.flatnonzero(~transfer.synthetic)
        parts = [
            rng.choice(kinds[0], painted), rng.choice(kinds[1], settings.transfer_batch_size - painted),
        ]  # fmt: skip
        chosen = torch.from_numpy(np.concatenate(parts))
        flips = [axis for axis in (2, 3) if rng.random() < 0.5]
        turn = bool(rng.random() < 0.5)

        def view(stored: Tensor) -> Tensor:
            part = stored[chosen].float()
            return (part.transpose(2, 3) if turn else part).flip(flips)

        image = view(transfer.images)
        gamma = torch.from_numpy(np.exp(rng.normal(0, 0.15, (len(image), 1, 1, 1)))).float()
        output, logits = student.outputs(image**gamma), view(transfer.logits)  # type: ignore[arg-type]
        taught = settings.logit_weight * (
            softened_logit_loss(output.logits, logits, settings.temperature, False)
            + soft_dice_loss(probabilities(output.logits, False), logits.sigmoid())
        )
        tokens = view(transfer.tokens)  # type: ignore[arg-type]
        both = feature_loss(deep(output.deep), tokens)
        both = both + feature_loss(late(output.late), view(transfer.features))  # type: ignore[arg-type]
        return loss + (taught + settings.feature_weight * both)

    student.train()
    schedule = distillation.Schedule(settings.learning_rate, settings.steps, warm_up=10)
    parameters = [*student.parameters(), *deep.parameters(), *late.parameters()]
    distillation.fit(parameters, schedule, loss_at, FOREVER, "testing")


def test_without_further_terms_a_student_is_trained_as_in_a_plain_loop_to_the_last_bit(
    smoke_plan: RunPlan, patients: list[Patient], transfer: TransferSet
) -> None:
    plan = with_student(smoke_plan, steps=4, transfer_batch_size=4, feature_stride=1)
    reference = build_student("unet-xs", plan.data, True, 0)
    as_it_was(reference, patients, transfer, plan)
    student, _ = trained(plan, patients, transfer)
    assert same_weights(student, reference)
    assert not same_weights(student, trained(with_student(plan, boundary_weight=1.0), patients, transfer)[0])


TERMS: dict[str, tuple[str, dict[str, object]]] = {
    "softened_logit_loss": ("logit_weight", {}),
    "soft_dice_loss": ("logit_weight", {}),
    "feature_loss": ("feature_weight", {}),
    "boundary_loss": ("boundary_weight", {}),
    "signed_distances": ("boundary_weight", {}),
    "certainty_weights": ("entropy_weight", {}),
}


@pytest.mark.parametrize("name", TERMS)
def test_a_term_is_computed_if_and_only_if_it_has_a_weight(
    name: str,
    smoke_plan: RunPlan,
    patients: list[Patient],
    transfer: TransferSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    original: Callable[..., Tensor] = getattr(distillation, name)

    def counted(*arguments: object) -> Tensor:
        calls.append(name)
        return original(*arguments)

    monkeypatch.setattr(distillation, name, counted)
    key = TERMS[name][0]
    everything = {"logit_weight": 1.0, "feature_weight": 0.1, "boundary_weight": 1.0, "entropy_weight": 0.5}
    without, losses = trained(with_student(smoke_plan, **{**everything, key: 0.0}), patients, transfer)
    assert calls == []
    assert np.isfinite(losses).all()
    student, _ = trained(with_student(smoke_plan, **everything), patients, transfer)
    assert calls
    assert not same_weights(student, without)


def test_a_transfer_set_of_which_nothing_is_learned_is_not_looked_at(
    smoke_plan: RunPlan, patients: list[Patient], transfer: TransferSet
) -> None:
    plan = with_student(smoke_plan, logit_weight=0.0, feature_weight=0.0)
    assert same_weights(trained(plan, patients, transfer)[0], trained(plan, patients, None)[0])


# -- stages ------------------------------------------------------------------------------------------


def test_the_stages_say_which_steps_learn_from_what(
    smoke_plan: RunPlan,
    patients: list[Patient],
    transfer: TransferSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(
        distillation, "segmentation_loss", lambda *a: seen.append("labels") or segmentation_loss(*a)
    )
    monkeypatch.setattr(
        distillation, "softened_logit_loss", lambda *a: seen.append("teacher") or softened_logit_loss(*a)
    )
    plan = with_student(smoke_plan, steps=8, warmup_share=0.25, finetune_share=0.5)
    trained(plan, patients, transfer)
    assert seen == ["teacher"] * 2 + ["labels", "teacher"] * 2 + ["labels"] * 4
    seen.clear()
    trained(plan, patients, None)  # nothing to warm up with
    assert seen == ["labels"] * 8


def test_settings_that_do_not_go_together_are_named_all_at_once() -> None:
    wrong = ["student.warmup_share=0.6", "student.finetune_share=0.5"]
    wrong += ["student.distillation=agnostic", "student.feature_weight=0", "student.entropy_weight=2"]
    with pytest.raises(ConfigError) as caught:
        load_recipe("smoke", wrong)
    for key in ("student.finetune_share", "student.feature_weight", "student.entropy_weight"):
        assert key in str(caught.value)


# -- what is wanted of which image -------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(SyntheticLabels))
def test_labels_stand_in_for_the_teacher_only_where_there_is_one(
    kind: SyntheticLabels, smoke_plan: RunPlan
) -> None:
    masks = torch.zeros(3, 1, 4, 4)
    masks[:, :, :2] = 1
    masks[2] = float("nan")
    synthetic = torch.tensor([True, False, False])
    part = TransferSet(torch.zeros(3, 3, 4, 4), masks, synthetic, torch.full((3, 1, 4, 4), -1.0))
    soft = torch.tensor(-1.0).sigmoid()
    wanted = {
        "soft": soft.expand(2),
        "mask": torch.tensor([1.0, 0]),
        "both": (torch.tensor([1.0, 0]) + soft) / 2,
    }
    for field, row in (("synthetic_labels", 0), ("real_labels", 1)):
        found = distillation._targets(part, with_student(smoke_plan, **{field: kind}))
        assert torch.allclose(found[row, 0, 1:3, 0], wanted[str(kind)])
        others = [index for index in range(3) if index != row]
        assert torch.allclose(found[others], soft.expand(2, 1, 4, 4))


def test_every_mode_names_its_teacher() -> None:
    ours = VARIANTS["student"]
    assert {mode: ours.taught_by(mode) for mode in Distillation} == {
        "task": "federated", "agnostic": "untuned", "ensemble": "ensemble", "none": None,
    }  # fmt: skip
    for name in ("no_federation", "task_agnostic", "local_only"):
        assert {VARIANTS[name].taught_by(mode) for mode in Distillation} == {VARIANTS[name].teacher}
    assert VARIANTS["no_features"] == replace(ours, features=False)
    assert VARIANTS["task_agnostic"] == replace(ours, teacher="untuned")


def test_a_teacher_without_outputs_teaches_by_features_alone(
    smoke_plan: RunPlan, patients: list[Patient], transfer: TransferSet
) -> None:
    untuned = replace(transfer, logits=None)
    inverted = replace(untuned, masks=1 - untuned.masks)
    student, _ = trained(smoke_plan, patients, untuned)
    assert same_weights(student, trained(smoke_plan, patients, inverted)[0]), "a mask was read"
    assert not same_weights(student, trained(smoke_plan, patients, transfer)[0])
    assert not same_weights(student, trained(smoke_plan, patients, None)[0])
