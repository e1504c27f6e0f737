"""What each aggregation rule is worth on images, and what pooling the images would be.

    python -m simulations.benchmark.aggregation RECIPE [--rules NAME,...|all] [--ranks equal|mixed|both]
        [--seeds 0,1,2] [--central] [--json FILE] [key=value ...]

A cell is the real walk up to the last of the teacher's rounds: real sites, guards, messages and state over
the loopback engine, and no students. Its global adapter is tested on every site's test patients. The sites
are cut and read once a seed, so rules differ in nothing but themselves. A rule that averages B alone runs
with preset ``dp``; beside every preset and ranks stands `REFERENCE` with the same.

With ``--central`` the labelled training patients of all sites lie in one place, and one adapter of the same
start and preset is trained there in one go: for as many optimiser steps as a site makes in all its rounds,
and for as many as all sites together make.

FILE is rewritten after every cell, and what it holds already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from client.adaptation import adapt
from client.app import app as client_app
from client.deadline import Deadline
from common import progress
from common.adapter import Adapter
from common.code_digest import code_sha256
from common.config import load_recipe
from common.errors import UsageError, WardroundError
from common.names import AGGREGATION_RULES, FIXED_A_RULES, MIXED_RANK_RULES
from common.plan import Stage, rebuild
from common.recipe import GeneratorScope, Recipe, TeacherConfig
from common.seeding import derive_seed
from common.teacher import ResidentTeacher, initial_adapter, resident_teacher, teacher_for
from common.tuning.presets import rank_of, sends_a
from server.collect import Collector
from server.events import EventLog
from server.phases import Walk
from simulations.benchmark.pool import Pool
from simulations.loopback import Courier, LoopbackGrid, environment, task_identity
from simulations.results import spread
from simulations.simulate import prepare_sites

REFERENCE = "exact_split"
FIXED_A_PRESET = "dp"
MIXED = (2, 4, 8)
ONE, ALL = "centralised, steps of one site", "centralised, steps of all sites"
CENTRAL = (ONE, ALL)


@dataclass(frozen=True)
class Row:
    """One way to the teacher.

    Attributes:
        rule: of the registry, or one of `CENTRAL`.
        ranks: that the sites have in turn, in the order of their names; the teacher has the highest.
    """

    rule: str
    preset: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.rule}, {self.setting}"

    @property
    def setting(self) -> str:
        return f"{self.preset}, rank {'/'.join(map(str, self.ranks))}"

    @property
    def reference(self) -> Row:
        return replace(self, rule=REFERENCE)


@dataclass(frozen=True)
class Cell:
    """What one row gave with one seed.

    Attributes:
        dice: of the global adapter, by `Pool.dice`'s keys.
        lowest: mean Dice over all test patients of what the site of the lowest rank is sent after the last
            round; None where all ranks are one. Not every rule shows such a site the global adapter.
        residuals: of each round, as the rule reports it.
        bytes_up, bytes_down: mean over the sites of each round's serialized messages.
        cpu_s: processor seconds of the rounds or of the training, without the test.
    """

    row: Row
    seed: int
    dice: dict[str, float]
    cpu_s: float
    lowest: float | None = None
    residuals: list[float] = field(default_factory=list)
    bytes_up: list[float] = field(default_factory=list)
    bytes_down: list[float] = field(default_factory=list)


def rows_of(rules: Sequence[str], ranks: str, teacher: TeacherConfig, central: bool) -> list[Row]:
    """The rows that are asked for, each after its reference; rules without a mean of several ranks have none.

    Raises ``UsageError`` for a rule that is not in the registry.
    """
    if unknown := [rule for rule in rules if rule not in AGGREGATION_RULES]:
        raise UsageError(f"--rules: no rule {', '.join(unknown)}; known: {', '.join(AGGREGATION_RULES)}")
    found: list[Row] = []
    if central:
        found += [_equal_row(rule, teacher) for rule in (REFERENCE, *CENTRAL)]
    if ranks != "mixed":
        found += [row for rule in rules for row in _with_reference(_equal_row(rule, teacher))]
    if ranks != "equal":
        mixed = [
            replace(_equal_row(rule, teacher), ranks=MIXED) for rule in rules if rule in MIXED_RANK_RULES
        ]
        found += [row for one in mixed for row in _with_reference(one)]
    return list(dict.fromkeys(found))


def _equal_row(rule: str, teacher: TeacherConfig) -> Row:
    if rule in FIXED_A_RULES and sends_a(teacher.adapter):
        teacher = replace(teacher, adapter=FIXED_A_PRESET, rank=None)
    return Row(rule, teacher.adapter, (rank_of(teacher),))


def _with_reference(row: Row) -> tuple[Row, Row]:
    return row.reference, row


def recipe_for(row: Row, recipe: Recipe) -> Recipe:
    """``recipe`` as ``row`` runs it: its rule, preset and ranks, every site required, no generator."""
    sites = [
        replace(site, adapter=row.preset, rank=rank or None)
        for site, rank in zip(recipe.sites, cycle(row.ranks), strict=False)
    ]
    return replace(
        recipe,
        sites=sites,
        run=replace(recipe.run, min_sites=len(sites)),
        teacher=replace(recipe.teacher, adapter=row.preset, rank=max(row.ranks) or None),
        aggregation=replace(recipe.aggregation, rule=REFERENCE if row.rule in CENTRAL else row.rule),
        generator=replace(recipe.generator, scope=GeneratorScope.none),
    )


def measure(pool: Pool, row: Row, folder: Path) -> Cell:
    """One cell; ``folder`` is empty, and takes the run and its sites.

    Raises:
        ConfigError: the rule does not serve these adapters.
        FederationError: a site did not answer, or its answer was rejected.
    """
    recipe = recipe_for(row, pool.recipe)
    return _centralised(pool, row, recipe) if row.rule in CENTRAL else _federated(pool, row, recipe, folder)


def _federated(pool: Pool, row: Row, recipe: Recipe, folder: Path) -> Cell:
    started = time.process_time()
    walk = walked(recipe, folder)
    seconds = time.process_time() - started
    rule = walk.rules[Stage.adapt]
    ranks = {site: agreed.rank for site, agreed in sorted(walk.outcome.adapters.items())}
    lowest = rule.adapter_for(min(ranks, key=ranks.__getitem__)) if len(set(ranks.values())) > 1 else None

    def dice(adapter: Adapter) -> dict[str, float]:
        return tested(pool, teacher_for(adapter, walk.plan), adapter)

    rounds = [record for record in walk.outcome.rounds if record.stage == Stage.adapt]
    return Cell(
        row,
        recipe.run.seed,
        dice(rule.global_adapter()),
        seconds,
        lowest=None if lowest is None else dice(lowest)["all"],
        residuals=[record.residual for record in rounds if record.residual is not None],
        bytes_up=[float(np.mean(list(record.bytes_up.values()))) for record in rounds],
        bytes_down=[float(np.mean(list(record.bytes_down.values()))) for record in rounds],
    )


def walked(recipe: Recipe, folder: Path, courier: Courier = client_app) -> Walk:
    """The walk of ``recipe`` in ``folder``, with ``courier`` at every site, after the teacher's rounds."""
    run, sites = folder / "run", folder / "sites"
    grid = LoopbackGrid(courier, len(prepare_sites(recipe, sites)))
    collector = Collector(grid, EventLog(run / "events.jsonl"), grid.window)
    with environment({"WARDROUND_SITES": str(sites)}), task_identity():
        walk = Walk(collector, recipe, run)
        walk.propose()
        walk.adapt()
    return walk


def _centralised(pool: Pool, row: Row, recipe: Recipe) -> Cell:
    settings, seed = recipe.teacher, recipe.run.seed
    steps = recipe.run.rounds * settings.steps * (len(recipe.sites) if row.rule == ALL else 1)
    plan = replace(pool.plan, rounds=1, teacher=replace(settings, steps=steps))
    teacher = resident_teacher(settings, plan.data)
    adapter = initial_adapter(settings, plan.data, seed)
    started = time.process_time()
    batches = derive_seed(seed, "centralised")
    adapter = adapt(teacher, adapter, pool.train, plan, (0, batches), Deadline(float("inf"))).adapter
    seconds = time.process_time() - started
    return Cell(row, seed, tested(pool, teacher, adapter), seconds)


def tested(pool: Pool, teacher: ResidentTeacher, adapter: Adapter) -> dict[str, float]:
    with teacher.visit(adapter) as network:
        return pool.dice(lambda tiles: network(tiles).logits)


class CellFile:
    """Cells of one recipe, its overrides and this code, kept in ``path``; None keeps them for now alone.

    A cell is of ``kind``, a dataclass with ``row`` and ``seed``. Raises ``UsageError`` where the file holds
    those of others.
    """

    def __init__(self, path: Path | None, recipe: str, overrides: Sequence[str], kind: type = Cell) -> None:
        self.path = path
        self.about: dict[str, Any] = {
            "recipe": recipe, "overrides": list(overrides), "code_sha256": code_sha256(),
            "torch": torch.__version__,
        }  # fmt: skip
        self.cells: list[Any] = []
        if path is not None and path.exists():
            held = json.loads(path.read_text())
            self.cells = [rebuild(kind, cell) for cell in held.pop("cells")]
            if held != self.about:
                raise UsageError(f"{path} holds another recipe, other settings or another code: name another")

    def get(self, row: Any, seed: int) -> Any:
        return next((cell for cell in self.cells if (cell.row, cell.seed) == (row, seed)), None)

    def add(self, cell: Any) -> None:
        self.cells.append(cell)
        if self.path is not None:
            cells = [asdict(one) for one in self.cells]
            self.path.write_text(json.dumps({**self.about, "cells": cells}, indent=1) + "\n")


def compare(
    seeds: Sequence[int],
    rows: Sequence[Any],
    kept: CellFile,
    measured: Callable[[Pool, Any, Path], Any] | None = None,
) -> list[Any]:
    """Every row with every seed, in the rows' order.

    Args:
        measured: what gives a cell; None: `measure`.
    """
    for seed in seeds:
        missing = [row for row in rows if kept.get(row, seed) is None]
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as folder:
            recipe = load_recipe(kept.about["recipe"], [*kept.about["overrides"], f"run.seed={seed}"])
            pool = Pool.prepare(recipe, Path(folder) / "pool")
            for number, row in enumerate(missing):
                progress.stage(f"seed {seed}: {row}")
                cell = (measured or measure)(pool, row, Path(folder) / str(number))
                kept.add(cell)
                progress.stage(f"seed {seed}: {row}: Dice {cell.dice['all']:.3f}, {cell.cpu_s:.0f} CPU s")
    progress.end()
    return [found for row in rows for seed in seeds if (found := kept.get(row, seed)) is not None]


def table(cells: Sequence[Cell]) -> str:
    """Markdown, a row each: means over the seeds, and behind a Dice every seed's own value."""
    head = [
        "rule", "preset, ranks", "Dice, all sites (seeds)", f"over {REFERENCE}", "as the lowest rank sees it",
        "residual, mean and last", "bytes up, a site and round", "bytes down, first and last round", "CPU s",
    ]  # fmt: skip
    by_row: dict[Row, dict[int, Cell]] = {}
    for cell in cells:
        by_row.setdefault(cell.row, {})[cell.seed] = cell
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row, mine in by_row.items():
        over = [one.dice["all"] - by_row[row.reference][seed].dice["all"] for seed, one in mine.items()]
        found = list(mine.values())
        columns = [
            row.rule,
            row.setting,
            spread(one.dice["all"] for one in found),
            "-" if row == row.reference else spread(over, digits=4),
            spread(one.lowest for one in found),
            *_of_the_rounds(found),
            f"{np.mean([one.cpu_s for one in found]):.0f}",
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def _of_the_rounds(cells: Sequence[Cell]) -> tuple[str, str, str]:
    """Residuals, bytes up and bytes down, as the table shows them."""
    if not all(cell.residuals for cell in cells):
        return "-", "-", "-"
    residuals, up, down = (
        np.mean([getattr(cell, name) for cell in cells], axis=0)
        for name in ("residuals", "bytes_up", "bytes_down")
    )
    return (
        f"{residuals.mean():.1e}, {residuals[-1]:.1e}",
        f"{up.mean():,.0f}",
        f"{down[0]:,.0f} to {down[-1]:,.0f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--rules", default="all", help="names, or all of the registry; none with ''")
    parser.add_argument("--ranks", default="equal", choices=("equal", "mixed", "both"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--central", action="store_true", help="also one adapter on all images pooled")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every cell here")
    given = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    rules = AGGREGATION_RULES if given.rules == "all" else [name for name in given.rules.split(",") if name]
    try:
        kept = CellFile(given.json, given.recipe, given.overrides)
        rows = rows_of(rules, given.ranks, load_recipe(given.recipe, given.overrides).teacher, given.central)
        cells = compare([int(seed) for seed in given.seeds.split(",")], rows, kept)
    except WardroundError as error:
        parser.exit(error.exit_code, f"{error}\n")
    sys.stdout.write(table(cells) + "\n")


if __name__ == "__main__":
    main()
