"""What each setting of a student is worth, beside the same student as the recipe has it.

    python -m simulations.benchmark.distillation_terms RECIPE [--row steps=360 --row boundary_weight=0.5,...]
        [--seeds 0,1,2] [--teachers DIR] [--json FILE] [key=value ...]

The federated teacher of a seed is trained once, by the real rounds of the recipe, and the synthetic images
are painted once; a row is then one student a site, made of them with the row's settings of ``student.*``
(several with commas). ``recipe`` is the recipe's own row, ``variant=NAME`` one of `client.variants`, and
``teacher`` trains nothing: it is what a student could reach. Every model is tested on its own site's test
patients and on everybody's.

FILE is rewritten after every cell, and what it holds already is not measured again; DIR keeps the teachers.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from client.deadline import Deadline
from client.distillation import distil
from client.patients import Patient, Split, of_split
from client.site import Site
from client.starts import Starts
from client.style import summarise_style
from client.teachers import SiteTeachers
from client.transfer.making import TransferMaker
from client.transfer.painting import Painter
from client.transfer.sets import TransferSet
from client.variants import VARIANTS
from common.adapter import Adapter
from common.config import load_recipe
from common.errors import UsageError, WardroundError
from common.plan import RunPlan, Stage
from common.recipe import GeneratorScope
from common.style import StyleSummary
from common.teacher import teacher_for
from simulations.benchmark.aggregation import CellFile, compare, walked
from simulations.benchmark.pool import Pool
from simulations.results import spread

FOREVER = Deadline(float("inf"))
RECIPE, TEACHER = "recipe", "teacher"


@dataclass(frozen=True)
class Row:
    """One student: ``text`` is `RECIPE`, `TEACHER`, or settings of ``student.*`` with commas between."""

    text: str

    @property
    def variant(self) -> str:
        """A name of `VARIANTS`."""
        found = [part.partition("=")[2] for part in self._parts if part.startswith("variant=")]
        return found[-1] if found else "student"

    @property
    def overrides(self) -> list[str]:
        return [f"student.{part}" for part in self._parts if not part.startswith("variant=")]

    @property
    def _parts(self) -> list[str]:
        return [] if self.text in (RECIPE, TEACHER) else [part.strip() for part in self.text.split(",")]

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Cell:
    """One row with one seed.

    Attributes:
        dice: mean over the sites' models: ``own`` on their own test patients, ``worst`` the lowest of these,
            ``all`` on everybody's.
        cpu_s: processor seconds of the students' training, a site.
    """

    row: Row
    seed: int
    dice: dict[str, float]
    cpu_s: float
    sites: dict[str, list[float]] = field(default_factory=dict)  # site -> own, all


class Classroom:
    """One seed: its sites, the teacher that they trained, and what their students learn from."""

    def __init__(self, pool: Pool, adapter: Adapter) -> None:
        self.pool, self.adapter = pool, adapter
        folders = [Path(str(site.manifest)).parent.parent for site in pool.recipe.sites]
        self.sites = {folder.name: Site.open(folder) for folder in folders}
        self._made: dict[tuple[str, str, str, str], TransferSet | None] = {}

    def train(self, name: str) -> list[Patient]:
        plan = self.pool.plan
        return of_split(self.sites[name].patients(plan.data, plan.seed), Split.train)

    def labelled(self, name: str) -> list[Patient]:
        return [patient for patient in self.train(name) if patient.labelled]

    @cached_property
    def styles(self) -> dict[str, StyleSummary]:
        """What each site shares of its look, as in a run."""
        plan = self.pool.plan
        return {
            name: summarise_style(
                self.labelled(name), plan.data.image_size, plan.generator.style_groups,
                site.policy.min_group_patients, site.draw_seed(plan, "style"),
            )
            for name, site in self.sites.items()
        }  # fmt: skip

    @cached_property
    def painters(self) -> dict[str, Painter]:
        return {
            name: Painter(site, self.pool.plan, self.styles, None, self.labelled(name), FOREVER)
            for name, site in self.sites.items()
        }

    def transfer(self, name: str, variant: str, plan: RunPlan) -> TransferSet | None:
        """The transfer set of a site; made once for each way in which a teacher can be asked."""
        asked = (name, variant, str(plan.student.distillation), str(plan.student.teacher_cache))
        if asked not in self._made:
            teachers = SiteTeachers(self.sites[name], plan, self.adapter, self.labelled(name), FOREVER)
            curated = TransferMaker(teachers, self.painters[name], self.train(name)).curated(
                VARIANTS[variant]
            )
            self._made[asked] = None if curated is None else curated.transfer
        return self._made[asked]

    def measure(self, row: Row, plan: RunPlan) -> Cell:
        """One cell, of students that are trained by ``plan``."""
        found: dict[str, list[float]] = {}
        seconds = 0.0
        for name, site in self.sites.items():
            seed, variant = site.draw_seed(plan, "student"), VARIANTS[row.variant]
            student = Starts(site, plan, self.train(name), FOREVER).student(variant.start)
            transfer = self.transfer(name, row.variant, plan)
            started = time.process_time()
            distil(student, self.labelled(name), transfer, plan, seed, FOREVER)
            seconds += time.process_time() - started
            dice = self.pool.dice(student)
            found[name] = [dice[f"site {name}"], dice["all"]]
        return _cell(row, plan.seed, found, seconds / len(self.sites))

    def measure_teacher(self) -> Cell:
        plan = self.pool.plan
        with teacher_for(self.adapter, plan).visit(self.adapter) as network:
            dice = self.pool.dice(lambda tiles: network(tiles).logits)
        found = {name: [dice[f"site {name}"], dice["all"]] for name in self.sites}
        return _cell(Row(TEACHER), plan.seed, found, 0.0)


def _cell(row: Row, seed: int, found: dict[str, list[float]], seconds: float) -> Cell:
    own, everywhere = zip(*found.values(), strict=True)
    dice = {"own": float(np.mean(own)), "worst": min(own), "all": float(np.mean(everywhere))}
    return Cell(row, seed, dice, seconds, found)


class Study:
    """A recipe's classrooms; the teacher of a seed is trained once, or read from ``kept``."""

    def __init__(self, recipe: str, overrides: Sequence[str], kept: Path | None) -> None:
        self.recipe, self.overrides, self.kept = recipe, list(overrides), kept
        self._rooms: dict[int, Classroom] = {}

    def measure(self, pool: Pool, row: Row, folder: Path) -> Cell:
        seed = pool.recipe.run.seed
        if seed not in self._rooms:
            self._rooms = {seed: Classroom(pool, self._adapter(pool, folder))}
        room = self._rooms[seed]
        if row.text == TEACHER:
            return room.measure_teacher()
        settings = load_recipe(self.recipe, [*self.overrides, *row.overrides]).student
        return room.measure(row, replace(pool.plan, student=settings))

    def _adapter(self, pool: Pool, folder: Path) -> Adapter:
        path = (
            None
            if self.kept is None
            else self.kept / f"{pool.recipe.name}-{pool.recipe.run.seed}.safetensors"
        )
        if path is not None and path.exists():
            return Adapter.load(path)
        none = replace(pool.recipe.generator, scope=GeneratorScope.none)
        walk = walked(replace(pool.recipe, generator=none), folder)
        adapter = walk.rules[Stage.adapt].global_adapter()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            adapter.save(path)
        return adapter


def parse(texts: Sequence[str], recipe: str, overrides: Sequence[str]) -> list[Row]:
    """Raises ``UsageError`` for a variant that there is not, ``ConfigError`` for settings that are none."""
    rows = [Row(text) for text in texts]
    if unknown := [row.variant for row in rows if row.variant not in VARIANTS]:
        raise UsageError(f"--row: no variant {', '.join(unknown)}; known: {', '.join(VARIANTS)}")
    for row in rows:
        load_recipe(recipe, [*overrides, *row.overrides])
    return rows


def table(cells: Sequence[Cell]) -> str:
    """Markdown, a row each: means over the seeds, each seed's own, and what is over the recipe's row."""
    head = [
        "student", "Dice, all sites (seeds)", "over the recipe’s", "own site (seeds)", "over the recipe’s",
        "worst site", "CPU s a site",
    ]  # fmt: skip
    usual = {cell.seed: cell.dice for cell in cells if cell.row.text == RECIPE}
    by_row: dict[Row, list[Cell]] = {}
    for cell in cells:
        by_row.setdefault(cell.row, []).append(cell)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row, found in by_row.items():
        columns = [str(row)]
        for key in ("all", "own"):
            columns.append(spread(cell.dice[key] for cell in found))
            over = [cell.dice[key] - usual[cell.seed][key] for cell in found if cell.seed in usual]
            columns.append("-" if row.text == RECIPE else spread(over))
        columns.append(spread(cell.dice["worst"] for cell in found))
        columns.append(f"{np.mean([cell.cpu_s for cell in found]):.0f}")
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--row", action="append", default=[], help="settings of student.*, with commas")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--teachers", type=Path, metavar="DIR", help="keep the federated teachers here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every cell here")
    given = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    try:
        rows = parse([TEACHER, RECIPE, *given.row], given.recipe, given.overrides)
        kept = CellFile(given.json, given.recipe, given.overrides, Cell)
        seeds = [int(seed) for seed in given.seeds.split(",")]
        measured = Study(given.recipe, given.overrides, given.teachers).measure
        cells = compare(seeds, rows, kept, measured)
    except WardroundError as error:
        parser.exit(error.exit_code, f"{error}\n")
    sys.stdout.write(table(cells) + "\n")


if __name__ == "__main__":
    main()
