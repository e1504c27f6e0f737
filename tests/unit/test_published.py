"""Numbers that leave with noise: the noise's distribution, one patient's share, and what they cost."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from scipy import stats

from client.dp.randomness import Randomness, SeededRandomness, SystemRandomness
from client.publishing import TICKS, noised_dice
from common.config import check_recipe, load_recipe
from common.errors import ArtefactError, ConfigError
from common.metrics import FloatArray
from common.privacy.accounting import epsilon
from common.privacy.budget import Caps
from common.privacy.bundle import read_bundle
from common.privacy.entries import Context, EntryType
from common.privacy.ledger import Ledger
from common.privacy.published import CLEAR_SCALE, PublishedMetrics
from common.privacy.verify import Evidence, verify

PRIVATE = ["teacher.adapter=decoder", "privacy.noise_multiplier=1", "privacy.steps=4"]
NOISED = [*PRIVATE, "privacy.metric_epsilon=0.25", "generator.scope=none"]
PUBLISHED = PublishedMetrics(0.25, 2, 40)


class Silence(Randomness):
    """Draws of no noise, to see what is under it. Only here."""

    def __init__(self) -> None:
        super().__init__(bytes(32))

    def laplaces(self, count: int) -> FloatArray:
        return np.zeros(count)


def means(values: list[float], published: PublishedMetrics = PUBLISHED) -> float | None:
    return noised_dice({"lesion": np.array(values)}, published, Silence())[0].value


def test_laplace_draws_are_laplace() -> None:
    drawn = SeededRandomness(3).laplaces(200_000)
    assert stats.kstest(drawn, "laplace").pvalue > 0.001
    assert abs(np.mean(drawn[1:] * drawn[:-1])) < 0.02
    assert np.abs(drawn).max() < 53 * math.log(2) + 0.1
    assert len(np.intersect1d(SystemRandomness().laplaces(1000), SystemRandomness().laplaces(1000))) == 0


def test_the_noise_on_a_mean_has_the_scale_that_is_told() -> None:
    source, dice = SeededRandomness(0), {str(number): np.full(20, 0.5) for number in range(4000)}
    wide = PublishedMetrics(1.0, 4000, 40)
    cells = noised_dice(dice, wide, source)
    assert {cell.noise_scale for cell in cells} == {wide.noise_scale} == {1 / 40}
    found = np.array([cell.value for cell in cells])
    assert stats.kstest((found - 20 * 0.5 / 40) * 40, "laplace").pvalue > 0.001


def test_what_leaves_lies_on_a_grid_of_whole_ticks() -> None:
    """So the low bits of a float tell nothing of what the noise was added to."""
    for cell in noised_dice({str(n): np.random.default_rng(n).random(30) for n in range(50)},
                            PUBLISHED, SeededRandomness(1)):  # fmt: skip
        assert cell.value is not None
        ticks = cell.value * TICKS * PUBLISHED.patients
        assert abs(ticks - round(ticks)) < 1e-6


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0, 7.0, -3.0, math.nan, math.inf])
def test_one_patient_moves_a_sum_by_at_most_one(value: float) -> None:
    others = [0.2, 0.9, 0.5]
    with_it, without = means([*others, value]), means(others)
    assert with_it is not None
    assert without is not None
    assert 0 <= with_it - without <= 1 / PUBLISHED.patients + 1e-12
    assert means([]) == 0.0


def test_the_divisor_is_the_declared_number_and_a_mean_stays_between_0_and_1() -> None:
    assert means([0.5] * 10) == pytest.approx(0.125)
    assert means([1.0] * 99) == 1.0
    noisy = PublishedMetrics(0.01, 1, 10)
    drawn = [noised_dice({"a": np.array([0.5])}, noisy, SeededRandomness(n))[0].value for n in range(20)]
    assert set(drawn) >= {0.0, 1.0}
    assert all(value is not None and 0 <= value <= 1 for value in drawn)


@pytest.mark.parametrize("delta", [1e-3, 1e-5])
def test_what_the_numbers_cost_is_what_dp_accounting_says(delta: float) -> None:
    accountant = PLDAccountant()
    accountant.compose(dp_event.SelfComposedDpEvent(dp_event.LaplaceDpEvent(1 / 0.25), 2))
    assert epsilon([PUBLISHED.event], delta) == pytest.approx(accountant.get_epsilon(delta), rel=1e-3)
    assert epsilon([PUBLISHED.event], delta) <= 2 * 0.25 + 1e-6


def test_a_plan_of_numbers_is_read_back_and_another_text_is_none() -> None:
    assert PublishedMetrics.from_json(PUBLISHED.to_json()) == PUBLISHED
    with pytest.raises(ArtefactError):
        PublishedMetrics.from_json({"epsilon_each": 1.0})


def test_a_recipe_is_told_where_noise_drowns_its_numbers() -> None:
    notes = check_recipe("smoke", NOISED).notes
    assert [note.partition(":")[0] for note in notes] == ["east", "west"]
    assert "over 3 patients leaves with noise of scale 1.3" in notes[0]
    assert "80 patients would bring it to 0.05" in notes[0]
    assert pytest.approx(CLEAR_SCALE) == 1 / (0.25 * 80)
    assert (
        check_recipe("smoke", [*NOISED, "sites.east.test_patients=80", "sites.west.test_patients=80"]).notes
        == ()
    )


NOT_COVERED = [
    (["generator.scope=style"], "generator.scope", "leave privacy.metric_epsilon out"),
    (["privacy.release_metrics=false"], "privacy.metric_epsilon", "leave it out"),
    (["privacy.metric_epsilon=0"], "privacy.metric_epsilon", "above 0"),
    (["sites.west.test_patients=1"], "sites[1].test_patients", "declare that many"),
    (["sites.west.phantom=null", "sites.west.manifest=list.csv", "sites.west.patients=3"],
     "sites[1].test_patients", "declare the labelled ones that test"),
    (["sites.west.patients=1"], "sites[1].patients", "lower data.min_patients"),
    (["privacy.noise_multiplier=null", "privacy.steps=30"], "privacy", "leave them out"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "key", "fix"), NOT_COVERED, ids=lambda part: str(part)[:50])
def test_what_noise_on_metrics_needs_is_a_fault_with_its_fix(
    overrides: list[str], key: str, fix: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("smoke", [*NOISED, *overrides])
    assert any(f"{key}: " in fault and fix in fault for fault in caught.value.faults), caught.value.faults


RUN = Context("run", "d" * 64)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Of a site whose run planned two numbers."""
    found = Ledger.create(tmp_path / "site", "harbour", Caps(1e-5))
    found.record(EntryType.plan, RUN, {"plans": {}, "metrics": PUBLISHED.to_json()})
    return found


def faults_after(ledger: Ledger, context: Context, count: int) -> list[str]:
    ledger.charge_metric(context, "evaluate", ["a", "b"], [replace(PUBLISHED.event, count=count)])
    return verify(read_bundle(ledger.folder), Evidence()).faults


def test_a_record_with_the_numbers_that_were_planned_holds(ledger: Ledger) -> None:
    assert faults_after(ledger, RUN, 2) == []


def test_more_numbers_than_planned_are_found(ledger: Ledger) -> None:
    assert faults_after(ledger, RUN, 1) == []
    assert faults_after(ledger, RUN, 2) == ["run run: more numbers were published than its plan has"]


def test_numbers_that_no_plan_names_are_found(ledger: Ledger) -> None:
    assert faults_after(ledger, Context("other"), 1) == ["entry 2: publishes numbers that no plan names"]
