"""The report page: made from report.json alone, honest about numbers, intervals and privacy."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ArtefactError
from server.report import charts, rebuild, wording
from server.report.comparison import Verdict, compare, matrix_of
from server.report.page import render
from server.report.reading import reading
from server.report.schema import (
    BenefitCell,
    PrivacyEntry,
    PrivacyStage,
    Rejection,
    RunReport,
    SyntheticEntry,
    TeacherEntry,
)
from tests.report_sample import SITES, sample_report

VOID = {"meta", "input", "br", "img"}
TEMPLATE_NUMBERS = {"95", "0", "1", "5"}  # "95 % interval", "numbered from 0", and the glossary's scales
FIXED_WORDS = ("SHA-256", "HD95", "NSD", "utf-8")


class Page(HTMLParser):
    """A page as its elements and its visible text; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.derived: list[str] = []
        self.texts: list[str] = []
        self._open: list[tuple[str, set[str]]] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self._open.append((tag, set(attributes.get("class", "").split())))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        classes = set().union(*(each for _, each in self._open))
        if any(tag == "style" for tag, _ in self._open):
            return
        if classes & {"derived", "derived-label"}:
            self.derived.append(data)
        elif "tick" not in classes:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def visible(report: RunReport) -> str:
    """All visible text, derived numbers included, on one line."""
    html = re.sub(r"<style>.*?</style>", "", render(report), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", "", html).split())


def saved(report: RunReport, folder: Path) -> Path:
    (folder / "report.json").write_text(report.to_json())
    return folder


def with_dice(report: RunReport, change: Callable[[BenefitCell], BenefitCell]) -> RunReport:
    return replace(report, benefit=[change(c) if c.metric == "dice" else c for c in report.benefit])


# --- one file, from report.json alone ------------------------------------------------------------------


def test_the_page_is_byte_identical_when_rebuilt(tmp_path: Path) -> None:
    first = rebuild(saved(sample_report(), tmp_path))
    before = first.read_bytes()
    assert rebuild(tmp_path).read_bytes() == before
    assert first == tmp_path / "report.html"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_the_page_needs_no_network_and_no_script() -> None:
    html = render(sample_report())
    page = Page(html)
    assert not re.search(r"https?://|<script|<link|<iframe|@import|url\(|\son\w+=", html)
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert all(link["href"].startswith("#") for link in page.all("a"))
    policy = next(meta for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_a_missing_report_is_an_artefact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"report\.json is missing"):
        rebuild(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "benefit": 3}'])
def test_an_unreadable_report_is_an_artefact_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ArtefactError, match="not a report of this version"):
        rebuild(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_every_wrong_type_is_listed_at_once(tmp_path: Path) -> None:
    value = json.loads(sample_report().to_json())
    value["run"]["wall_s"] = "long"
    value["run"]["seed"] = True
    value["benefit"][0]["value"] = float("nan")
    value["rounds"][1]["bytes_up"]["harbour"] = 1.5
    (tmp_path / "report.json").write_text(json.dumps(value))
    with pytest.raises(ArtefactError) as caught:
        rebuild(tmp_path)
    text = "\n".join(caught.value.faults)
    for where in ("run.wall_s", "run.seed", "benefit[0].value", "rounds[1].bytes_up['harbour']"):
        assert f"report.{where}:" in text
    assert len(caught.value.faults) == 4


def test_every_inconsistency_is_listed_at_once(tmp_path: Path) -> None:
    report = sample_report()
    cells = report.benefit
    bad = replace(
        report,
        benefit=[
            replace(cells[0], ci95=[0.9, 0.1]),
            replace(cells[1], tested_on="some"),
            *cells[2:],
            cells[2],
        ],
        pictures=[replace(report.pictures[0], png="bm8gcG5n")],
        privacy={"nowhere": PrivacyEntry()},
    )
    with pytest.raises(ArtefactError) as caught:
        rebuild(saved(bad, tmp_path))
    text = "\n".join(caught.value.faults)
    for part in ("is no interval", "tested_on is 'some'", "stands there 2 times", "no PNG", "privacy: names"):
        assert part in text


# --- privacy --------------------------------------------------------------------------------------------

GUARDED = PrivacyEntry(
    unit="patient",
    guarantee=True,
    epsilon=3.16049,
    delta=1e-5,
    neighbouring="add or remove one patient",
    sampling="Poisson sampling",
    stages=[PrivacyStage("adapt", "dp_sgd", 1.13, 0.25, 120, 3.16049)],
    ledger_head="ab" * 32,
)


def test_no_guarantee_is_said_plainly() -> None:
    text = visible(sample_report())
    assert "Privacy: NO GUARANTEE Nothing here bounds what the sent numbers say about one patient." in text
    assert "harbour, hillside and lakeview: NO GUARANTEE for any one patient." in text
    assert text.index("NO GUARANTEE") < text.index("What each hospital gains or loses")


def test_a_guarantee_is_stated_with_its_numbers_and_without_the_warning() -> None:
    text = visible(replace(sample_report(), privacy=dict.fromkeys(SITES, GUARDED)))
    assert "NO GUARANTEE" not in text
    assert "by at most ε = 3.161 at δ = 1e-5 (add or remove one patient, Poisson sampling)" in text


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (PrivacyEntry(), "hillside: NO GUARANTEE for any one patient."),
        (replace(GUARDED, epsilon=None), "hillside: NO GUARANTEE; one is recorded, but without its epsilon"),
        (replace(GUARDED, delta=None), "hillside: NO GUARANTEE; one is recorded, but without its epsilon"),
        (None, "hillside: NO GUARANTEE; the run recorded no privacy state."),
    ],
)
def test_one_site_without_a_guarantee_is_named(entry: PrivacyEntry | None, words: str) -> None:
    privacy = dict.fromkeys(SITES, GUARDED)
    privacy.pop("hillside")
    if entry is not None:
        privacy["hillside"] = entry
    text = visible(replace(sample_report(), privacy=privacy))
    assert "Privacy: NO GUARANTEE at hillside" in text
    assert words in text
    assert "harbour: for any one patient" in text or "harbour and lakeview: for any one patient" in text


@pytest.mark.parametrize("enforced", [True, False])
def test_a_simulation_says_policy_advisory_not_enforced(enforced: bool) -> None:
    report = sample_report()
    text = visible(replace(report, run=replace(report.run, enforced=enforced))).lower()
    assert ("policy advisory, not enforced" in text) is not enforced


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
    text = " ".join(" ".join(Page(render(report)).texts).replace(wording.THIN, "").split())
    known = {*strings_in(value), *FIXED_WORDS}
    known |= {text_[:12] for text_ in known if re.fullmatch(r"[0-9a-f]{64}", text_)}
    known |= {wording.when(report.run.started), wording.when(report.run.finished)}
    for words in sorted(known, key=len, reverse=True):
        if re.search(r"\d", words):
            text = text.replace(words, " ")
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
            for model in wording.MODELS:
                expected.add(f"{mean(model, tested, metric):.{decimals}f}")
    for tested in ("own", "all"):
        gains = [cell[s, "student", tested, "dice"] - cell[s, "local_only", tested, "dice"] for s in SITES]
        gains += [fmean(gains), mean("student", tested, "dice") - mean("teacher", tested, "dice")]
        expected |= {f"{gain:+.3f}".replace("-", "−") for gain in gains}
    for record in report.rounds:
        expected.add(wording.size(fmean(record.bytes_up.values())) + " up")
        expected.add(wording.size(fmean(record.bytes_down.values())) + " down")
    adapt = [n for record in report.rounds if record.stage == "adapt" for n in record.bytes_up.values()]
    expected.add(wording.size(fmean(adapt)))
    expected.add(wording.size(sum(sum(r.bytes_up.values()) for r in report.rounds) / len(SITES)))
    for site in SITES:
        expected.add(wording.size(sum(entry.bytes for entry in report.egress if entry.site == site)))
    found = Page(render(report)).derived
    assert set(found) <= expected
    assert "+0.105" in found  # fmean of 0.836-0.742, 0.841-0.761, 0.829-0.688


def test_every_receipt_round_and_digest_is_on_the_page() -> None:
    report = sample_report()
    html = render(report)
    for entry in report.egress:
        assert f"title='{entry.sha256}'" in html
        assert wording.count(entry.bytes) in html
    for record in report.rounds:
        for amount in (*record.bytes_up.values(), *record.bytes_down.values()):
            assert wording.count(amount) in html
    assert report.run.config_sha256 in html
    assert report.teacher.adapter_sha256 in html
    assert "wardround simulate demo --engine loopback run.seed=17" in html


@given(st.floats(1e-6, 1e6))
def test_an_epsilon_is_never_stated_smaller_than_it_is(value: float) -> None:
    assert value <= float(wording.epsilon(value)) <= value + 0.0011


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
    assert wording.size(amount).replace(wording.THIN, " ") == text


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


# --- odd reports ----------------------------------------------------------------------------------------


def test_a_suppressed_cell_says_why_and_leaves_the_means() -> None:
    def hidden(cell: BenefitCell) -> BenefitCell:
        if cell.site == "lakeview" and cell.tested_on == "own":
            return replace(cell, value=None, ci95=None, patients=3, reason="fewer than 5 patients")
        return cell

    report = with_dice(sample_report(), hidden)
    matrix = matrix_of(report, "dice", "own")
    assert matrix is not None
    assert matrix.over == "2 sites"
    text = visible(report)
    assert "withheldfewer than 5 patients" in text
    assert "5 cells of the benefit tables have no value" in text


def test_a_report_with_nothing_in_its_lists_still_makes_a_page() -> None:
    report = sample_report()
    bare = replace(
        report,
        sites=[],
        teacher=TeacherEntry("none", 0, 0, "", ""),
        rounds=[],
        benefit=[],
        students={},
        synthetic={},
        privacy={},
        egress=[],
        pictures=[],
    )
    text = Page(render(bare)).text
    for words in (
        "NO GUARANTEE",
        "No Dice was recorded.",
        "No training loss was recorded.",
        "This report holds no picture.",
        "No synthetic image was made.",
        "No message was recorded.",
        "No receipt was recorded.",
        "No update was rejected",
        "no student was made",
    ):
        assert words in text


def test_values_that_may_be_none_are_shown_as_absent() -> None:
    report = sample_report()
    rounds = [replace(record, residual=None, losses={}, bytes_up={}) for record in report.rounds]
    benefit = [replace(cell, ci95=None) for cell in report.benefit]
    text = Page(render(replace(report, rounds=rounds, benefit=benefit, students={}))).text
    assert "None" not in text.replace("None. No update was rejected", "")
    assert "no interval" in text
    assert "No adapter round sent anything." in text
    assert "An interval is missing, so no difference is claimed" in text
    assert "not tested" in text


def test_a_copy_test_is_shown_where_one_was_run() -> None:
    tested = {site: SyntheticEntry(120, 90, 20, 10, 0.0833) for site in SITES}
    text = visible(replace(sample_report(), synthetic=tested))
    assert "0.083" in text
    assert "not tested" not in text


def test_rejections_are_listed_with_site_round_and_reason() -> None:
    report = sample_report()
    rejected = [Rejection("hillside", "not finite: adapter.3.lora_A")]
    rounds = [replace(r, rejected=rejected if r.index == 2 else []) for r in report.rounds]
    text = Page(render(replace(report, rounds=rounds))).text
    assert "adapter 2 hillside not finite: adapter.3.lora_A" in text
    assert "No update was rejected" not in text


EVIL = "<img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}"


def test_names_from_the_report_are_escaped_everywhere(tmp_path: Path) -> None:
    text = sample_report().to_json()
    for plain in (
        "harbour",
        "lesion",
        "demo",
        "adapter update",
        "none",
        "unet-xs",
        "Two test patients.",
        "truth",
    ):
        text = text.replace(json.dumps(plain)[1:-1], json.dumps(f"{plain}{EVIL}")[1:-1])
    (tmp_path / "report.json").write_text(text)
    page = Page(rebuild(tmp_path).read_text())
    assert all("onerror" not in image for image in page.all("img"))
    assert f"harbour{EVIL}" in "".join(page.texts)
    assert len(page.all("img")) == 6


def test_long_lists_of_sites_are_counted_and_losses_still_named() -> None:
    report = sample_report(pictures=False)
    names = [f"site-{number:02d}" for number in range(12)]
    cells = [
        BenefitCell(name, model, "all", "dice", "lesion", value, [value - 0.02, value + 0.02], 40)
        for number, name in enumerate(names)
        for model, value in (("local_only", 0.7), ("student", 0.6 if number == 7 else 0.71))
    ]
    sites = [replace(report.sites[0], id=name) for name in names]
    wide = replace(
        report, sites=sites, benefit=cells, rounds=[], students={}, synthetic={}, privacy={}, egress=[]
    )
    sentence = re.sub(r"<[^>]*>", "", reading(wide)[0])
    assert "no difference is claimed, at 11 of 12 sites." in sentence
    assert "lower with the intervals apart at site-07 (−0.100)." in sentence


# --- reading it -----------------------------------------------------------------------------------------


def test_sections_stand_in_the_readers_order() -> None:
    ids = [attributes["id"] for _, attributes in Page(render(sample_report())).elements if "id" in attributes]
    assert ids == [
        "top", "privacy", "privacy-title", "benefit", "curves", "pictures", "models", "synthetic", "bytes",
        "drops", "reproduce", "glossary",
    ]  # fmt: skip


def test_pictures_headers_and_charts_have_their_texts() -> None:
    report = sample_report()
    page = Page(render(report))
    for image, picture in zip(page.all("img"), report.pictures, strict=True):
        assert image["src"].endswith(picture.png)
        assert picture.caption in image["alt"]
        assert all(name in image["alt"] for name in picture.columns)
    assert all(header.get("scope") in ("row", "col") for header in page.all("th"))
    for chart in page.all("svg"):
        assert chart.get("aria-hidden") == "true" or (chart["role"] == "img" and chart["aria-label"])
    assert all(box["aria-label"] for box in page.all("input"))
    assert all(region["aria-label"] for region in page.all("div") if region.get("role") == "region")


def colours() -> dict[str, dict[str, str]]:
    css = (Path(charts.__file__).parent / "style.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in blocks)
    assert light.keys() == dark.keys()
    return {"light": light, "dark": dark}


def luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG 2.2 contrast ratio."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast_in_both_schemes(scheme: str) -> None:
    palette = colours()[scheme]
    for ink in ("ink", "muted", "accent"):
        for paper in ("paper", "card", "tint", "warn-paper"):
            assert contrast(palette[ink], palette[paper]) >= 4.5, (ink, paper)
    assert contrast(palette["warn-ink"], palette["warn-paper"]) >= 4.5
    assert contrast(palette["warn-ink"], palette["card"]) >= 4.5
    for number in range(charts.COLOURS):  # marks need 3, the names beside curves 4.5
        assert contrast(palette[f"series-{number}"], palette["card"]) >= 4.3, number


def test_every_series_differs_in_shape_and_not_in_colour_alone() -> None:
    outlines = {
        re.sub(r'cx="[^"]*"', "", charts.marker(shape, 50.0, 50.0)) for shape in range(charts.COLOURS)
    }
    assert len(outlines) == charts.COLOURS == len(set(charts.DASHES))
    assert sorted(charts.SLOTS) == sorted(wording.MODELS)
    assert len(set(charts.SLOTS.values())) == len(charts.SLOTS)


# --- charts ---------------------------------------------------------------------------------------------


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_round_and_inside(low: float, length: float) -> None:
    high = low + length
    if high <= low:
        return
    found = charts.ticks(low, high)
    assert len(found) <= 7
    assert all(low - 1e-6 * length - 1e-9 <= tick <= high + 1e-6 * length + 1e-9 for tick in found)


@given(st.lists(st.lists(st.floats(0, 50), min_size=0, max_size=5), min_size=1, max_size=9))
def test_curves_stay_inside_their_frame(losses: list[list[float]]) -> None:
    series = {f"site-{number}": [(0, values), (2, values)] for number, values in enumerate(losses)}
    svg = str(charts.curves(series, "losses"))
    height = float(re.search(r'viewBox="0 0 460 (\d+)"', svg)[1])  # type: ignore[index]
    for points in re.findall(r'points="([^"]*)"', svg):
        for pair in points.split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= charts.WIDTH
            assert 0 <= y <= height
    assert all(0 <= float(y) <= height for y in re.findall(r'<text x="[^"]*" y="([^"]*)"', svg))


def test_dots_and_intervals_lie_at_their_values() -> None:
    svg = str(charts.dot_chart([("A", [charts.Dot("student", 0.5, [0.25, 0.75])])], (0.0, 1.0), "one dot"))
    whisker = re.search(r'<line x1="([\d.]+)" x2="([\d.]+)"[^>]*class="whisker"', svg)
    dot = re.search(r'<circle cx="([\d.]+)"', svg)
    assert whisker is not None
    assert dot is not None
    left, right, middle = float(whisker[1]), float(whisker[2]), float(dot[1])
    assert middle == pytest.approx((left + right) / 2, abs=0.1)
    scale = charts.Scale(0.0, 1.0, 176.0, 448.0)
    assert [left, middle, right] == pytest.approx([scale.at(0.25), scale.at(0.5), scale.at(0.75)], abs=0.1)


def test_a_withheld_dot_is_said_in_words() -> None:
    assert ">withheld<" in charts.dot_chart([("A", [charts.Dot("student", None, None)])], (0.0, 1.0), "none")
