"""The read-out of what noise does to style summaries: nothing without noise, less with more epsilon."""

from __future__ import annotations

from client.noised_style import summed
from client.style import summarise_style
from simulations.benchmark.style_noise import Look, measure, table
from tests.unit.test_style import cohort

KINDS = [(0.7, 0.1)] * 20 + [(0.3, 0.8)] * 10


def site() -> Look:
    patients = cohort(KINDS)
    return Look(summed(patients, 32, 1), summarise_style(patients, 32, 5, 5, 0), (5, 5))


def test_without_noise_both_groups_are_told_as_they_are() -> None:
    row = measure([site()], None, 1e-5)
    assert (row.deviation, row.groups, row.of, row.found, row.false, row.error) == (0, 2, 2, 2, 0, 0)
    assert row.distance < 0.03, "nor does a cell's mean differ much from that of k-means"


def test_more_epsilon_leaves_the_groups_nearer_to_what_they_are() -> None:
    look = site()
    little, much = (measure([look], epsilon, 1e-5) for epsilon in (0.5, 8.0))
    assert little.deviation > 5 * much.deviation
    assert little.error > 2 * much.error > 0
    assert little.found < much.found == 2
    assert len(table([little, much]).splitlines()) == 3
