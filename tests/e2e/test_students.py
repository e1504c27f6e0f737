"""Students of several kinds in one run, from starts of their own; the site's word beats the recipe's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.walks import fault_lines, invoke, report_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("students") / "run"
    done = invoke(
        "simulate", "smoke", "--out", folder, "run.rounds=1", "student.name=vit-tiny", "student.steps=1",
        "student.pretraining_steps=1", "sites.east.student=mobile", "generator.scope=none",
        "baselines=[local_only,local_only_scratch,local_only_mae,local_only_moco]",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder


def test_each_site_has_the_student_that_it_chose(run: Path) -> None:
    report = report_of(run)
    assert {site: one.name for site, one in report.students.items()} == {"east": "mobile", "west": "vit-tiny"}
    cards = {
        site: json.loads((run / "sites" / site / "student.json").read_text()) for site in report.students
    }
    for site, card in cards.items():
        entry = report.students[site]
        assert (entry.name, entry.params, entry.sha256) == (card["name"], card["params"], card["sha256"])
        assert entry.start == card["start"]
    assert report.students["west"].start == "mae", "what ships no weights starts from the site's own images"


def test_the_page_says_what_a_student_started_from(run: Path) -> None:
    assert "vit-tiny, from MAE on its own images" in (run / "report.html").read_text()


def test_baselines_differ_by_their_start(run: Path) -> None:
    """And one that asks for the start that the student has anyway is the same model."""
    cards = {
        path.stem: json.loads(path.read_text()) for path in (run / "sites/west/baselines").glob("*.json")
    }
    starts = {name: card["start"] for name, card in cards.items()}
    assert starts == {
        "local_only": "mae",
        "local_only_mae": "mae",
        "local_only_scratch": "random",
        "local_only_moco": "moco",
    }
    assert cards["local_only"]["sha256"] == cards["local_only_mae"]["sha256"]
    assert len({card["sha256"] for card in cards.values()}) == 3
    measured = {cell.model for cell in report_of(run).benefit}
    assert {"local_only_mae", "local_only_moco", "student"} <= measured


def test_nothing_of_a_start_leaves_a_site(run: Path) -> None:
    """What went out of the student's stage is the note: as many payloads as sites, all of them small."""
    notes = [entry for entry in report_of(run).egress if entry.name == "note"]
    assert len(notes) == 2
    assert all(entry.bytes < 1000 for entry in notes)


def test_shipped_weights_that_there_are_none_of_are_refused_at_the_door(tmp_path: Path) -> None:
    done = invoke(
        "simulate", "smoke", "--out", tmp_path / "run", "student.start=shipped", "sites.west.student=vit-tiny"
    )
    assert done.exit_code == 10
    (line,) = fault_lines(done.output)
    assert "sites[1].student: vit-tiny ships no weights to start from; set student.start=mae" in line
    assert not (tmp_path / "run").exists()
