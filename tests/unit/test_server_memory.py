"""The server's memory does not grow with the sites: counted, and measured in processes of their own."""

from __future__ import annotations

import pytest

from common.adapter import AdapterUpdate
from server.aggregation.base import AggregationRule
from simulations.benchmark.server_memory import (
    SLOPE_GOAL,
    Cost,
    Rates,
    cost,
    own_cost,
    own_rates,
    report,
    slope,
)

SLACK_MB = 12.0  # what the allocator keeps back from one run and not from another


def test_at_most_two_updates_are_alive_however_many_sites_answer() -> None:
    assert own_cost("dense", 1, 12).live <= 2


def test_memory_does_not_grow_with_sites() -> None:
    few, many = cost("dense", 2, 10), cost("dense", 2, 50)
    allowed = SLOPE_GOAL * (many.sites - few.sites) * many.payload_mb + SLACK_MB
    assert many.collecting_mb - few.collecting_mb <= allowed
    assert many.peak_mb - few.peak_mb <= allowed
    assert allowed < 0.3 * (many.sites - few.sites) * many.payload_mb, "keeping every answer would be seen"


def test_a_server_that_kept_its_answers_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[AdapterUpdate] = []
    fold = AggregationRule.fold

    def keeping(rule: AggregationRule, site: str, update: AdapterUpdate) -> None:
        kept.append(update)
        fold(rule, site, update)

    monkeypatch.setattr(AggregationRule, "fold", keeping)
    found = []
    for sites in (2, 14):
        found.append(own_cost("dense", 2, sites))
        kept.clear()
    assert slope(found) > 0.7


def test_rates_are_of_this_machine() -> None:
    found = own_rates("dense", 1, pairs=3)
    assert min(found.decode, found.admit, found.fold, found.axpy) > 0
    assert found.ratio == pytest.approx(found.fold / found.axpy, rel=0.9)


def test_the_slope_is_in_payloads_a_site() -> None:
    costs = [
        Cost("dense", 8.0, 200, 154.0, 200.0, 9.0, 1, 2.0),
        Cost("dense", 8.0, 20, 10.0, 300.0, 9.0, 1, 2.0),
    ]
    assert slope(costs) == pytest.approx(0.1)
    lines = report(costs, [Rates("dense", 8.0, 1.0, 2.0, 0.5, 1.5, 3.0, 30.0, 0.1)]).splitlines()
    assert lines[2] == "| dense | 8.00 | 200 | 154 | 200 | 9 | 1 | 2.0 | 0.100 |"
    assert lines[-1] == "| dense | 8.00 | 1.00 | 2.00 | 0.50 | 1.50 | 3.00 | 30.0 | 0.100 |"
