"""What each kind of student is worth from each start: labels alone, and distilled.

    python -m simulations.benchmark.student_starts RECIPE [--kinds NAME[:START+...],...] [--starts NAME,...]
        [--models student,local_only] [--seeds 0,1,2] [--json FILE] [key=value ...]

A kind has the starts of ``--starts`` unless it names its own: ``--kinds unet-xs,unet-s:shipped+random``.

The federation runs once a seed, up to the students: real sites, guards, messages and state over the loopback
engine. All kinds and starts then learn from the same labelled batches and, as ``student``, from the same
transfer set of each site, for the recipe's steps. ``own`` is the mean over the sites of a student's Dice on
its own site's test patients, ``all`` that on the test patients of every site.

FILE is rewritten after every cell, and what it holds already is not measured again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from client.app import app as client_app
from client.deadline import Deadline
from client.distillation import distil
from client.evaluation import Forward
from client.patients import Patient, Split, of_split
from client.site import Site
from client.starts import Starts
from client.students import Student, start_of
from client.teachers import SiteTeachers
from client.transfer.making import TransferMaker
from client.transfer.painting import Painter
from client.transfer.sets import TransferSet
from client.variants import VARIANTS
from client.workshop import latency_ms
from common.config import load_recipe
from common.errors import UsageError, WardroundError
from common.names import SHIPPED_STUDENTS, STUDENTS
from common.plan import RunPlan, Stage
from common.precision import unpack
from common.recipe import Recipe, Start
from server.collect import Collector
from server.events import EventLog
from server.phases import Walk
from simulations.benchmark.aggregation import CellFile, compare
from simulations.benchmark.pool import Pool
from simulations.loopback import LoopbackGrid, environment, task_identity
from simulations.results import spread
from simulations.simulate import prepare_sites

MODELS = ("student", "local_only")
FOREVER = Deadline(float("inf"))


@dataclass(frozen=True)
class Row:
    """One kind of student from one start; ``model`` says what it learns from."""

    kind: str
    start: Start
    model: str

    def __str__(self) -> str:
        return f"{self.kind} from {self.start}, {self.model}"


@dataclass(frozen=True)
class Cell:
    """What one row gave with one seed.

    Attributes:
        dice: ``own``, ``worst`` (the lowest of the sites' own) and ``all``, see the module.
        start_s: processor seconds of all sites' pre-training on their own images; 0 for other starts.
        cpu_s: processor seconds of all sites' training from there.
        bytes: of the weights' file. latency_ms: of one image of the recipe's size, median of one site's.
    """

    row: Row
    seed: int
    dice: dict[str, float]
    start_s: float
    cpu_s: float
    params: int
    bytes: int
    latency_ms: float


@dataclass(frozen=True)
class Classroom:
    """One site after the federation: who learns there, and from what."""

    site: Site
    train: list[Patient]
    transfer: TransferSet | None

    @property
    def labelled(self) -> list[Patient]:
        return [patient for patient in self.train if patient.labelled]


def rows_of(kinds: Sequence[str], starts: Sequence[str], models: Sequence[str]) -> list[Row]:
    """Each kind with its own starts, or with ``starts``; kinds without weights have no row from shipped ones.

    Args:
        kinds: names, each with starts of its own behind a colon or with none: ``unet-s:shipped+random``.

    Raises ``UsageError`` for names that there are none of, all at once.
    """
    asked_of = {kind: own.split("+") if own else starts for kind, _, own in (k.partition(":") for k in kinds)}
    all_starts = dict.fromkeys([*starts, *(start for own in asked_of.values() for start in own)])
    known = {
        "--kinds": (asked_of, STUDENTS), "--starts": (all_starts, list(Start)), "--models": (models, MODELS),
    }  # fmt: skip
    faults = [
        f"{option}: no {name!r}; choose from {', '.join(choices)}"
        for option, (asked, choices) in known.items()
        for name in asked
        if name not in choices
    ]
    if faults:
        raise UsageError("rows that cannot be measured", faults)
    return [
        Row(kind, Start(start), model)
        for kind, own in asked_of.items()
        for start in own
        for model in models
        if start != Start.shipped or kind in SHIPPED_STUDENTS
    ]


class Federation:
    """The plan and the classrooms of one seed, and the starts of the kind that was asked for last."""

    def __init__(self, pool: Pool, folder: Path) -> None:
        self.pool = pool
        self.walk, sites = walked(pool.recipe, folder)
        self.plan: RunPlan = self.walk.plan
        self.rooms = {site.name: classroom(self.walk, site) for site in sites}
        self._starts: dict[str, Starts] = {}
        self._seconds: dict[tuple[str, Start], float] = {}
        self._kind = ""

    def first(self, row: Row) -> tuple[dict[str, Student], float]:
        """Each site's untrained student, and the processor seconds that their start took, whenever it did."""
        if row.kind != self._kind:  # a start of every kind at once would be gigabytes
            self._kind = row.kind
            self._seconds.clear()
            self._starts = {
                name: Starts(replace(room.site, student=row.kind), self.plan, room.train, FOREVER)
                for name, room in self.rooms.items()
            }
        started = time.process_time()
        made = {name: starts.student(row.start) for name, starts in self._starts.items()}
        learned = row.start in (Start.mae, Start.moco)
        spent = time.process_time() - started if learned else 0.0
        return made, self._seconds.setdefault((row.kind, row.start), spent)

    def measure(self, row: Row) -> Cell:
        students, start_s = self.first(row)
        started = time.process_time()
        for name, student in students.items():
            room = self.rooms[name]
            transfer = room.transfer if row.model == "student" else None
            seed = room.site.draw_seed(self.plan, "student")
            distil(student, room.labelled, transfer, self.plan, seed, FOREVER)
        seconds = time.process_time() - started
        one, size = next(iter(students.values())), self.plan.data.image_size
        return Cell(
            row,
            self.pool.recipe.run.seed,
            dice_of(self.pool, students),
            start_s,
            seconds,
            params=sum(parameter.numel() for parameter in one.parameters()),
            bytes=len(save({key: value.contiguous() for key, value in one.state_dict().items()})),
            latency_ms=latency_ms(one, torch.zeros(1, 3, size, size)),
        )


def walked(recipe: Recipe, folder: Path) -> tuple[Walk, list[Site]]:
    """The walk of ``recipe`` in ``folder`` up to the students, every site required."""
    run, sites = folder / "run", folder / "sites"
    names = prepare_sites(recipe, sites)
    recipe = replace(recipe, run=replace(recipe.run, min_sites=len(names)))
    grid = LoopbackGrid(client_app, len(names))
    collector = Collector(grid, EventLog(run / "events.jsonl"), grid.window)
    with environment({"WARDROUND_SITES": str(sites)}), task_identity():
        walk = Walk(collector, recipe, run)
        walk.propose()
        walk.adapt()
        if Stage.style in walk.plan.stages:
            walk.style()
        if Stage.generator in walk.plan.stages:
            walk.generator()
    return walk, [Site.open(sites / name) for name in names]


def classroom(walk: Walk, site: Site) -> Classroom:
    """The site's patients and its transfer set, made as its workshop makes it."""
    plan = walk.plan
    adapter = unpack(walk.training[Stage.adapt].down(site.name))
    rule = walk.rules.get(Stage.generator)
    generator = None if rule is None else rule.global_adapter()
    train = of_split(site.patients(plan.data, plan.seed), Split.train)
    labelled = [patient for patient in train if patient.labelled]
    painter = Painter(site, plan, walk.outcome.styles, generator, labelled, FOREVER)
    teachers = SiteTeachers(site, plan, adapter, labelled, FOREVER)
    curated = TransferMaker(teachers, painter, train).curated(VARIANTS["student"])
    return Classroom(site, train, None if curated is None else curated.transfer)


def dice_of(pool: Pool, students: dict[str, Student]) -> dict[str, float]:
    own, everywhere = [], []
    for name, student in students.items():
        forward: Forward = student
        found = pool.dice(forward)
        own.append(found[f"site {name}"])
        everywhere.append(found["all"])
    return {"own": float(np.mean(own)), "worst": min(own), "all": float(np.mean(everywhere))}


def table(cells: Sequence[Cell]) -> str:
    """Markdown, a row a kind and start: means over the seeds, each seed's own value behind.

    A latency is the lowest of the kind's cells: the others shared the processor with something.
    """
    head = ["student", "parameters", "file, MB", "one image, ms", "start"]
    models = [model for model in MODELS if any(cell.row.model == model for cell in cells)]
    head += [f"{model}, {where}" for model in models for where in ("own site", "all sites")]
    lines = [f"| {' | '.join([*head, 'start, CPU s', 'training, CPU s'])} |", "|---" * (len(head) + 2) + "|"]
    for kind, start in dict.fromkeys((cell.row.kind, cell.row.start) for cell in cells):
        alike = [cell for cell in cells if cell.row.kind == kind]
        found = [cell for cell in alike if cell.row.start == start]
        usual = " (usual)" if start == start_of(kind, None) else ""
        columns = [
            kind,
            f"{found[0].params:,}",
            f"{found[0].bytes / 1e6:.2f}",
            f"{min(cell.latency_ms for cell in alike):.1f}",
            f"{start}{usual}",
        ]
        for model in models:
            mine = [cell.dice for cell in found if cell.row.model == model]
            columns += [spread(dice[where] for dice in mine) for where in ("own", "all")]
        columns += [
            f"{np.mean([cell.start_s for cell in found]):.0f}",
            f"{np.mean([cell.cpu_s for cell in found]):.0f}",
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--kinds", default=",".join(STUDENTS))
    parser.add_argument("--starts", default="random,shipped,mae,moco")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every cell here")
    given = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    federations: dict[int, Federation] = {}

    def measured(pool: Pool, row: Row, folder: Path) -> Cell:
        seed = pool.recipe.run.seed
        if seed not in federations:
            federations.clear()
            federations[seed] = Federation(pool, folder)
        return federations[seed].measure(row)

    try:
        load_recipe(given.recipe, given.overrides)
        rows = rows_of(*(text.split(",") for text in (given.kinds, given.starts, given.models)))
        kept = CellFile(given.json, given.recipe, given.overrides, Cell)
        cells = compare([int(seed) for seed in given.seeds.split(",")], rows, kept, measured)
    except WardroundError as error:
        parser.exit(error.exit_code, f"{error}\n")
    sys.stdout.write(table(cells) + "\n")


if __name__ == "__main__":
    main()
