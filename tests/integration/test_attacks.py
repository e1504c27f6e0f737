"""The poisoning probe: what it changes and where, what the defences make of it, and that it can fail."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import server.settling
import simulations.attacks as attacks
from common.adapter import Adapter, AdapterUpdate
from common.config import load_recipe
from common.errors import UsageError
from server.outliers import TOO_LARGE, Findings
from simulations.attacks import POISONS, Cell, Row, measure, poisoned, rows_of, table
from simulations.benchmark.aggregation import CellFile, compare
from simulations.benchmark.pool import Pool

SIZES = ("train_patients=4", "test_patients=3", "images_per_patient=1")
SITES = ("cottage", "harbour", "northfield", "oldtown", "southgate")
FEW_PATIENTS = "sites.cottage.phantom.train_patients=2"
TINY = [
    "run.rounds=2", "teacher.steps=2", "teacher.batch_size=2", "evaluation.overlap=0",
    *(f"sites.{site}.phantom.{size}" for site in SITES for size in SIZES), FEW_PATIENTS,
]  # fmt: skip
ROUNDS = 2


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return Pool.prepare(load_recipe("five", TINY), tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def clean(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Cell:
    return measure(pool, Row("none"), tmp_path_factory.mktemp("clean"))


# --- five hospitals, hardly trained ---------------------------------------------------------------------


def test_an_honest_small_site_is_used_in_every_round(clean: Cell) -> None:
    assert clean.used == dict.fromkeys(SITES, 1.0)
    assert clean.rejected == {}
    assert clean.site == "southgate", "the last by name"


def test_a_site_a_hundred_times_as_far_is_rejected_in_every_round_and_costs_nothing(
    clean: Cell, pool: Pool, tmp_path: Path
) -> None:
    cell = measure(pool, Row("none", "scale", 100.0, "harbour"), tmp_path)
    assert cell.rejected == {"harbour": [TOO_LARGE] * ROUNDS}
    assert cell.used == {site: float(site != "harbour") for site in SITES}
    assert cell.dice["all"] > clean.dice["all"] - 0.02


def test_what_nobody_compares_costs_the_teacher(
    clean: Cell, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe sees a defence that is missing."""
    monkeypatch.setattr(server.settling, "compare", lambda *_: Findings({}, []))
    cell = measure(pool, Row("none", "scale", 100.0, "harbour"), tmp_path)
    assert cell.used == dict.fromkeys(SITES, 1.0)
    assert cell.dice["all"] < clean.dice["all"] - 0.1


# --- what is changed ------------------------------------------------------------------------------------


@pytest.fixture
def honest() -> AdapterUpdate:
    steps = {name: torch.arange(1.0, 7.0).view(2, 3) * size for name, size in (("x", 1.0), ("y", 0.01))}
    return AdapterUpdate(Adapter(steps, "ab" * 32, 2, "base"), 12.0, "cd" * 32, losses=(1.0, 0.5))


@pytest.mark.parametrize(
    ("row", "times", "weight"),
    [
        (Row("none", "scale", 100.0), 100.0, 12.0),
        (Row("none", "scale", -2.5), -2.5, 12.0),
        (Row("none", "flip"), -1.0, 12.0),
        (Row("none", "outweigh"), -1.0, 1000.0),
    ],
    ids=str,
)
def test_steps_are_multiplied(honest: AdapterUpdate, row: Row, times: float, weight: float) -> None:
    sent = poisoned(honest, row, 1000.0, seed=0)
    for name, step in honest.adapter.tensors.items():
        assert torch.equal(sent.adapter.tensors[name], times * step)
    assert sent.weight == weight
    about = replace(sent, weight=12.0, adapter=replace(sent.adapter, tensors=honest.adapter.tensors))
    assert about == honest


def test_noise_is_as_long_as_the_honest_step_and_says_nothing_of_it(honest: AdapterUpdate) -> None:
    first, again, other = (poisoned(honest, Row("none", "noise"), 1000.0, seed) for seed in (3, 3, 4))
    for name, step in honest.adapter.tensors.items():
        noise = first.adapter.tensors[name]
        assert float(noise.norm()) == pytest.approx(float(step.norm()), rel=1e-5)
        assert torch.equal(noise, again.adapter.tensors[name])
        assert not torch.equal(noise, other.adapter.tensors[name])
    still = replace(honest.adapter, tensors={"x": torch.zeros(2, 3)})
    sent = poisoned(replace(honest, adapter=still), Row("none", "noise"), 1000.0, seed=0)
    assert torch.equal(sent.adapter.tensors["x"], torch.zeros(2, 3)), "of no length: no division by it"


# --- rows, table, command -------------------------------------------------------------------------------


def test_each_estimator_has_its_run_without_an_attack_first() -> None:
    rows = rows_of(["scale", "flip"], [100.0, -2.0], ["none", "auto"], "b")
    assert rows == [
        Row(robust, *attack)
        for robust in ("none", "auto")
        for attack in (("", 1.0, ""), ("scale", 100.0, "b"), ("scale", -2.0, "b"), ("flip", 1.0, "b"))
    ]
    assert {row.clean for row in rows} == {rows[0], rows[4]}
    assert [str(row) for row in rows[:3]] == [
        "no attack, robust none", "scale x 100, robust none", "scale x -2, robust none",
    ]  # fmt: skip


def test_an_unknown_attack_or_estimator_is_named_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="--attack: there is no 'flap'; did you mean flip"):
        rows_of(["flap"], [1.0], ["none"], "")
    with pytest.raises(UsageError, match="--robust: there is no 'medan'; did you mean median"):
        rows_of([], [1.0], ["medan"], "")


def test_an_unknown_site_is_named(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--site: there is no 'harbor'; did you mean harbour"):
        measure(pool, Row("none", site="harbor"), tmp_path)


PATIENTS = {"a": 10, "b": 30, "c": 10}


def cell(row: Row, seed: int, dice: float, used: float = 1.0, **rejected: list[str]) -> Cell:
    """``c``, the attacked site, has a Dice of 0."""
    found = {"all": dice, "site a": dice, "site b": 0.5, "site c": 0.0}
    shares = {"a": 1.0, "b": 0.5 if "b" in rejected else 1.0, "c": used}
    return Cell(row, seed, "c", found, PATIENTS, shares, rejected, 10.0 + seed)


def test_the_table_shows_differences_use_and_reasons() -> None:
    clean, bad = Row("none"), Row("none", "scale", 100.0, "c")
    lines = table(
        [
            cell(clean, 0, 0.9),
            cell(clean, 1, 0.8),
            cell(bad, 0, 0.7, 0.0, c=["large", "large"]),
            cell(bad, 1, 0.76, 0.5, c=["large"], b=["odd"]),
        ]
    ).splitlines()
    assert "rounds that used c" in lines[0]
    assert lines[2] == "| no attack | none | 0.850 (0.900 0.800) | - | - | 100% | 100% | - | 10 |"
    assert lines[3] == (
        "| scale x 100 | none | 0.730 (0.700 0.760) | -0.120 (-0.200 -0.040) | -0.030 (-0.050 -0.010) "
        "| 25% | 75% (b) | b: odd (1); c: large (3) | 10 |"
    )
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def test_the_others_patients_are_counted_one_by_one() -> None:
    assert cell(Row("none"), 0, 0.9).dice_without("c") == pytest.approx((10 * 0.9 + 30 * 0.5) / 40)
    assert cell(Row("none"), 0, 0.9).dice_without("a") == pytest.approx((30 * 0.5 + 10 * 0.0) / 40)


def test_what_the_file_holds_is_not_measured_again(tmp_path: Path) -> None:
    row, path = Row("none", "scale", 100.0, "c"), tmp_path / "cells.json"
    done = cell(row, 0, 0.7, 0.0, c=["large"])
    CellFile(path, "five", TINY, Cell).add(done)
    found = compare([0], [row], CellFile(path, "five", TINY, Cell), lambda *_: pytest.fail("measured again"))
    assert found == [done]


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    given = ["attacks", "five"]
    monkeypatch.setattr(sys, "argv", given)
    return given


def test_the_command_ends_with_the_faults_code(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments += ["--attack", "flap"]
    with pytest.raises(SystemExit) as ended:
        attacks.main()
    assert ended.value.code == UsageError.exit_code
    assert f"choose from {', '.join(POISONS)}" in capsys.readouterr().err
