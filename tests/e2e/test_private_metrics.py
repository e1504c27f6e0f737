"""A private run whose metrics leave with noise, by the command: what the sites said, and what is claimed."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.privacy.accounting import epsilon
from common.privacy.events import Event, Mechanism
from tests.e2e import walks

EACH, TESTED = 0.5, 60
NOISED = (
    "teacher.adapter=decoder", "privacy.noise_multiplier=1.2", "privacy.steps=2", "privacy.sample_rate=0.5",
    f"privacy.metric_epsilon={EACH}", f"sites.east.test_patients={TESTED}",
    f"sites.west.test_patients={TESTED}", "generator.scope=none", walks.QUICK,
)  # fmt: skip


def test_a_run_with_noised_metrics_keeps_its_guarantee_and_shows_the_noise(elsewhere: Path) -> None:
    done = walks.invoke("simulate", "smoke", "--out", "run", *NOISED)
    assert done.exit_code == 0, done.output
    report = walks.report_of(elsewhere / "run")
    told = [cell for cell in report.benefit if cell.tested_on == "own"]
    assert {(cell.site, cell.model, cell.metric) for cell in told} == {
        ("east", "teacher", "dice"), ("west", "teacher", "dice"),
    }, "the teacher alone: the students saw patients without noise"  # fmt: skip
    for cell in told:
        assert (cell.patients, cell.ci95) == (TESTED, None)
        assert cell.noise_scale == pytest.approx(1 / (EACH * TESTED))
    numbers = epsilon([Event(1 / EACH, 1.0, 1, Mechanism.laplace)], 1e-5)
    steps = epsilon([Event(1.2, 0.5, 2)], 1e-5)
    for entry in report.privacy.values():
        assert entry.guarantee
        assert entry.epsilon == pytest.approx(max(steps, numbers), abs=2e-6)
        assert {stage.stage: stage.mechanism for stage in entry.stages} == {
            "propose": "public", "adapt": "dp_sgd", "student": "public", "evaluate": "laplace",
        }  # fmt: skip
    assert {entry.mechanism for entry in report.egress} == {"dp_sgd", "public", "laplace"}
    page = (elsewhere / "run" / "report.html").read_text()
    assert "NO GUARANTEE" not in page
    assert page.count("with noise of scale 0.033") == 2
    assert "2 numbers of the benefit tables left a hospital with Laplace noise of scale up to 0.033" in page
    assert walks.invoke("privacy", "verify", "--bundle", "run/sites/east").exit_code == 0
