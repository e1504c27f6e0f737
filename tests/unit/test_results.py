"""Tables over seeds: means, differences and costs that stand in the reports."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simulations.results import credit_table, dice_table, site_mean, spread, tables
from tests.report_sample import sample_report


def test_a_spread_shows_the_mean_and_every_seed() -> None:
    assert spread([0.5, 0.7]) == "0.600 (0.500 0.700)"
    assert spread([0.5]) == "0.500"
    assert spread([None]) == "-"


def test_a_site_mean_counts_every_site_once_and_leaves_out_suppressed_cells() -> None:
    report = sample_report()
    cells = [c for c in report.benefit if (c.model, c.tested_on, c.metric) == ("student", "own", "dice")]
    known = [cell.value for cell in cells if cell.value is not None]
    assert site_mean(report, "student", "own") == pytest.approx(sum(known) / len(known))
    without = replace(
        report, benefit=[replace(c, value=None, ci95=None) if c is cells[0] else c for c in report.benefit]
    )
    rest = [cell.value for cell in cells[1:] if cell.value is not None]
    assert site_mean(without, "student", "own") == pytest.approx(sum(rest) / len(rest))


def test_a_credit_is_the_difference_of_its_two_models() -> None:
    report = sample_report()
    better, worse = site_mean(report, "student", "all"), site_mean(report, "local_only", "all")
    assert better is not None
    assert worse is not None
    row = next(line for line in credit_table([report]) if "local training" in line)
    assert f"{better - worse:.3f}" in row


def test_tables_put_seeds_in_order_and_name_every_model() -> None:
    report = sample_report()
    other = replace(report, run=replace(report.run, seed=report.run.seed + 1))
    text = tables([other, report])
    assert text == tables([report, other])
    for model in {cell.model for cell in report.benefit}:
        assert any(line.startswith(f"| {model} |") for line in dice_table([report]))
