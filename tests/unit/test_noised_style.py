"""A style summary with noise: one patient's share, the noise on it, what it costs, and what is told of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from client.account import privacy_plan, style_plan
from client.dp.randomness import Randomness, SeededRandomness, SystemRandomness
from client.noised_style import (
    CELLS,
    CENTRES,
    COUNT,
    GREY,
    RANGES,
    REACH,
    TICKS,
    TINTS,
    cell_of,
    centre_of,
    look_of,
    noised,
    noised_style,
    share_of,
    summary_of,
    summed,
)
from client.patients import Patient, Sample, Split
from common.config import load_recipe
from common.errors import ConfigError
from common.privacy.accounting import epsilon
from common.privacy.plan import PlanSettings, PrivacyPlan, one_release
from common.recipe import PrivacyConfig
from common.style import STYLE_FIELDS
from server.screening import admit_style
from tests.unit.test_style import cohort

SIZE, IMAGES = 32, 2
TERMS = PrivacyPlan.make(PlanSettings(30, 1.0, 1, max_images_per_patient=IMAGES, stage="style"), 2.0)
KINDS = ("plain", "coloured", "extreme", "nan", "infinite", "huge", "empty", "full", "unlabelled", "dark")


class Silence(Randomness):
    """Draws of no noise, to see what is under it. Only here."""

    def __init__(self) -> None:
        super().__init__(bytes(32))

    def normals(self, shape: object) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=torch.float64)  # type: ignore[call-overload]


def sample(kind: str, seed: int) -> Sample:
    """A picture of that kind: most of them break something."""
    rng = np.random.default_rng(seed)
    image = torch.from_numpy(rng.random((3, 16, 16))).float()
    if kind in ("plain", "dark"):
        image = image[:1].expand(3, -1, -1).clone() * (0.0 if kind == "dark" else 1.0)
    mask = torch.from_numpy(rng.random((1, 16, 16)) < 0.4).to(torch.uint8)
    if kind == "extreme":
        image = mask.float().expand(3, -1, -1).clone()
    if kind in ("nan", "infinite", "huge"):
        image[:, 3:9] = {"nan": math.nan, "infinite": math.inf, "huge": -1e30}[kind]
    if kind in ("empty", "full"):
        mask = torch.full_like(mask, int(kind == "full"))
    return Sample(image, None if kind == "unlabelled" else mask, torch.ones(16, 16, dtype=torch.bool))


patients = st.builds(
    lambda kinds, seed: Patient(
        f"p{seed}", Split.train, tuple(sample(kind, seed + place) for place, kind in enumerate(kinds))
    ),
    st.lists(st.sampled_from(KINDS), max_size=4),
    st.integers(0, 10_000),
)


# --- one patient's share ------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(patients, max_size=3), patients)
def test_one_patient_moves_one_row_by_a_vector_of_norm_1_at_most(others: list[Patient], one: Patient) -> None:
    """Added or removed, whatever its images are, those that are no images among them."""
    moved = summed([*others, one], SIZE, IMAGES) - summed(others, SIZE, IMAGES)
    assert np.array_equal(moved, summed([one], SIZE, IMAGES)), "nobody else's share depends on who is there"
    assert np.count_nonzero(moved.any(axis=1)) <= 1
    assert int((moved**2).sum()) <= TICKS**2


looks = st.tuples(*(st.floats(low, high) for low, high in RANGES)).map(np.array)


@given(looks)
def test_a_share_is_never_longer_than_1_and_counts_every_patient_alike(look: np.ndarray) -> None:
    share = share_of(look, cell_of(look))
    assert share[0] == round(COUNT * TICKS)
    assert int((share**2).sum()) <= TICKS**2


def test_a_look_far_from_its_centre_is_drawn_in_to_the_whole_of_its_share() -> None:
    """So the bound is not kept by shares that are always short."""
    look = centre_of(1)
    look[:2] = 1.0, 0.0
    assert np.linalg.norm(look[:2] - centre_of(1)[:2]) > REACH
    assert int((share_of(look, 1) ** 2).sum()) > 0.9999 * TICKS**2


def test_a_patient_with_many_images_counts_once_by_its_first_ones() -> None:
    first = [sample("plain", seed) for seed in range(IMAGES)]
    more = [*first, *(sample("coloured", seed) for seed in range(20))]
    few, many = (Patient("p", Split.train, tuple(samples)) for samples in (first, more))
    assert np.array_equal(summed([few], SIZE, IMAGES), summed([many], SIZE, IMAGES))
    assert summed([many], SIZE, IMAGES)[:, 0].sum() == round(COUNT * TICKS)


@pytest.mark.parametrize("kind", ["nan", "infinite", "empty", "full", "unlabelled"])
def test_an_image_that_says_nothing_adds_nothing(kind: str) -> None:
    patient = Patient("p", Split.train, (sample(kind, 0),))
    assert look_of(patient, SIZE, IMAGES) is None
    assert not summed([patient], SIZE, IMAGES).any()


def test_cells_and_centres_are_the_same_for_every_site() -> None:
    """Each public centre lies in its own cell, and is the centroid of that part of the square."""
    rng = np.random.default_rng(0)
    points = rng.random((200_000, 2))
    for number, centre in enumerate(CENTRES):
        look = centre_of(number)
        assert cell_of(look) == number
        look[TINTS] = 0.1
        assert cell_of(look) == number + len(CENTRES)
        front, back = points.T
        inside = (front >= back) + 2 * (back >= 0.5) == number
        assert points[inside].mean(0) == pytest.approx(centre, abs=0.005)


# --- noise and cost -----------------------------------------------------------------------------------


def test_the_noise_has_the_deviation_of_its_plan_and_lies_on_whole_ticks() -> None:
    nobody = summed([], SIZE, IMAGES)
    source = SeededRandomness(0)
    drawn = np.concatenate([noised(nobody, TERMS, source).ravel() for _ in range(300)])
    assert stats.kstest(drawn / TERMS.noise_std, "norm").pvalue > 0.001
    assert drawn.std() == pytest.approx(TERMS.noise_std, rel=0.02)
    assert np.abs(drawn * TICKS - np.rint(drawn * TICKS)).max() < 1e-6
    assert TERMS.max_grad_norm == 1, "the norm that shares have at most"


def test_two_summaries_share_no_noise() -> None:
    nobody = summed([], SIZE, IMAGES)
    first, second = (noised(nobody, TERMS, SystemRandomness()) for _ in range(2))
    assert not np.intersect1d(first, second).size > 2  # ticks are few enough to meet by chance


@pytest.mark.parametrize("each", [0.5, 2.0, 8.0])
def test_a_summary_alone_costs_what_was_asked_and_nearly_all_of_it(each: float) -> None:
    plan = one_release("style", each, PlanSettings(30, 0.5, 40, max_grad_norm=3.0))
    assert (plan.stage, plan.steps, plan.sample_rate, plan.max_grad_norm) == ("style", 1, 1.0, 1.0)
    accountant = PLDAccountant()
    accountant.compose(dp_event.GaussianDpEvent(plan.noise_multiplier))
    assert each * 0.99 <= accountant.get_epsilon(plan.delta) <= each
    assert plan.event().dp_event() == dp_event.SelfComposedDpEvent(
        dp_event.GaussianDpEvent(plan.noise_multiplier), 1
    )


def test_the_runs_epsilon_holds_the_training_and_the_summary_together() -> None:
    """The training has the more noise for it; by dp-accounting, and by no sum of epsilons."""
    asked = PrivacyConfig(epsilon=3.0, sample_rate=0.5, steps=4, style_epsilon=1.0)
    steps, styled = privacy_plan(asked, 30), style_plan(asked, 30)
    assert styled is not None
    accountant = PLDAccountant()
    accountant.compose(dp_event.GaussianDpEvent(styled.noise_multiplier))
    accountant.compose(
        dp_event.PoissonSampledDpEvent(0.5, dp_event.GaussianDpEvent(steps.noise_multiplier)), 4
    )
    joint = epsilon([steps.event(), styled.event()], asked.delta)
    assert joint == pytest.approx(accountant.get_epsilon(asked.delta), rel=1e-3)
    assert 0.98 * 3.0 <= joint <= 3.0
    alone = privacy_plan(PrivacyConfig(epsilon=3.0, sample_rate=0.5, steps=4), 30)
    assert steps.noise_multiplier > alone.noise_multiplier
    assert style_plan(PrivacyConfig(style_epsilon=1.0), 30) is None, "a run without noise has none here"


# --- what is told -------------------------------------------------------------------------------------


def quiet(kinds: list[tuple[float, float]], limits: tuple[int, int] = (5, 5)) -> list[list[float]]:
    sums = noised(summed(cohort(kinds), SIZE, IMAGES), TERMS, Silence())
    return [[group.weight, *group.mean] for group in summary_of(sums, 0.0, limits).groups]


def test_two_appearances_become_two_groups_of_their_colours() -> None:
    light, dark = quiet([(0.7, 0.1)] * 12 + [(0.3, 0.8)] * 8)
    assert (light[0], dark[0]) == (0.6, 0.4)
    for group, front, back in ((light, 0.7, 0.1), (dark, 0.3, 0.8)):
        named = dict(zip(STYLE_FIELDS, group[1:], strict=True))
        assert named["fg_mean_r"] == pytest.approx(front, abs=0.02)
        assert named["bg_mean_b"] == pytest.approx(back, abs=0.02)
        assert named["log_coverage"] == pytest.approx(np.log(144 / 1024), abs=0.05)
        assert named["log_area_over_perimeter"] == pytest.approx(np.log(144 / 44), abs=0.05)
        assert named["fg_std_g"] == pytest.approx(0.02, abs=0.01)


def test_a_coloured_group_keeps_its_colour_and_a_grey_one_is_grey() -> None:
    pink = cohort([(0.4, 0.8)] * 6)
    for patient in pink:
        patient.samples[0].image[1] -= 0.2  # less green, in both regions
    grey = cohort([(0.7, 0.1)] * 6)
    sums = noised(summed([*pink, *grey], SIZE, IMAGES), TERMS, Silence())
    by_colour = sorted(summary_of(sums, 0.0, (5, 5)).groups, key=lambda group: float(np.ptp(group.mean[:3])))
    assert np.ptp(by_colour[0].mean[:3]) == np.ptp(by_colour[0].mean[6:9]) == 0
    assert np.ptp(by_colour[0].mean[:3]) < GREY
    assert by_colour[1].mean[:3] == pytest.approx([0.4, 0.2, 0.4], abs=0.02)
    assert by_colour[1].mean[6:9] == pytest.approx([0.8, 0.6, 0.8], abs=0.02)


def test_a_small_group_is_left_out_and_the_fullest_is_told_where_all_are_small() -> None:
    assert len(quiet([(0.7, 0.1)] * 8 + [(0.3, 0.8)] * 4)) == 1
    assert len(quiet([(0.7, 0.1)] * 8 + [(0.3, 0.8)] * 5)) == 2
    assert len(quiet([(0.7, 0.1)] * 8 + [(0.3, 0.8)] * 5, (5, 1))) == 1
    [told] = quiet([(0.7, 0.1)] * 2 + [(0.3, 0.8)] * 3)
    assert told[1] < 0.5, "the second"
    assert len(quiet([])) == 1, "nor does a site without patients say so"


def test_empty_cells_seldom_pass_for_groups() -> None:
    source, found = SeededRandomness(5), 0
    deviation = TERMS.noise_multiplier / COUNT
    for _ in range(300):
        sums = noised(summed([], SIZE, IMAGES), TERMS, source)
        sums[0, 0] = 100.0  # one real group, or the fullest would be told whatever it is
        found += len(summary_of(sums, deviation, (1, CELLS)).groups) - 1
    assert found / 300 < 0.17


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 300.0))
def test_whatever_the_noise_a_summary_is_one_that_the_server_admits(seed: int, noise: float) -> None:
    sums = np.random.default_rng(seed).normal(0, noise, (CELLS, 1 + len(RANGES)))
    admit_style(summary_of(sums, noise, (5, 3)), 3)


def test_with_noise_the_same_groups_come_out_of_many_patients() -> None:
    style = noised_style(
        cohort([(0.7, 0.1)] * 60 + [(0.3, 0.8)] * 60), SIZE, TERMS, (5, 5), SeededRandomness(1)
    )
    found = sorted(round(group.mean[0], 2) for group in style.groups)
    assert found == pytest.approx([0.3, 0.7], abs=0.1)


# --- what a recipe may say ----------------------------------------------------------------------------

PRIVATE = ["teacher.adapter=decoder", "privacy.noise_multiplier=1", "privacy.steps=4"]
STYLED = [*PRIVATE, "privacy.style_epsilon=2", "privacy.release_metrics=false"]


@pytest.mark.parametrize("scope", ["style", "recolour", "paint"])
def test_with_a_noised_style_a_private_run_may_paint(scope: str) -> None:
    assert load_recipe("smoke", [*STYLED, f"generator.scope={scope}"]).privacy.covered
    covered = [*PRIVATE, "privacy.style_epsilon=2", "privacy.metric_epsilon=1", f"generator.scope={scope}"]
    assert load_recipe("smoke", covered).privacy.covered


FAULTS = [
    (["privacy.style_epsilon=null"], "generator.scope", "take none, or set privacy.style_epsilon, or leave"),
    (["generator.scope=none"], "privacy.style_epsilon", "take generator.scope of style, recolour, paint"),
    (["generator.scope=local"], "privacy.style_epsilon", "take generator.scope of style, recolour, paint"),
    (["generator.scope=federated"], "privacy.style_epsilon", "take generator.scope of style"),
    (["generator.style_detail=texture"], "generator.style_detail", "take colour"),
    (["privacy.style_epsilon=0"], "privacy.style_epsilon", "above 0"),
    (["privacy.noise_multiplier=null", "privacy.epsilon=2"], "privacy.style_epsilon", "a quarter of that"),
    (["privacy.noise_multiplier=null"], "privacy", "leave them out"),
]


@pytest.mark.parametrize(("overrides", "key", "fix"), FAULTS, ids=lambda part: str(part)[:50])
def test_what_a_noised_style_needs_is_a_fault_with_its_fix(overrides: list[str], key: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("smoke", [*STYLED, *overrides])
    assert any(f"{key}: " in fault and fix in fault for fault in caught.value.faults), caught.value.faults
