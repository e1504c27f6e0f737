"""A private run that paints in every site's noised style, by the command, stopped and gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.privacy.accounting import epsilon
from common.privacy.bundle import read_bundle
from common.privacy.entries import EntryType
from common.privacy.events import gathered
from common.privacy.journal import read_lines
from tests.e2e import walks
from tests.e2e.test_interrupted import stop_in

WHOLE, EACH, DELTA = 6.0, 1.5, 1e-5
STYLED = (
    "teacher.adapter=decoder", f"privacy.epsilon={WHOLE}", "privacy.steps=2", f"privacy.style_epsilon={EACH}",
    "privacy.release_metrics=false", "generator.scope=style", "generator.keep_dice=0", walks.QUICK,
)  # fmt: skip


def test_a_private_run_in_noised_styles_keeps_its_epsilon_over_a_crash(elsewhere: Path) -> None:
    command = ["simulate", "smoke", "--out", "run", *STYLED]
    struck = stop_in("client.guard:noised_style", 2, *command)  # the second site, before its summary is kept
    assert struck.exit_code == 130, struck.output
    assert walks.finished_rounds(Path("run"))[-1] == ("adapt", 1)
    done = walks.invoke(*command, "--resume")
    assert done.exit_code == 0, done.output

    report = walks.report_of(elsewhere / "run")
    assert {entry.mechanism for entry in report.egress} == {"dp_sgd", "gaussian", "public"}
    for site in ("east", "west"):
        folder = elsewhere / "run" / "sites" / site
        booked = [e for e in read_lines((folder / "ledger.jsonl").read_bytes()) if e.spent()]
        assert [e.stage for e in booked] == ["adapt", "adapt", "style"], "nothing was paid twice"
        assert all(entry.type is EntryType.reserve for entry in booked)
        joint = epsilon(gathered(event for entry in booked for event in entry.spent()), DELTA)
        assert 0.95 * WHOLE <= joint <= WHOLE
        assert report.privacy[site].epsilon == pytest.approx(joint, abs=2e-6)
        styles = [line for line in walks.receipts_of(Path("run"), site) if line["name"] == "style"]
        assert len({line["sha256"] for line in styles}) == 1
        made = json.loads((folder / "synthetic" / "provenance.json").read_text())
        assert made["images"] == 2, "the student had images in the styles of all sites"
        assert "ledger.jsonl" in read_bundle(folder)
        assert walks.invoke("privacy", "verify", "--bundle", f"run/sites/{site}").exit_code == 0
    lines = [line for site in ("east", "west") for line in walks.receipts_of(Path("run"), site)]
    sent = sum(line["name"] == "style" for line in lines)
    assert sent == 3, "one site was asked again, and sent what it had sent"
    page = (elsewhere / "run" / "report.html").read_text()
    assert "NO GUARANTEE" not in page
    assert "gaussian" in page
