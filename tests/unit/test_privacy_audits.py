"""What audits may say: the exam's items 27, 28 and 31 with few repetitions, and the edges of each figure."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from common.privacy.auditing import (
    Area,
    Rate,
    area,
    clopper_pearson,
    multi_run_epsilon,
    one_run,
    one_run_ceiling,
    one_run_epsilon,
    one_run_p_value,
    rate_at,
    roc,
)
from common.privacy.audits import lately_rehearsed, save_audit
from common.privacy.budget import Caps
from common.privacy.entries import Context, EntryType
from common.privacy.events import Event
from common.privacy.ledger import Ledger
from common.privacy.membership import Assignment, Claim, Verdict, claim_of, judged
from common.privacy.policy import AuditRules, Policy
from simulations.privacy_exam import audit as exam


def test_the_one_run_bound_is_that_of_the_formula() -> None:
    verdict = exam.item_27(12)
    assert verdict.passed, verdict


def test_bounds_stay_below_the_truth_as_often_as_they_say() -> None:
    verdict = exam.item_28(60)
    assert verdict.passed, verdict


def test_ceilings_are_said_and_rates_below_resolution_are_not() -> None:
    verdict = exam.item_31(20)
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    ("guesses", "bound"), [(20, 1.82), (50, 2.78), (100, 3.49), (200, 4.19), (500, 5.10)]
)
def test_the_largest_bound_that_so_many_patients_can_certify(guesses: int, bound: float) -> None:
    """The figures of the design, one number of guesses tried."""
    assert one_run_epsilon((guesses, guesses, guesses), 1e-5) == pytest.approx(bound, abs=0.005)
    assert one_run_ceiling(guesses, 1e-5, shares=(1.0,)) == one_run_epsilon((guesses,) * 3, 1e-5)
    assert one_run_ceiling(guesses, 1e-5) < bound, "trying several shares costs some of it"


def test_delta_takes_away_from_a_bound_and_more_patients_more() -> None:
    pure, small, large = (one_run_epsilon((100, 50, 45), delta) for delta in (0.0, 1e-5, 1e-3))
    assert pure > small > large > 0
    assert one_run_epsilon((1000, 50, 45), 1e-3) < large
    assert one_run_p_value(1.0, (100, 50, 0), 1e-3) == 1.0


def test_half_of_the_guesses_right_says_nothing() -> None:
    assert one_run_epsilon((100, 100, 50), 1e-5) == 0.0
    assert one_run_epsilon((100, 100, 0), 1e-5) == 0.0


def test_a_perfect_attack_reaches_the_ceiling() -> None:
    coins = [True, False] * 50
    found = one_run([float(coin) for coin in coins], coins, 1e-5)
    assert found.lower == found.ceiling > 3
    assert (found.canaries, found.guesses, found.right) == (100, 100, 100)


def test_equal_scores_say_nothing_in_whatever_order_patients_stand() -> None:
    """Members first in the list must not make them the best guesses."""
    assert one_run([0.0] * 200, [False] * 100 + [True] * 100, 1e-5).lower == 0.0
    assert one_run([0.0] * 200, [True] * 100 + [False] * 100, 1e-5).lower == 0.0


@pytest.mark.parametrize(
    ("scores", "coins"), [([1.0], [True]), ([1.0, math.nan], [True, False]), ([1.0, 2.0], [True])]
)
def test_scores_that_cannot_be_judged_are_refused(scores: list[float], coins: list[bool]) -> None:
    with pytest.raises(ValueError, match="two canaries or more"):
        one_run(scores, coins, 1e-5)


@pytest.mark.parametrize(("trainings", "bound"), [(32, 2.10), (128, 3.53), (256, 4.23), (1000, 5.60)])
def test_the_largest_bound_that_so_many_trainings_can_certify(trainings: int, bound: float) -> None:
    assert multi_run_epsilon(trainings, trainings, trainings, 1e-5) == pytest.approx(bound, abs=0.005)
    assert multi_run_epsilon(trainings // 2, trainings // 2, trainings, 1e-5) == 0.0


def test_one_side_that_is_told_for_certain_is_enough() -> None:
    """Half of the trainings with the canary show, and none without it."""
    assert multi_run_epsilon(128, 256, 256, 1e-5) == pytest.approx(math.log(0.4372 / 0.01430), abs=0.01)


def test_exact_intervals_of_a_chance() -> None:
    assert clopper_pearson(0, 10) == (0.0, pytest.approx(0.3085, abs=1e-4))
    assert clopper_pearson(10, 10) == (pytest.approx(0.6915, abs=1e-4), 1.0)
    assert clopper_pearson(5, 10) == (pytest.approx(0.1871, abs=1e-4), pytest.approx(0.8129, abs=1e-4))


def test_the_area_by_hand_and_its_interval_by_resampling() -> None:
    assert area([3.0, 2.0], [1.0, 2.0]).value == 3.5 / 4
    rng = np.random.default_rng(0)
    used, others = rng.normal(0.7, 1, 60), rng.normal(0, 1, 80)
    found = area(used.tolist(), others.tolist())
    drawn = [area(rng.choice(used, 60).tolist(), rng.choice(others, 80).tolist()).value for _ in range(600)]
    assert (found.high - found.low) / 3.92 == pytest.approx(np.std(drawn), rel=0.1)


def test_an_area_without_variance_has_an_interval_all_the_same() -> None:
    assert area([2.0] * 30, [1.0] * 40) == Area(1.0, pytest.approx(0.752, abs=1e-3), 1.0)
    assert area([1.0], [1.0]).low == 0.0
    with pytest.raises(ValueError, match="each side"):
        area([], [1.0])


def test_a_rate_at_a_false_positive_rate() -> None:
    others = [float(number) for number in range(20)]
    assert rate_at(0.01, [30.0], others) == Rate(0.01)
    assert not rate_at(0.049, [30.0], others).measurable
    found = rate_at(0.1, [30.0, 17.5, 17.0, 3.0], others)  # two false alarms: 18 and 19
    assert found.value == 0.5
    assert (found.low, found.high) == clopper_pearson(2, 4)
    assert rate_at(1.0, [-5.0], [0.0]).value == 1.0


def test_a_roc_goes_from_corner_to_corner() -> None:
    assert roc([2.0, 1.0], [1.0, 0.0]) == [(0.0, 0.0), (0.0, 0.5), (0.5, 1.0), (1.0, 1.0)]


# --- judging ------------------------------------------------------------------------------------------

COINS = [True, False] * 40
LEAKING = [(float(coin), 0.0) for coin in COINS]


def test_a_leaking_artefact_contradicts_a_small_claim_and_no_large_one() -> None:
    small, large, none = (
        judged(("adapter", "ab"), LEAKING, COINS, Assignment.by_coin, Claim(upper))
        for upper in (1.0, 4.0, None)
    )
    assert [one.verdict for one in (small, large, none)] == [
        Verdict.inconsistent, Verdict.consistent, Verdict.no_claim,
    ]  # fmt: skip
    assert "CONSISTENT (not proof)" in "\n".join(large.lines())
    assert "claimed upper bound: none   NO CLAIM" in "\n".join(none.lines())


def test_a_split_that_is_no_coins_contradicts_nothing() -> None:
    found = judged(("adapter", "ab"), LEAKING, COINS, Assignment.by_split, Claim(0.1))
    assert found.verdict is Verdict.no_claim
    assert (found.bound.lower, found.bound.ceiling, found.bound.guesses) == (0.0, 0.0, 0)
    assert found.auc.value == 1.0, "what was found is said all the same"
    assert "could not have reported more than 0.00" in "\n".join(found.lines())


def test_figures_are_rounded_so_that_nothing_looks_better_than_it_is() -> None:
    found = judged(("adapter", "ab"), LEAKING, COINS, Assignment.by_coin, Claim(2.001, limits={0.1: 0.301}))
    text = "\n".join(found.lines())
    assert "claimed upper bound: 2.01" in text
    assert "limit from accounting 0.31" in text
    assert f"eps >= {math.floor(found.bound.lower * 100) / 100:.2f}" in text


def test_the_claim_of_noised_steps_is_their_accounting() -> None:
    claim = claim_of([Event(1.5, 0.08, 130)], 1e-3)
    assert claim.upper == pytest.approx(2.11, abs=0.01)
    assert claim.limits[0.01] == pytest.approx(0.052, abs=0.001)
    assert claim_of([Event(0.0, 1.0, 1)], 1e-3) == Claim(None, 1e-3)


def test_the_document_has_what_readers_of_it_rely_on() -> None:
    document = judged(("adapter", "ab"), LEAKING, COINS, Assignment.by_coin, Claim(1.0)).to_json()
    assert set(document) >= {
        "schema", "kind", "artefact", "artefact_sha256", "attack", "unit", "assignment", "members", "others",
        "auc", "tpr", "roc", "right", "guesses", "lower", "ceiling", "upper", "verdict", "not_run",
    }  # fmt: skip
    assert set(document["tpr"][0]) == {"fpr", "value", "low", "high", "limit", "measurable"}
    assert (document["assignment"], document["members"], document["others"]) == ("coin", 40, 40)


# --- rehearsals in the ledger ---------------------------------------------------------------------------


def rehearsed(folder: Path, passed: bool, code: str, days_ago: float) -> Ledger:
    then = datetime.now(UTC) - timedelta(days=days_ago)
    ledger = Ledger.create(folder, "harbour", Caps(1e-5), clock=lambda: then)
    detail = {"kind": "rehearsal", "passed": passed, "code_sha256": code}
    ledger.record(EntryType.audit, Context(), detail)
    return ledger


@pytest.mark.parametrize(
    ("passed", "code", "days_ago", "counts"),
    [(True, "a", 1, True), (False, "a", 1, False), (True, "b", 1, False), (True, "a", 31, False)],
)
def test_a_rehearsal_counts_if_it_passed_lately_with_the_same_code(
    tmp_path: Path, passed: bool, code: str, days_ago: float, counts: bool
) -> None:
    entries = rehearsed(tmp_path, passed, code, days_ago).entries
    assert lately_rehearsed(entries, "a", datetime.now(UTC), None) is counts


def test_a_policy_decides_how_old_a_rehearsal_may_be(tmp_path: Path) -> None:
    entries = rehearsed(tmp_path, True, "a", 2).entries
    for days, counts in ((1, False), (3, True)):
        policy = Policy(audit=AuditRules(rehearsal_max_age_days=days))
        assert lately_rehearsed(entries, "a", datetime.now(UTC), policy) is counts


def test_a_later_rehearsal_that_failed_takes_an_earlier_ones_place(tmp_path: Path) -> None:
    ledger = rehearsed(tmp_path, True, "a", 1)
    ledger.record(EntryType.audit, Context(), {"kind": "rehearsal", "passed": False, "code_sha256": "a"})
    ledger.record(EntryType.audit, Context(), {"kind": "artefact", "lower": 0.0, "upper": None})
    assert not lately_rehearsed(ledger.entries, "a", datetime.now(UTC), None)


def test_an_audit_is_kept_below_the_sites_folder(tmp_path: Path) -> None:
    kept = save_audit(tmp_path, "rehearsal", {"passed": True})
    assert kept["file"] == "audits/rehearsal.json"
    assert (tmp_path / kept["file"]).read_text() == '{\n  "passed": true\n}\n'
