"""The study of aggregation rules: its cells are real runs, and differ in nothing but the rule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import simulations.benchmark.aggregation as study
from common.config import load_recipe
from common.errors import UsageError
from common.names import MIXED_RANK_RULES
from common.recipe import TeacherConfig
from server.report.schema import RunReport
from simulations.benchmark.aggregation import ALL, MIXED, ONE, Cell, CellFile, Row, compare, rows_of, table
from simulations.benchmark.pool import Pool
from simulations.results import site_mean
from simulations.simulate import simulate

SETTINGS = (
    "evaluation.overlap=0",
    "generator.scope=none",
    "baselines=[]",
    "student.steps=1",
    "run.rounds=2",
)
REFERENCE = Row("exact_split", "base", (8,))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return Pool.prepare(load_recipe("smoke", SETTINGS), tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def reference(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Cell:
    return study.measure(pool, REFERENCE, tmp_path_factory.mktemp("reference"))


def cells_of(path: Path | None, rows: Sequence[Row], settings: Sequence[str] = SETTINGS) -> list[Cell]:
    return compare([0], rows, CellFile(path, "smoke", settings))


def test_a_cell_is_the_teacher_that_simulate_makes(pool: Pool, reference: Cell, tmp_path: Path) -> None:
    report = RunReport.load(simulate(load_recipe("smoke", SETTINGS), tmp_path, resume=False) / "report.json")
    assert reference.dice["all"] == pytest.approx(site_mean(report, "teacher", "all"), abs=1e-12)
    rounds = [record for record in report.rounds if record.stage == "adapt"]
    assert reference.residuals == [record.residual for record in rounds], "equal to the bit: the same rounds"
    up = [sum(record.bytes_up.values()) / len(record.bytes_up) for record in rounds]
    assert reference.bytes_up == pytest.approx(up, abs=4)
    assert reference.lowest is None


def test_mixed_ranks_send_less_up_and_a_lower_rank_is_tested_apart(
    pool: Pool, reference: Cell, tmp_path: Path
) -> None:
    mixed = study.measure(pool, Row("hetlora", "base", (2, 8)), tmp_path)
    half = 2 * 6000  # half of the sites send a quarter of the factors
    assert mixed.bytes_up[0] < reference.bytes_up[0] - half
    assert mixed.lowest is not None


def test_every_row_has_its_reference_before_it() -> None:
    rows = rows_of(["fedit", "ffa", "hetlora"], "both", TeacherConfig(), central=True)
    assert [str(row) for row in rows] == [
        "exact_split, base, rank 8",
        f"{ONE}, base, rank 8",
        f"{ALL}, base, rank 8",
        "fedit, base, rank 8",
        "exact_split, dp, rank 4",
        "ffa, dp, rank 4",
        "hetlora, base, rank 8",
        "exact_split, base, rank 2/4/8",
        "hetlora, base, rank 2/4/8",
    ]


def test_mixed_ranks_are_for_the_rules_that_take_them() -> None:
    rows = rows_of(study.AGGREGATION_RULES, "mixed", TeacherConfig(), central=False)
    assert {row.rule for row in rows} == set(MIXED_RANK_RULES)
    assert {row.ranks for row in rows} == {MIXED}


def test_a_rule_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match="no rule fedavg"):
        rows_of(["fedavg"], "equal", TeacherConfig(), central=False)


def test_the_pooled_teacher_makes_the_steps_that_its_row_says(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, int]] = []

    def noted(teacher: Any, adapter: Any, patients: Any, plan: Any, *rest: Any) -> Any:
        made.append((plan.teacher.steps, len(patients)))
        return real(teacher, adapter, patients, plan, *rest)

    real = study.adapt
    monkeypatch.setattr(study, "adapt", noted)
    for rule in (ONE, ALL):
        cell = study.measure(pool, Row(rule, "base", (8,)), tmp_path)
        assert 0 < cell.dice["all"] <= 1
    assert made == [(4, 6), (8, 6)], "two rounds of two steps, alone or at both sites; three patients each"


def test_what_the_file_holds_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rows = tmp_path / "cells.json", [Row(ONE, "base", (8,))]
    first = cells_of(path, rows)
    monkeypatch.setattr(study, "measure", lambda *_: pytest.fail("measured again"))
    assert cells_of(path, rows) == first
    with pytest.raises(UsageError, match="other settings"):
        cells_of(path, rows, [*SETTINGS, "teacher.steps=3"])


def test_the_table_compares_seed_by_seed() -> None:
    def cell(rule: str, seed: int, dice: float) -> Cell:
        row = Row(rule, "base", (8,))
        return Cell(row, seed, {"all": dice}, 1.0, None, [0.5, 0.25], [100.0, 100.0], [10.0, 20.0])

    found = [cell("exact_split", 0, 0.8), cell("exact_split", 1, 0.6), cell("fedit", 0, 0.79)]
    lines = table([*found, cell("fedit", 1, 0.63)]).splitlines()
    assert lines[2] == (
        "| exact_split | base, rank 8 | 0.700 (0.800 0.600) | - | - | 3.8e-01, 2.5e-01 | 100 | 10 to 20 | 1 |"
    )
    assert "| 0.710 (0.790 0.630) | 0.0100 (-0.0100 0.0300) |" in lines[3]
