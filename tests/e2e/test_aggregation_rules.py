"""Rules that train one factor at a time, through the whole walk with real sites."""

from __future__ import annotations

from pathlib import Path

import pytest

import client.rounds
from common.adapter import Adapter
from common.names import FIXED_A_RULES
from common.plan import Stage
from server.report.schema import RoundRecord
from tests.e2e import walks

pytestmark = pytest.mark.usefixtures("elsewhere")
SETTINGS = (
    "baselines=[local_only,local_only_scratch]",
    "generator.scope=none",
    "student.steps=2",
    "teacher.steps=4",
)
EXACT = (*SETTINGS, "aggregation.wire_dtype=float32")


def teacher_rounds(run: str) -> list[RoundRecord]:
    return [record for record in walks.report_of(Path(run)).rounds if record.stage == "adapt"]


@pytest.mark.parametrize("rule", FIXED_A_RULES)
def test_a_rule_that_keeps_a_fixed_sends_no_a_and_is_exact(rule: str) -> None:
    result = walks.invoke(
        "simulate", "smoke", f"aggregation.rule={rule}", "teacher.adapter=dp", *EXACT, "--out", "run"
    )
    assert result.exit_code == 0, result.output
    rounds = teacher_rounds("run")
    assert all(record.residual is not None and record.residual < 1e-6 for record in rounds)
    base = walks.invoke("simulate", "smoke", "teacher.adapter=lite", *EXACT, "--out", "both")
    assert base.exit_code == 0, base.output
    whole = teacher_rounds("both")[0]
    for site, sent in rounds[0].bytes_up.items():
        assert sent < whole.bytes_up[site] - 4 * 4000, "half of the factors stays at home"


@pytest.mark.parametrize("rule", FIXED_A_RULES)
def test_it_refuses_a_preset_that_trains_a(rule: str) -> None:
    result = walks.invoke("simulate", "smoke", f"aggregation.rule={rule}", "--out", "run")
    assert result.exit_code == 10, result.output
    assert "base" in result.output
    assert "dp" in result.output
    assert not Path("run").exists()


def test_rolora_sends_b_and_a_in_turn_and_is_exact() -> None:
    """Three rounds with a resume in the second: B, A, B, each with the bytes of its half and the decoder."""
    command = ("simulate", "smoke", "aggregation.rule=rolora", "run.rounds=3", *EXACT)
    whole = walks.invoke(*command, "--out", "run")
    assert whole.exit_code == 0, whole.output
    rounds = teacher_rounds("run")
    assert all(record.residual is not None and record.residual < 1e-6 for record in rounds)
    adapter = Adapter.load(Path("run/teacher/adapter.safetensors"))
    for site in rounds[0].sites:
        receipts = [line for line in walks.receipts_of(Path("run"), site) if line["name"] == "adapt.adapter"]
        for receipt, left_out in zip(receipts, ("lora_A", "lora_B", "lora_A"), strict=True):
            kept = [tensor for name, tensor in adapter.tensors.items() if not name.endswith(left_out)]
            assert receipt["bytes"] == sum(tensor.nbytes for tensor in kept)
    with pytest.MonkeyPatch.context() as patch:
        real = walks.raising(KeyboardInterrupt(), client.rounds.adapt, 3)  # the first site in round 2
        patch.setattr(client.rounds, "adapt", real)
        assert walks.invoke(*command, "--out", "struck").exit_code == 130
    assert walks.finished_rounds(Path("struck"))[-1] == (Stage.adapt, 0)
    assert walks.invoke(*command, "--out", "struck", "--resume").exit_code == 0
    assert walks.digests(Path("struck")) == walks.digests(Path("run"))


def test_rolora_refuses_a_preset_that_keeps_a_fixed() -> None:
    rolora = ("aggregation.rule=rolora", "teacher.adapter=dp")
    result = walks.invoke("simulate", "smoke", *rolora, "--out", "run")
    assert result.exit_code == 10, result.output
    assert "preset lite, base" in result.output
    assert not Path("run").exists()
