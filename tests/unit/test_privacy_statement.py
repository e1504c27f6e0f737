"""The statement is never looser than the accounting, whatever the plan."""

from __future__ import annotations

import math
import re
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr, ndtri

from common.privacy.accounting import epsilon
from common.privacy.entries import Cohort, Entry, EntryType
from common.privacy.events import Event
from common.privacy.plan import PlanSettings, PrivacyPlan
from common.privacy.receipts import ReceiptLine
from common.privacy.report.facts import document_of
from common.privacy.report.record import Inquiry, SiteRecord
from common.privacy.report.rounding import per_hundred, spelled, upper, upper_rate


def record_of(plan: PrivacyPlan) -> SiteRecord:
    """One whole run of ``plan``, as a ledger would have it, unsigned and in memory."""
    blank = Entry(
        0, "", "2026-11-20T09:00:00+00:00", EntryType.genesis, "", "", "", "", Cohort(), [], "", [], {}, {}
    )
    planned = replace(
        blank, seq=1, type=EntryType.plan, run_id="run", detail={"plans": {"adapt": plan.to_json()}}
    )
    cohort = Cohort({"c0": plan.patients}, {"c0": []})
    spent = replace(
        blank, seq=2, type=EntryType.reserve, run_id="run", stage="adapt", cohort=cohort,
        events=[plan.event().triple()],
    )  # fmt: skip
    receipt = ReceiptLine("pier", "adapt", 0, "adapt.adapter", 900, "a" * 64, "dp_sgd", None)
    entries = [blank, planned, spent]
    return SiteRecord("pier", "run", entries, [receipt], [], None, None, None, {}, [], Inquiry())


def stated(plan: PrivacyPlan) -> tuple[list[float], list[float]]:
    """Epsilons of the first sentence with their deltas, and what can be found in 100, from the second."""
    first, second = (sentence["text"] for sentence in document_of(record_of(plan))["statement"][:2])
    number = r"(\d+(?:\.\d+)?(?:e-?\d+)?)"
    found = re.search(rf"\u03b5 = {number} at \u03b4 = {number} \({number} at {number}\)", first)
    assert found is not None
    rates = re.findall(rf"pick out at most {number} in 100", second)
    return [float(text) for text in found.groups()], [float(text) for text in rates]


@settings(max_examples=3, deadline=None)
@given(st.floats(2.0, 9.0), st.integers(1, 5), st.integers(20, 500))
def test_the_statement_is_never_looser_than_the_accounting(noise: float, steps: int, patients: int) -> None:
    plan = PrivacyPlan.make(PlanSettings(patients, 1.0, steps), noise)
    (first, delta, second, other), rates = stated(plan)
    assert (delta, other) == (1e-5, 1e-3)
    # The oracle of full batches is closed: one Gaussian comparison of mu, and its own delta(epsilon).
    mu = math.sqrt(steps) / noise
    for figure, at in ((first, delta), (second, other)):
        assert gaussian_delta(mu, figure) <= at
        assert gaussian_delta(mu, figure * 0.995 - 0.002) > at
    for rate, wrong in zip(rates, (0.01, 0.1), strict=True):
        true = 100 * float(ndtr(ndtri(wrong) + mu))
        assert true <= rate <= true + 0.011


def gaussian_delta(mu: float, figure: float) -> float:
    """delta(epsilon) of N(0, 1) against N(mu, 1); Balle and Wang 2018, theorem 8."""
    return float(ndtr(mu / 2 - figure / mu) - math.exp(figure) * ndtr(-mu / 2 - figure / mu))


def test_a_sampled_run_is_stated_at_its_epsilon_rounded_up() -> None:
    noise, rate, steps = 2.5, 0.05, 40
    (first, _, second, _), _ = stated(PrivacyPlan.make(PlanSettings(80, rate, steps), noise))
    for figure, delta in ((first, 1e-5), (second, 1e-3)):
        true = epsilon([Event(noise, rate, steps)], delta)
        assert true <= figure <= true + 0.001


@settings(deadline=None)
@given(st.floats(0, 1e4), st.integers(1, 6))
def test_bounds_are_rounded_up_and_by_less_than_a_step(value: float, decimals: int) -> None:
    found = upper(value, decimals)
    assert found is not None
    assert value <= found <= value + 1.0001 * 10.0**-decimals
    assert spelled(upper(value)) == upper(value)  # what is written is what was rounded


@given(st.floats(0, 1))
def test_an_attackers_rate_is_rounded_up_also_of_a_hundred(rate: float) -> None:
    assert rate <= upper_rate(rate) <= 1
    assert 100 * rate <= per_hundred(upper_rate(rate)) + 1e-9


def test_an_infinite_epsilon_is_no_number() -> None:
    assert upper(math.inf) is None
