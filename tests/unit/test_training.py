"""Adaptation, generation, curation and distillation on a few small patients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import client.adaptation as adaptation
import client.generation as generation
import client.transfer.labelling as labelling
from client.adaptation import Visit
from client.curation import agreement, drop_inconsistent
from client.deadline import Deadline
from client.distillation import distil
from client.fitting import Schedule
from client.generation import Sampling, fine_tune, synthesise
from client.losses import feature_loss, segmentation_loss, soft_dice_loss, softened_logit_loss
from client.patients import Patient
from client.students import build_student
from client.style import summarise_style
from client.transfer.labelling import gather, teacher_outputs
from client.transfer.sets import TransferSet, real_crops
from client.variants import VARIANTS, Start
from common.adapter import Adapter
from common.errors import DataError, DeadlinePassed
from common.generator import generator_of, resident_generator, site_code
from common.generator import initial_adapter as initial_generator
from common.plan import RunPlan
from common.teacher import ResidentTeacher, initial_adapter, resident_teacher

FOREVER = Deadline(1e9)


@pytest.fixture
def teacher(smoke_plan: RunPlan) -> ResidentTeacher:
    return resident_teacher(smoke_plan.teacher, smoke_plan.data)


def start(plan: RunPlan):  # type: ignore[no-untyped-def]
    return initial_adapter(plan.teacher, plan.data, 0)


# -- losses ------------------------------------------------------------------------------------------


def test_losses_vanish_where_they_should() -> None:
    mask = (torch.rand(2, 1, 8, 8) > 0.5).float()
    logits = (mask * 2 - 1) * 50
    assert segmentation_loss(logits, mask, False) < 1e-4
    assert soft_dice_loss(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)) == 0
    assert feature_loss(logits + 1, 3 * (logits + 1)) == pytest.approx(0, abs=1e-6)


@given(st.floats(0.5, 8.0), st.integers(0, 100))
def test_the_softened_loss_is_a_divergence(temperature: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, two = torch.randn(2, 1, 1, 4, 4, generator=generator) * 3
    assert softened_logit_loss(one, one, temperature, False) == pytest.approx(0, abs=1e-6)
    assert softened_logit_loss(one, two, temperature, False) > 0


# -- adaptation --------------------------------------------------------------------------------------


def test_adaptation_repeats_and_never_touches_the_base(
    smoke_plan: RunPlan, teacher: ResidentTeacher, patients: list[Patient]
) -> None:
    plan = replace(smoke_plan, teacher=replace(smoke_plan.teacher, steps=3))
    frozen = {n: p.clone() for n, p in teacher.network.named_parameters() if "base_layer" in n}
    first, again = (adaptation.adapt(teacher, start(plan), patients, plan, (0, 5), FOREVER) for _ in range(2))
    other = adaptation.adapt(teacher, start(plan), patients, plan, (0, 6), FOREVER)
    assert first.adapter.digest == again.adapter.digest != other.adapter.digest
    teacher.slots.write(start(plan))
    for name, parameter in teacher.network.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name])


def test_adaptation_learns(smoke_plan: RunPlan, teacher: ResidentTeacher, patients: list[Patient]) -> None:
    plan = replace(smoke_plan, rounds=1, teacher=replace(smoke_plan.teacher, steps=25, batch_size=4))
    losses = adaptation.adapt(teacher, start(plan), patients, plan, (0, 0), FOREVER).losses
    assert losses[1] < 0.8 * losses[0]


def test_a_visit_leaves_nothing_for_the_next_site(
    smoke_plan: RunPlan, teacher: ResidentTeacher, patients: list[Patient]
) -> None:
    """Site A then site B equals site B alone."""
    alone = adaptation.adapt(teacher, start(smoke_plan), patients[3:], smoke_plan, (0, 1), FOREVER)
    adaptation.adapt(teacher, start(smoke_plan), patients[:3], smoke_plan, (0, 2), FOREVER)
    after = adaptation.adapt(teacher, start(smoke_plan), patients[3:], smoke_plan, (0, 1), FOREVER)
    assert alone.adapter.digest == after.adapter.digest


def test_adaptation_stops_at_its_deadline(
    smoke_plan: RunPlan, teacher: ResidentTeacher, patients: list[Patient]
) -> None:
    ticks: Iterator[float] = iter([0.0, 1.0, 99.0])
    with pytest.raises(DeadlinePassed, match="adapting"):
        adaptation.adapt(
            teacher, start(smoke_plan), patients, smoke_plan, (0, 0), Deadline(10, lambda: next(ticks))
        )
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())


def test_a_loss_that_is_not_finite_is_an_error(
    smoke_plan: RunPlan, teacher: ResidentTeacher, patients: list[Patient]
) -> None:
    plan = replace(smoke_plan, teacher=replace(smoke_plan.teacher, learning_rate=1e30, steps=4))
    with pytest.raises(DataError, match="not finite"):
        adaptation.adapt(teacher, start(plan), patients, plan, (0, 0), FOREVER)


def test_the_learning_rate_falls_over_the_whole_run() -> None:
    rounds = [Schedule(1.0, 10, first, 30, warm_up=1) for first in (0, 10, 20)]
    rates = [part.rate(step) for part in rounds for step in range(10)]
    assert rates[0] == 1
    assert rates[-1] < 0.12
    assert rates == sorted(rates, reverse=True)
    assert Schedule(1.0, 10, warm_up=5).rate(0) == pytest.approx(0.2)


# -- generation and curation -------------------------------------------------------------------------


def test_synthesis_repeats_and_keeps_to_its_denoiser_calls(
    smoke_plan: RunPlan, patients: list[Patient]
) -> None:
    generator = resident_generator(smoke_plan.generator.name, smoke_plan.generator.rank)
    adapter = initial_generator(smoke_plan.generator, 0)
    summary = summarise_style(patients, 64, 2, 2, 0)
    before = generation.denoiser_calls
    first, again = (synthesise(generator, adapter, [summary], smoke_plan, 4) for _ in range(2))
    calls = generation.denoiser_calls - before
    assert torch.equal(first.images, again.images)
    assert calls == 2 * smoke_plan.generator.images * smoke_plan.generator.sampler_steps
    assert calls / (2 * len(first)) <= 20
    assert first.images.shape == (smoke_plan.generator.images, 3, 64, 64)
    assert first.images.min() >= 0
    assert first.images.max() <= 1


def test_a_conditioning_mask_is_never_a_patients(
    smoke_plan: RunPlan, patients: list[Patient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same styles give the same masks whatever the patients' masks were: only 14 numbers pass."""
    plan = replace(smoke_plan, generator=replace(smoke_plan.generator, images=6))
    generator = resident_generator(plan.generator.name, plan.generator.rank)
    made = synthesise(
        generator, initial_generator(plan.generator, 0), [summarise_style(patients, 64, 2, 2, 0)], plan, 4
    )
    real = [sample.mask for patient in patients for sample in patient.samples]
    for mask in made.masks:
        assert not any(other is not None and torch.equal(mask.byte(), other) for other in real)


def test_the_generators_adapter_learns_and_the_base_stays(
    smoke_plan: RunPlan, patients: list[Patient]
) -> None:
    generator = resident_generator(smoke_plan.generator.name, smoke_plan.generator.rank)
    begin = initial_generator(smoke_plan.generator, 0)
    first, again = (fine_tune(generator, begin, patients, smoke_plan, (0, 3), FOREVER) for _ in range(2))
    assert first.adapter.digest == again.adapter.digest != begin.digest
    assert all(math.isfinite(loss) for loss in first.losses)


def test_a_site_token_tells_sites_apart_once_it_is_trained(
    smoke_plan: RunPlan, patients: list[Patient]
) -> None:
    settings = replace(smoke_plan.generator, site_token=True, steps=4)
    plan, generator = replace(smoke_plan, generator=settings), generator_of(settings)
    begin = initial_generator(settings, 0)
    assert {name for name in begin.tensors if "token" in name} == {"token.lora_A", "token.lora_B"}
    assert not any("token" in name for name in initial_generator(smoke_plan.generator, 0).tensors)
    summary = [summarise_style(patients, 64, 2, 2, 0)]
    trained = fine_tune(generator, begin, patients, plan, Visit(0, 3, site="east"), FOREVER).adapter

    def painted(adapter: Adapter, site: str) -> torch.Tensor:
        return synthesise(generator, adapter, summary, plan, 4, Sampling(sites=(site,))).images

    assert torch.equal(painted(begin, "east"), painted(begin, "west")), "an untrained token says nothing"
    assert not torch.equal(painted(trained, "east"), painted(trained, "west"))


def test_codes_of_sites_are_nearly_at_right_angles_and_the_same_everywhere() -> None:
    codes = torch.stack([site_code(f"site-{number}") for number in range(12)])
    assert (codes @ codes.T - torch.eye(12)).abs().max() < 0.5
    site_code.cache_clear()
    assert torch.equal(site_code("site-0"), codes[0])


def transfer_of(logits: torch.Tensor, masks: torch.Tensor, synthetic: list[bool]) -> TransferSet:
    count = len(logits)
    return TransferSet(
        torch.zeros(count, 3, 8, 8), masks, torch.tensor(synthetic), logits,
        torch.zeros(count, 96, 1, 1), torch.zeros(count, 32, 4, 4),
    )  # fmt: skip


def test_inconsistent_synthetic_images_are_dropped_and_counted_and_real_ones_kept() -> None:
    mask = torch.zeros(4, 1, 8, 8)
    mask[:, :, :4] = 1
    logits = (mask * 2 - 1) * 9
    logits[1] = -logits[1]  # synthetic, the teacher disagrees
    logits[3] = -logits[3]  # real: not judged
    curated = drop_inconsistent(transfer_of(logits, mask, [True, True, True, False]), 0.5, False)
    assert (curated.generated, curated.kept, curated.dropped_inconsistent) == (3, 2, 1)
    assert len(curated.transfer) == 3
    assert curated.transfer.synthetic.tolist() == [True, True, False]


def test_agreement_is_dice() -> None:
    probability, mask = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    probability[..., :2, :] = 1
    mask[..., 1:3, :] = 1
    assert agreement(probability, mask).item() == pytest.approx((2 * 4 + 1) / (8 + 8 + 1))


# -- distillation ------------------------------------------------------------------------------------


@pytest.fixture
def transfer(smoke_plan: RunPlan, teacher: ResidentTeacher, patients: list[Patient]) -> TransferSet:
    with teacher.visit(start(smoke_plan)) as network:
        found = gather(real_crops(patients, smoke_plan, 0), None)
        assert found is not None
        return replace(found, **vars(teacher_outputs(network, found.images, False)))


def test_no_teacher_is_called_while_a_student_learns(
    smoke_plan: RunPlan, patients: list[Patient], transfer: TransferSet, teacher: ResidentTeacher
) -> None:
    student = build_student("unet-xs", smoke_plan.data, True, 0)
    calls = []
    handle = teacher.network.register_forward_hook(lambda *_: calls.append(1))
    before = labelling.teacher_calls
    try:
        distil(student, patients, transfer, smoke_plan, 0, FOREVER)
    finally:
        handle.remove()
    assert labelling.teacher_calls == before
    assert calls == []


def test_distillation_repeats(smoke_plan: RunPlan, patients: list[Patient], transfer: TransferSet) -> None:
    def train() -> list[float]:
        return distil(
            build_student("unet-xs", smoke_plan.data, True, 0), patients, transfer, smoke_plan, 1, FOREVER
        )

    first = train()
    torch.manual_seed(99)
    assert train() == first
    assert len(first) == smoke_plan.student.steps


def test_a_student_learns_from_a_teacher_of_any_width(
    smoke_plan: RunPlan, patients: list[Patient], transfer: TransferSet
) -> None:
    """The alignment takes the teacher's channels and grid from what the teacher said."""
    wide = replace(
        transfer, tokens=torch.randn(len(transfer), 40, 4, 4), features=torch.randn(len(transfer), 24, 32, 32)
    )
    student = build_student("unet-xs", smoke_plan.data, True, 0)
    assert np.isfinite(distil(student, patients, wide, smoke_plan, 0, FOREVER)).all()


def test_distillation_follows_the_teacher_where_labels_say_nothing(
    smoke_plan: RunPlan, patients: list[Patient], transfer: TransferSet
) -> None:
    """A teacher that sees foreground everywhere must drag the student's unlabelled outputs up."""
    everywhere = replace(transfer, logits=torch.full_like(transfer.logits, 6.0))  # type: ignore[arg-type]
    nowhere = replace(transfer, logits=torch.full_like(transfer.logits, -6.0))  # type: ignore[arg-type]
    plan = replace(
        smoke_plan,
        student=replace(
            smoke_plan.student, steps=15, batch_size=2, transfer_batch_size=8, supervised_weight=0.0
        ),
    )
    shares = []
    for taught in (everywhere, nowhere):
        student = build_student("unet-xs", plan.data, True, 0)
        distil(student, patients, taught, plan, 0, FOREVER)
        shares.append(student(transfer.images[:8]).sigmoid().mean().item())
    assert shares[0] > 5 * shares[1]


def test_variants_differ_in_one_ingredient_each() -> None:
    ours = VARIANTS["student"]
    assert VARIANTS["no_synthetic"] == replace(ours, styles=None)
    assert VARIANTS["no_distillation"] == replace(ours, teacher=None)
    assert VARIANTS["no_federation"] == replace(ours, teacher="local", styles="own", shares_start=False)
    assert VARIANTS["local_only"] == replace(ours, teacher=None, styles=None, shares_start=False)
    assert VARIANTS["local_only_scratch"] == replace(VARIANTS["local_only"], start=Start.random)


def test_without_a_teacher_only_what_has_a_mask_is_used(smoke_plan: RunPlan, patients: list[Patient]) -> None:
    assert gather(real_crops(patients, smoke_plan, 0), None, masked=True) is None
    student = build_student("unet-xs", smoke_plan.data, True, 0)
    losses = distil(student, patients, None, smoke_plan, 0, FOREVER)
    assert np.isfinite(losses).all()
