"""Every number on the report page stands in report.json, and no claim goes further than its intervals."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.pages import wording as words
from server.report import wording
from server.report.comparison import Verdict, compare, matrix_of
from server.report.page import render
from server.report.reading import reading
from server.report.schema import (
    BenefitCell,
    RunReport,
)
from tests.report_sample import GUARDED, SITES, Page, sample_report, visible, with_dice

TEMPLATE_NUMBERS = {"95", "0", "1", "5"}  # "95 % interval", "numbered from 0", and the glossary's scales
FIXED_WORDS = ("SHA-256", "HD95", "NSD", "utf-8")

# --- numbers --------------------------------------------------------------------------------------------


def numbers_in(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for entry in value.values() for number in numbers_in(entry)]
    if isinstance(value, list):
        return [number for entry in value for number in numbers_in(entry)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def strings_in(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for entry in value.items() for part in entry for text in strings_in(part)]
    if isinstance(value, list):
        return [text for entry in value for text in strings_in(entry)]
    return [value] if isinstance(value, str) else []


def counts_in(report: RunReport) -> list[float]:
    """How many entries: sites, students, rounds, receipts, cells without a value, comparisons."""
    compared = [comparison for tested in ("all", "own") if (comparison := compare(report, tested))]
    apart = [len(each.of(verdict)) for each in compared for verdict in Verdict]
    receipts = [sum(entry.site == site for entry in report.egress) for site in SITES]
    withheld = sum(cell.value is None for cell in report.benefit)
    rounds = sum(record.stage == "adapt" for record in report.rounds)
    return [len(report.sites), len(report.students), withheld, rounds, *apart, *receipts]


def stands_in(token: str, numbers: list[float]) -> bool:
    """True where ``token`` is one of ``numbers`` rounded to the token's decimals."""
    value, decimals = float(token), len(token.partition(".")[2].partition("e")[0])
    if "e" in token:
        return any(abs(value - number) <= 0.05 * abs(number) for number in numbers)
    return any(abs(value - number) <= 0.5001 * 10.0**-decimals for number in numbers)


def untraced(report: RunReport) -> list[str]:
    """Number tokens in the visible text that neither report.json nor the fixed wording explains."""
    value = json.loads(report.to_json())
    text = " ".join(" ".join(Page(render(report)).texts).replace(words.THIN, "").split())
    known = {*strings_in(value), *FIXED_WORDS}
    known |= {text_[:12] for text_ in known if re.fullmatch(r"[0-9a-f]{64}", text_)}
    known |= {words.when(report.run.started), words.when(report.run.finished)}
    for phrase in sorted(known, key=len, reverse=True):
        if re.search(r"\d", phrase):
            text = text.replace(phrase, " ")
    rounded_up = [
        math.ceil(entry.epsilon * 1000) / 1000 for entry in report.privacy.values() if entry.epsilon
    ]
    numbers = [*numbers_in(value), *counts_in(report), *rounded_up]
    tokens = re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", text)
    assert len(tokens) > 100
    return [token for token in tokens if token not in TEMPLATE_NUMBERS and not stands_in(token, numbers)]


@pytest.mark.parametrize("seed", range(4))
def test_every_number_on_the_page_stands_in_the_report(seed: int) -> None:
    rng = np.random.default_rng(seed)

    def changed(cell: BenefitCell) -> BenefitCell:
        value, half = rng.uniform(0.02, 0.98), rng.uniform(0.0, 0.02)
        return replace(cell, value=value, ci95=[value - half, value + half])

    report = with_dice(sample_report(pictures=False), changed)
    rounds = [
        replace(record, bytes_up={site: int(rng.integers(1, 10**9)) for site in SITES})
        for record in report.rounds
    ]
    privacy = {
        "harbour": GUARDED,
        "hillside": replace(GUARDED, epsilon=rng.uniform(0.1, 9)),
        "lakeview": GUARDED,
    }
    assert untraced(replace(report, rounds=rounds, privacy=privacy)) == []


def test_a_number_from_nowhere_would_be_found() -> None:
    assert not stands_in("0.777", [0.7764, 12.0])
    assert stands_in("0.776", [0.7764])
    assert stands_in("3e-7", [3.04e-7])


def test_derived_numbers_are_means_sums_and_differences_of_the_report() -> None:
    report = sample_report()
    expected = {"Dotted"}
    cell = {(c.site, c.model, c.tested_on, c.metric): c.value or 0.0 for c in report.benefit}

    def mean(model: str, tested: str, metric: str) -> float:
        return fmean(cell[site, model, tested, metric] for site in SITES)

    for metric, decimals in (("dice", 3), ("nsd", 3), ("hd95", 1)):
        for tested in ("own", "all"):
            for model in dict.fromkeys(entry.model for entry in report.benefit):
                expected.add(f"{mean(model, tested, metric):.{decimals}f}")
    for tested in ("own", "all"):
        gains = [cell[s, "student", tested, "dice"] - cell[s, "local_only", tested, "dice"] for s in SITES]
        gains += [fmean(gains), mean("student", tested, "dice") - mean("teacher", tested, "dice")]
        gains.append(mean("personal_teacher", tested, "dice") - mean("teacher", tested, "dice"))
        expected |= {f"{gain:+.3f}".replace("-", "−") for gain in gains}
    for record in report.rounds:
        expected.add(words.size(fmean(record.bytes_up.values())) + " up")
        expected.add(words.size(fmean(record.bytes_down.values())) + " down")
    adapt = [n for record in report.rounds if record.stage == "adapt" for n in record.bytes_up.values()]
    expected.add(words.size(fmean(adapt)))
    expected.add(words.size(sum(sum(r.bytes_up.values()) for r in report.rounds) / len(SITES)))
    for site in SITES:
        expected.add(words.size(sum(entry.bytes for entry in report.egress if entry.site == site)))
    for site in SITES:
        training = [record for record in report.rounds if record.stage in ("adapt", "generator")]
        used = sum(site in record.sites for record in training)
        expected |= {str(len(training)), str(used), f"{used / len(training):.0%}"}
    found = Page(render(report)).derived
    assert set(found) <= expected
    assert "+0.105" in found  # fmean of 0.836-0.742, 0.841-0.761, 0.829-0.688


def test_every_receipt_round_and_digest_is_on_the_page() -> None:
    report = sample_report()
    html = render(report)
    for entry in report.egress:
        assert f"title='{entry.sha256}'" in html
        assert words.count(entry.bytes) in html
    for record in report.rounds:
        for amount in (*record.bytes_up.values(), *record.bytes_down.values()):
            assert words.count(amount) in html
    assert report.run.config_sha256 in html
    assert report.teacher.adapter_sha256 in html
    assert "wardround simulate demo --engine loopback run.seed=17" in html


@settings(deadline=None)
@given(st.floats(1e-6, 1e6))
def test_an_epsilon_is_never_stated_smaller_than_it_is(value: float) -> None:
    assert value <= float(words.epsilon(value)) <= value + 0.0011


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_204, "1.20 kB"),
        (18_412, "18.4 kB"),
        (813_377, "813 kB"),
        (999_700, "1.00 MB"),
        (1_528_117, "1.53 MB"),
        (2_871_330_000, "2.87 GB"),
        (3e15, "3000 TB"),
    ],
)
def test_sizes_have_three_figures(amount: float, text: str) -> None:
    assert words.size(amount).replace(words.THIN, " ") == text


def test_signed_numbers_have_a_true_minus_and_zero_has_no_sign() -> None:
    assert [wording.signed(value) for value in (0.0621, -0.0104, -0.0001)] == ["+0.062", "−0.010", "0.000"]


# --- no gain is claimed where intervals overlap ---------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_gain_is_claimed_only_where_every_interval_is_apart(data: st.DataObject) -> None:
    def changed(cell: BenefitCell) -> BenefitCell:
        if cell.model not in ("student", "local_only") or cell.tested_on != "all":
            return cell
        value = data.draw(st.sampled_from([0.5, 0.6, 0.7]))
        half = data.draw(st.sampled_from([0.04, 0.05, 0.06]))
        return replace(cell, value=value, ci95=[value - half, value + half])

    report = with_dice(sample_report(pictures=False), changed)
    interval = {(c.site, c.model): c.ci95 or [] for c in matrix_cells(report)}
    apart = all(interval[site, "student"][0] > interval[site, "local_only"][1] for site in SITES)
    sentence = reading(report)[0]
    assert ("gained" in sentence) is apart
    overlapping = [
        site
        for site in SITES
        if interval[site, "student"][0] <= interval[site, "local_only"][1]
        and interval[site, "local_only"][0] <= interval[site, "student"][1]
    ]
    claim = sentence.partition("so no difference is claimed, at")[2].partition("</span>).")[0]
    assert all(site in claim for site in overlapping)


def matrix_cells(report: RunReport) -> list[BenefitCell]:
    matrix = matrix_of(report, "dice", "all")
    assert matrix is not None
    return [cell for row in matrix.rows for cell in row.cells if cell is not None]


def test_a_loss_is_named_with_its_site() -> None:
    def changed(cell: BenefitCell) -> BenefitCell:
        lower = cell.site == "hillside" and cell.model == "student" and cell.tested_on == "own"
        return replace(cell, value=0.6, ci95=[0.58, 0.62]) if lower else cell

    text = visible(with_dice(sample_report(), changed))
    assert "The student is lower with the intervals apart at hillside (−0.232)." in text
    assert "Lower with intervals apart at 1." in text


def test_without_a_baseline_nothing_is_compared() -> None:
    report = sample_report()
    report = replace(report, benefit=[cell for cell in report.benefit if cell.model != "local_only"])
    text = visible(report)
    assert "No site has both a student and a local_only result." in text
    assert "gained" not in text


def test_one_run_is_called_one_seed() -> None:
    assert "This is one run with one seed (17)" in visible(sample_report())


def test_the_best_of_a_row_is_the_highest_dice_and_the_lowest_hd95() -> None:
    report = sample_report()
    for metric, best in (("dice", max), ("nsd", max), ("hd95", min)):
        matrix = matrix_of(report, metric, "all")
        assert matrix is not None
        for row in matrix.rows:
            marked = [cell.value for cell in row.cells if cell and row.marked(cell)]
            assert marked == [best(cell.value for cell in row.cells if cell and cell.value is not None)]
