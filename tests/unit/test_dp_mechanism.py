"""One noised step: what a patient can move, what is counted, and what stops it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from client.dp.mechanism import ClippedSum, Execution, PrivateGradient
from client.dp.poisson import PoissonSampler
from client.dp.randomness import Randomness, SeededRandomness, SystemRandomness
from client.dp.reference import plain_gradients
from client.dp.tasks import DiffusionTask, draw_crops, segmentation_task
from client.faults import border_answer
from client.patients import Patient
from common.errors import BudgetExceeded, DataError
from common.plan import RunPlan
from common.teacher import resident_teacher
from tests.unit.dp_tasks import TableTask, Terms, every_patient, lora_task, sam, trained_of

CLIP = 0.1
WIDTH = 6


class NoNoise(Randomness):
    """Everybody's coin falls for the patient, and no noise: what is left is the clipped mean."""

    def __init__(self) -> None:
        super().__init__(bytes(32))

    def uniforms(self, count: int):  # type: ignore[no-untyped-def]
        return super().uniforms(count) * 0

    def normals(self, shape):  # type: ignore[no-untyped-def]
        return torch.zeros(*shape, dtype=torch.float64)


class Slope(nn.Module):
    """A linear layer whose output times 1: a patient's gradient is the mean of its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 1, bias=False)

    def forward(self, given: Tensor) -> Tensor:
        return self.layer(given)


class SlopeTask(TableTask):
    def forward(self, *inputs: Tensor) -> Tensor:
        return self.network(inputs[0])[:, 0]


def slope_task(table: Tensor, patients: list[list[int]] | None = None) -> SlopeTask:
    torch.manual_seed(0)
    return SlopeTask(Slope(), table, patients)


def sum_of(task: TableTask, drawn: list[list[int]], reference: bool = False) -> Tensor:
    return ClippedSum(task, trained_of(task), CLIP, Execution(16, reference))(drawn)


# -- the clip ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("length", [0.0, 0.5, 1.0, 1.001, 1e6, 1e25])
def test_one_patient_moves_the_sum_by_at_most_the_clip(length: float, reference: bool) -> None:
    """Ten images, one image, and every length that float32 can hold: its square it cannot."""
    draw = torch.Generator().manual_seed(0)
    rows = nn.functional.normalize(torch.randn(15, WIDTH, generator=draw)) * length * CLIP
    rows[5:] = rows[5]  # of the ten images of patient 5
    patients = [[0], [1], [2], [3], [4], list(range(5, 15))]
    task = slope_task(rows, patients)
    everyone = sum_of(task, patients, reference)
    for place, own in enumerate(patients):
        others = patients[:place] + patients[place + 1 :]
        moved = (everyone - sum_of(task, others, reference)).double().norm()
        alone = sum_of(task, [own], reference).double().norm()
        assert float(alone) <= CLIP * (1 + 1e-5)
        assert float(alone) == pytest.approx(CLIP * min(length, 1.0), rel=1e-5)
        assert float(moved) <= CLIP * (1 + 1e-5)


def test_a_gradient_is_clipped_as_a_whole_over_all_tensors() -> None:
    task = lora_task(sam(3), 1)
    trained, batch = trained_of(task), every_patient()
    each = plain_gradients(task, trained, task.inputs(batch.rows), batch)[: batch.patients]
    clip = float(each.norm(dim=1).median())
    factors = (clip / each.norm(dim=1)).clamp(max=1)
    assert {True, False} == set((factors < 1).tolist())
    found = ClippedSum(task, trained, clip, Execution(4))(task.patients)
    torch.testing.assert_close(found, (factors[:, None] * each).sum(0), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_patient_without_a_finite_gradient_stops_the_round(value: float, reference: bool) -> None:
    table = torch.ones(4, WIDTH)
    table[2, 3] = value
    task = slope_task(table)
    mechanism = PrivateGradient(task, trained_of(task), Terms(), NoNoise(), Execution(8, reference))
    with pytest.raises(DataError) as stop:
        mechanism.step(0)
    assert border_answer(stop.value) == ("REFUSED_LOCAL", "")
    assert str(value) not in str(stop.value)
    with pytest.raises(DataError, match="takes no further step"):
        mechanism.step(1)
    assert mechanism.steps_taken == 1  # it began, so it is spent


# -- a step ------------------------------------------------------------------------------------------


def test_a_step_is_clipped_sum_plus_noise_over_the_expected_batch() -> None:
    """With a seed the same coins and noise can be drawn beside it."""
    task = lora_task(sam(3), 1)
    terms = Terms(sample_rate=0.6, noise_std=0.3, expected_batch=7.5)
    mechanism = PrivateGradient(task, trained_of(task), terms, SeededRandomness(4))
    found = mechanism.step(0)
    beside = SeededRandomness(4)
    drawn = PoissonSampler(task.patients, terms.sample_rate, 3).draw(beside)
    assert 0 < len(drawn) < len(task.patients)
    clipped = ClippedSum(task, trained_of(task), terms.max_grad_norm, Execution())
    wanted = (clipped(drawn) + beside.normals((clipped.layout.width,)) * 0.3) / 7.5
    for name, part in clipped.layout.split(wanted).items():
        torch.testing.assert_close(found[name].double(), part, rtol=1e-5, atol=1e-8)
        assert found[name].shape == trained_of(task)[name].shape
    assert found.keys() == trained_of(task).keys()


def test_the_divisor_is_the_expected_batch_whoever_came() -> None:
    rows = nn.functional.normalize(torch.ones(4, WIDTH)) * CLIP
    for patients in (1, 4):
        task = slope_task(rows[:patients])
        found = PrivateGradient(task, trained_of(task), Terms(expected_batch=8.0), NoNoise()).step(0)
        assert float(found["network.layer.weight"].norm()) == pytest.approx(CLIP * patients / 8, rel=1e-5)


def test_at_most_k_images_of_a_patient_each_as_likely() -> None:
    sampler = PoissonSampler([list(range(10)), [10, 11]], 1.0, 3)
    source = SeededRandomness(0)
    draws = [sampler.draw(source) for _ in range(2000)]
    assert all(len(set(one)) == 3 and set(one) <= set(range(10)) for one, _ in draws)
    assert all(sorted(other) == [10, 11] for _, other in draws)
    counts = torch.bincount(torch.tensor([row for one, _ in draws for row in one]), minlength=10)
    spread = (counts - 600).square().sum() / (2000 * 0.3 * 0.7) * 9 / 10
    assert float(spread) < 27.9  # chi-squared of 9 degrees, p = .001


@pytest.mark.parametrize("rate", [0.0, 1e-9])
def test_an_empty_draw_is_noised_and_counted(rate: float) -> None:
    task = lora_task(sam(3), 1)
    terms = Terms(sample_rate=rate, noise_std=2.0, expected_batch=4.0)
    mechanism = PrivateGradient(task, trained_of(task), terms, SeededRandomness(1))
    found = torch.cat([part.flatten() for part in mechanism.step(0).values()])
    assert mechanism.steps_taken == 1
    assert float(found.std()) == pytest.approx(0.5, rel=4 / math.sqrt(2 * len(found)))


def test_zero_gradients_and_no_noise_make_a_zero_update() -> None:
    """Nothing is divided by a norm or by a number of patients that may be zero."""
    task = slope_task(torch.zeros(4, WIDTH))
    found = PrivateGradient(task, trained_of(task), Terms(), NoNoise()).step(0)
    assert not any(part.any() for part in found.values())


def test_steps_are_taken_once_in_order_and_none_beyond_the_plan() -> None:
    task = slope_task(torch.ones(4, WIDTH))
    terms = Terms(noise_std=1.0, steps=5)
    mechanism = PrivateGradient(task, trained_of(task), terms, SeededRandomness(0), first_step=3)
    for index in (0, 2, 4, 5):
        with pytest.raises(BudgetExceeded, match="3 of 5"):
            mechanism.step(index)
    mechanism.step(3)
    with pytest.raises(BudgetExceeded):
        mechanism.step(3)
    mechanism.step(4)
    with pytest.raises(BudgetExceeded):
        mechanism.step(5)
    assert mechanism.steps_taken == 5


def test_only_noise_from_the_system_is_a_guarantee() -> None:
    task = slope_task(torch.ones(4, WIDTH))
    noisy, bare = Terms(noise_std=1.0), Terms(noise_std=0.0)
    for terms, source, wanted in (
        (noisy, SystemRandomness(), True),
        (noisy, SeededRandomness(0), False),
        (bare, SystemRandomness(), False),
    ):
        assert PrivateGradient(task, trained_of(task), terms, source).guaranteed is wanted


def test_the_step_follows_the_weights_and_leaves_them_alone() -> None:
    task = TableTask(nn.Linear(WIDTH, 1), torch.ones(4, WIDTH))
    trained = trained_of(task)
    mechanism = PrivateGradient(task, trained, Terms(max_grad_norm=1e6), NoNoise())
    before = {name: live.detach().clone() for name, live in trained.items()}
    first = mechanism.step(0)
    assert all(torch.equal(live, before[name]) for name, live in trained.items())
    with torch.no_grad():
        for live in trained.values():
            live.mul_(2)
    second = mechanism.step(1)
    for name in trained:
        torch.testing.assert_close(second[name], 2 * first[name])


# -- a site's own tasks ------------------------------------------------------------------------------


def test_a_patients_crops_are_its_own_whoever_else_is_there(patients: list[Patient]) -> None:
    everyone = draw_crops(patients, 48, 2, seed=5)
    without = draw_crops(patients[:1] + patients[2:], 48, 2, seed=5)
    assert [len(rows) for rows in everyone.patients] == [4] * 6
    kept = [row for place, rows in enumerate(everyone.patients) if place != 1 for row in rows]
    assert torch.equal(everyone.images[kept], without.images)
    assert torch.equal(everyone.masks[kept], without.masks)
    unlabelled = [
        replace(patient, samples=tuple(replace(s, mask=None) for s in patient.samples))
        for patient in patients
    ]
    with pytest.raises(DataError, match="labelled"):
        draw_crops(unlabelled, 48, 2, seed=5)
    assert len(draw_crops([unlabelled[0], *patients[1:]], 48, 2, seed=5).patients) == 5


@pytest.mark.parametrize("preset", ["decoder", "dp"])
def test_noised_steps_of_a_shipped_teacher_lower_its_loss(
    preset: str, smoke_plan: RunPlan, patients: list[Patient]
) -> None:
    """DP-FedSGD at one site: the decoder behind cached features, and factors B of the last blocks."""
    settings = replace(smoke_plan.teacher, adapter=preset, rank=None, decoder="full")
    teacher = resident_teacher(settings, smoke_plan.data)
    adapter = teacher.slots.initial(0)
    with teacher.visit(adapter, train=True) as network:
        task = segmentation_task(network, adapter, patients, smoke_plan, None)
        trained = teacher.slots.trainable()
        terms = Terms(max_grad_norm=1.0, noise_std=1e-4, expected_batch=6.0, max_images_per_patient=2)
        mechanism = PrivateGradient(task, trained, terms, SeededRandomness(0), Execution(12))
        losses = []
        for index in range(4):
            losses.append(float(task(*task.inputs(torch.arange(12))).detach().mean()))
            for name, gradient in mechanism.step(index).items():
                trained[name].data.sub_(gradient, alpha=0.05)
        assert losses[-1] < losses[0] - 0.01


def test_the_generators_task_leaves_out_crops_without_a_style(patients: list[Patient]) -> None:
    from common.generator import StyleDiffusion

    crops = draw_crops(patients, 32, 1, seed=0)
    crops.masks[crops.patients[0][0]] = 0
    task = DiffusionTask(StyleDiffusion(), crops, seed=0)
    assert len(task.patients[0]) == len(crops.patients[0]) - 1
    crops.masks.zero_()
    with pytest.raises(DataError, match="too little foreground"):
        DiffusionTask(StyleDiffusion(), crops, seed=0)
