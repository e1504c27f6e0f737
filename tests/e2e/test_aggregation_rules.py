"""Rules that keep the factor A fixed, through the whole walk with real sites."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.recipe import FIXED_A_RULES
from tests.e2e import walks

pytestmark = pytest.mark.usefixtures("elsewhere")
SETTINGS = (
    "baselines=[local_only,local_only_scratch]",
    "generator.scope=none",
    "student.steps=2",
    "teacher.steps=4",
)
EXACT = (*SETTINGS, "aggregation.wire_dtype=float32")


@pytest.mark.parametrize("rule", FIXED_A_RULES)
def test_a_rule_that_keeps_a_fixed_sends_no_a_and_is_exact(rule: str) -> None:
    result = walks.invoke(
        "simulate", "smoke", f"aggregation.rule={rule}", "teacher.adapter=dp", *EXACT, "--out", "run"
    )
    assert result.exit_code == 0, result.output
    rounds = [record for record in walks.report_of(Path("run")).rounds if record.stage == "adapt"]
    assert all(record.residual is not None and record.residual < 1e-6 for record in rounds)
    base = walks.invoke("simulate", "smoke", "teacher.adapter=lite", *EXACT, "--out", "both")
    assert base.exit_code == 0, base.output
    whole = next(record for record in walks.report_of(Path("both")).rounds if record.stage == "adapt")
    for site, sent in rounds[0].bytes_up.items():
        assert sent < whole.bytes_up[site] - 4 * 4000, "half of the factors stays at home"


@pytest.mark.parametrize("rule", FIXED_A_RULES)
def test_it_refuses_a_preset_that_trains_a(rule: str) -> None:
    result = walks.invoke("simulate", "smoke", f"aggregation.rule={rule}", "--out", "run")
    assert result.exit_code == 10, result.output
    assert "base" in result.output
    assert "dp" in result.output
    assert not Path("run").exists()
