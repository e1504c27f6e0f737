"""The report page: one file from report.json alone, honest about privacy, readable by anyone."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import ArtefactError
from server.report import rebuild
from server.report.acceptance import acceptance
from server.report.comparison import matrix_of
from server.report.page import render
from server.report.reading import reading
from server.report.schema import (
    BenefitCell,
    PrivacyEntry,
    Rejection,
    RunReport,
    SyntheticEntry,
    TeacherEntry,
)
from tests.report_sample import GUARDED, SITES, Page, sample_report, visible, with_dice


def saved(report: RunReport, folder: Path) -> Path:
    (folder / "report.json").write_text(report.to_json())
    return folder


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
    beside = {f"sites/{site}/privacy.html" for site in SITES}  # files of the run's own folder
    assert all(link["href"].startswith("#") or link["href"] in beside for link in page.all("a"))
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
    assert "6 cells of the benefit tables have no value" in text


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


def test_each_sites_acceptance_rate_is_shown() -> None:
    report = sample_report()
    training = [record for record in report.rounds if record.stage in ("adapt", "generator")]
    silenced = [
        replace(record, sites=[site for site in record.sites if site != "hillside"],
                rejected=[Rejection("hillside", "a change far larger than the others'")])
        for record in training[1:]
    ]  # fmt: skip
    found = {one.site: one for one in acceptance([training[0], *silenced, *report.rounds])}
    twice = len(training) + len(training)
    assert (found["hillside"].asked, found["hillside"].used) == (twice, 1 + len(training))
    others = [one for site, one in found.items() if site != "hillside"]
    assert [one.share for one in others] == [1.0] * len(others)
    one_of_all = replace(report, rounds=[training[0], *silenced])
    assert f"{1 / len(training):.0%}" in Page(render(one_of_all)).derived


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
