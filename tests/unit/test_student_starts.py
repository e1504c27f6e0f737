"""The study of students and starts: its distilled student is the walk's own, its rows are what they say."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from common.canonical import sha256_of_file
from common.config import load_recipe
from common.errors import UsageError
from common.recipe import Start
from simulations.benchmark import student_starts
from simulations.benchmark.aggregation import CellFile
from simulations.benchmark.pool import Pool
from simulations.benchmark.student_starts import Cell, Federation, Row, rows_of, table

SETTINGS = ("run.rounds=1", "student.pretraining_steps=1", "evaluation.overlap=0", "student.steps=1")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    pool = Pool.prepare(load_recipe("smoke", SETTINGS), tmp_path_factory.mktemp("pool"))
    return Federation(pool, tmp_path_factory.mktemp("federation"))


def test_a_distilled_student_is_that_of_the_workshop(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The site's own workshop, on the same teacher and styles, saves the same weights."""
    from client.students import save_student
    from client.workshop import Workshop
    from common.plan import Stage
    from common.precision import unpack

    kept = {}
    real = student_starts.dice_of
    monkeypatch.setattr(student_starts, "dice_of", lambda pool, made: kept.update(made) or real(pool, made))
    cell = federation.measure(Row("unet-xs", Start.shipped, "student"))
    name, room = next(iter(federation.rooms.items()))
    walk = federation.walk
    adapter = unpack(walk.training[Stage.adapt].down(name))
    plan = replace(federation.plan, baselines=[])
    note = Workshop(
        room.site, plan, adapter, walk.outcome.styles, None, room.train, student_starts.FOREVER
    ).run()
    path = tmp_path / "student.safetensors"
    save_student(kept[name], path, "unet-xs", plan.data, {"run_id": "r", "model": "student"})
    assert sha256_of_file(path) == note.sha256
    assert (cell.params, cell.bytes) == (note.params, path.stat().st_size)
    assert cell.start_s == 0
    assert 0 <= cell.dice["worst"] <= cell.dice["own"] <= 1


def test_a_start_is_learned_once_for_both_models(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    import client.starts

    calls = []
    real = client.starts.pretrain
    monkeypatch.setattr(
        client.starts, "pretrain", lambda *given: calls.append(given[2].start) or real(*given)
    )
    both = [federation.measure(Row("mobile", Start.mae, model)) for model in ("student", "local_only")]
    assert calls == [Start.mae] * len(federation.rooms)
    assert both[0].start_s == both[1].start_s > 0
    assert both[0].dice != both[1].dice


def test_rows_are_all_of_them_but_those_without_weights() -> None:
    rows = rows_of(["unet-xs", "vit-tiny"], ["random", "shipped"], ["student", "local_only"])
    assert [str(row) for row in rows] == [
        "unet-xs from random, student", "unet-xs from random, local_only",
        "unet-xs from shipped, student", "unet-xs from shipped, local_only",
        "vit-tiny from random, student", "vit-tiny from random, local_only",
    ]  # fmt: skip
    own = rows_of(["unet-s:mae+random", "mobile"], ["shipped"], ["student"])
    assert [str(row) for row in own] == [
        "unet-s from mae, student", "unet-s from random, student", "mobile from shipped, student",
    ]  # fmt: skip
    with pytest.raises(UsageError) as refused:
        rows_of(["unet"], ["shiped"], ["teacher"])
    assert [fault.split(";")[0] for fault in refused.value.faults] == [
        "--kinds: no 'unet'", "--starts: no 'shiped'", "--models: no 'teacher'",
    ]  # fmt: skip


def cell(start: str, model: str, seed: int, own: float, latency: float) -> Cell:
    dice = {"own": own, "worst": own - 0.1, "all": own / 2}
    return Cell(Row("mobile", Start(start), model), seed, dice, 10.0, 20.0, 1234, 5_000_000, latency)


def test_the_table_is_of_the_cells() -> None:
    cells = [
        cell("mae", "student", 0, 0.8, 7.0), cell("mae", "student", 1, 0.9, 6.0),
        cell("mae", "local_only", 0, 0.6, 5.5), cell("random", "student", 0, 0.4, 9.0),
    ]  # fmt: skip
    first, second = table(cells).splitlines()[2:]
    assert first.split(" | ")[1:5] == ["1,234", "5.00", "5.5", first.split(" | ")[4]]
    assert "0.850 (0.800 0.900)" in first
    assert "0.425 (0.400 0.450)" in first
    assert "0.600 | 0.300" in first
    assert "random" in second
    assert "| 0.400 | 0.200 | - | - |" in second


def test_cells_are_kept_and_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cells.json"
    kept = CellFile(path, "smoke", [], Cell)
    kept.add(cell("mae", "student", 0, 0.8, 7.0))
    again = CellFile(path, "smoke", [], Cell)
    assert again.cells == kept.cells
    assert again.get(Row("mobile", Start.mae, "student"), 0) is not None
    assert json.loads(path.read_text())["cells"][0]["row"]["start"] == "mae"
    monkeypatch.setattr(sys, "argv", ["student_starts", "smoke", "--kinds", "nobody"])
    with pytest.raises(SystemExit) as ended:
        student_starts.main()
    assert ended.value.code == 2
