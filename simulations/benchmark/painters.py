"""What each painter of synthetic images is worth to the students of one and the same teacher.

    python -m simulations.benchmark.painters RECIPE [--rows diffusion,recolour:texture,...] [--seeds 0,1,2]
        [--json FILE] [key=value ...]

With each seed the sites are cut, and the federated teacher is trained, once. A row is a painter and how much
of their look the sites share: ``recolour`` or ``recolour:texture``. ``diffusion`` is the shipped network in
every site's style, never trained on a real pixel; ``none`` is distillation on real crops alone; and
``local_only`` has no teacher. In every row each site trains one student, for the same steps, on the same
labelled batches, with the same share of as many images, and it is tested on every site's test patients.

FILE is rewritten after every cell, and what it holds already is not measured again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from client.deadline import Deadline
from client.distillation import distil
from client.painters import PAINTERS
from client.patients import Patient, Split, of_split
from client.site import Site
from client.starts import Starts
from client.style import summarise_style
from client.teachers import SiteTeachers
from client.transfer.making import TransferMaker
from client.transfer.painting import NETWORK, Painter
from client.variants import VARIANTS, Variant
from common.adapter import Adapter
from common.config import load_recipe
from common.errors import UsageError, WardroundError
from common.plan import RunPlan, Stage
from common.recipe import GeneratorScope, StyleDetail
from common.style import SPECTRUM, STYLE_FIELDS, TEXTURE, StyleGroup, StyleSummary
from simulations.benchmark.aggregation import CellFile, compare, walked
from simulations.benchmark.pool import Pool
from simulations.results import spread

ALONE = {"none": VARIANTS["no_synthetic"], "local_only": VARIANTS["local_only"]}
FOREVER = Deadline(float("inf"))
LENGTHS = {StyleDetail.colour: len(STYLE_FIELDS), StyleDetail.texture: TEXTURE.stop}
REFERENCE = "none"


@dataclass(frozen=True)
class Row:
    """One way to the images of a transfer set.

    Attributes:
        painter: of `client.painters.PAINTERS`, or `NETWORK`, or of `ALONE`.
        detail: how much of their look the sites share.
    """

    painter: str
    detail: StyleDetail = StyleDetail.colour

    @classmethod
    def parse(cls, text: str) -> Row:
        """From ``PAINTER`` or ``PAINTER:DETAIL``. Raises ``UsageError``."""
        name, _, detail = text.partition(":")
        known = [*ALONE, NETWORK, *PAINTERS]
        if name not in known or (detail and detail not in list(StyleDetail)):
            details = ", ".join(StyleDetail)
            raise UsageError(
                f"no row {text!r}: one of {', '.join(known)}, and after a colon one of {details}"
            )
        spectral = name in PAINTERS and PAINTERS[name].shares == "spectrum"
        return cls(name, StyleDetail(detail or (StyleDetail.spectrum if spectral else StyleDetail.colour)))

    @property
    def variant(self) -> Variant:
        if self.painter in ALONE:
            return ALONE[self.painter]
        return replace(VARIANTS["student"], painter=None if self.painter == NETWORK else self.painter)

    def __str__(self) -> str:
        return self.painter if self.detail is StyleDetail.colour else f"{self.painter}, {self.detail}"


@dataclass(frozen=True)
class Cell:
    """One row with one seed.

    Attributes:
        dice: ``all``: mean over the sites' students, each tested on everybody; ``own``: each on its own
            site's test patients; ``student A on B`` and ``group NAME``: the parts of these.
        images: kept for training, on average a site.
        cpu_s: processor seconds of making the images, asking the teacher and training, all sites together.
    """

    row: Row
    seed: int
    dice: dict[str, float]
    images: float
    cpu_s: float


@dataclass(frozen=True)
class Consortium:
    """One seed's sites after the teacher's last round."""

    plan: RunPlan
    sites: dict[str, Site]
    teacher: Adapter

    @classmethod
    def train(cls, pool: Pool, folder: Path) -> Consortium:
        """Raises ``FederationError`` if a site does not answer."""
        settings = replace(pool.recipe.generator, scope=GeneratorScope.none)
        recipe = replace(pool.recipe, generator=settings, baselines=[])
        walk = walked(recipe, folder)
        sites = {site.name: Site.open(folder / "sites" / site.name) for site in recipe.sites}
        shared = replace(pool.recipe.generator, scope=GeneratorScope.style)
        return cls(replace(walk.plan, generator=shared), sites, walk.rules[Stage.adapt].global_adapter())

    def patients(self, site: str) -> list[Patient]:
        return of_split(self.sites[site].patients(self.plan.data, self.plan.seed), Split.train)

    @cached_property
    def styles(self) -> dict[str, StyleSummary]:
        """What each site would share at most; a site whose groups are all too small shares nothing."""
        found = {}
        for name, site in self.sites.items():
            labelled = [patient for patient in self.patients(name) if patient.labelled]
            seed, least = site.draw_seed(self.plan, "style"), site.policy.min_group_patients
            size, groups = self.plan.data.image_size, self.plan.generator.style_groups
            found[name] = summarise_style(labelled, size, groups, least, seed, StyleDetail.spectrum)
        return found

    def shared(self, detail: StyleDetail) -> dict[str, StyleSummary]:
        """`styles`, cut to ``detail``: the groups are the same, whatever is shared of them."""
        length = LENGTHS.get(detail, SPECTRUM.stop)
        return {
            name: StyleSummary(
                [StyleGroup(g.weight, g.mean[:length], g.std[:length]) for g in summary.groups]
            )
            for name, summary in self.styles.items()
        }

    def student(self, name: str, row: Row) -> tuple[torch.nn.Module, int]:
        """The student of site ``name`` under ``row``, as `client.workshop` trains it, and how many images."""
        plan = replace(self.plan, generator=replace(self.plan.generator, style_detail=row.detail))
        site, train = self.sites[name], self.patients(name)
        labelled = [patient for patient in train if patient.labelled]
        teachers = SiteTeachers(site, plan, self.teacher, labelled, FOREVER)
        painter = Painter(site, plan, self.shared(row.detail), None, labelled, FOREVER)
        return self.distilled(name, TransferMaker(teachers, painter, train), row.variant)

    def distilled(self, name: str, maker: TransferMaker, variant: Variant) -> tuple[torch.nn.Module, int]:
        """A student of site ``name`` from what ``maker`` makes, and of how many synthetic images."""
        curated, plan, site = maker.curated(variant), maker.plan, self.sites[name]
        labelled = [patient for patient in maker.train if patient.labelled]
        seed = site.draw_seed(plan, "student")
        student = Starts(site, plan, maker.train, FOREVER).student(variant.start)
        distil(student, labelled, None if curated is None else curated.transfer, plan, seed, FOREVER)
        return student, 0 if curated is None else curated.kept


class Study:
    """Cells, and the consortium of the seed that is being measured."""

    def __init__(self) -> None:
        self._at: tuple[int, Consortium] | None = None

    def measure(self, pool: Pool, row: Row, folder: Path) -> Cell:
        """One cell; the first of a seed also trains that seed's teacher, in ``folder``."""
        seed = pool.recipe.run.seed
        if self._at is None or self._at[0] != seed:
            self._at = (seed, Consortium.train(pool, folder.parent / "consortium"))
        consortium, dice, kept, seconds = self._at[1], {}, [], 0.0
        for name in sorted(consortium.sites):
            started = time.process_time()
            student, images = consortium.student(name, row)
            seconds += time.process_time() - started
            kept.append(images)
            dice[name] = pool.dice(student)
        return Cell(row, seed, together(dice), float(np.mean(kept)), seconds)


def together(dice: dict[str, dict[str, float]]) -> dict[str, float]:
    """Site of the student -> `Pool.dice` of it, as `Cell.dice` has them."""
    found = {
        "all": float(np.mean([one["all"] for one in dice.values()])),
        "own": float(np.mean([one[f"site {name}"] for name, one in dice.items()])),
    }
    for name, one in dice.items():
        for tested in dice:
            found[f"student {name} on {tested}"] = one[f"site {tested}"]
    for key in next(iter(dice.values())):
        if key.startswith("group "):
            found[key] = float(np.mean([one[key] for one in dice.values()]))
    return found


def table(cells: Sequence[Cell]) -> str:
    """Markdown, a row each: means over the seeds, each seed's own value behind, the gain over `REFERENCE`."""
    head = [
        "painter",
        "own site",
        "all sites",
        f"all sites over {REFERENCE}",
        "worst site, own",
        "kept",
        "CPU s",
    ]
    by_row: dict[Row, dict[int, Cell]] = {}
    for cell in cells:
        by_row.setdefault(cell.row, {})[cell.seed] = cell
    reference = by_row.get(Row(REFERENCE), {})
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row, mine in by_row.items():
        found = list(mine.values())
        over = [one.dice["all"] - reference[s].dice["all"] for s, one in mine.items() if s in reference]
        worst = [
            min(v - reference[s].dice[k] for k, v in one.dice.items() if _is_own(k))
            for s, one in mine.items()
            if s in reference
        ]
        columns = [
            str(row),
            spread(one.dice["own"] for one in found),
            spread(one.dice["all"] for one in found),
            spread(over, digits=4),
            spread(worst, digits=4),
            f"{np.mean([one.images for one in found]):.0f}",
            f"{np.mean([one.cpu_s for one in found]):.0f}",
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def _is_own(key: str) -> bool:
    """Whether a key of `Cell.dice` is of a student on its own site."""
    name, _, tested = key.removeprefix("student ").partition(" on ")
    return key.startswith("student ") and name == tested


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument(
        "--rows", default=",".join([*ALONE, NETWORK, *PAINTERS]), metavar="PAINTER[:DETAIL],..."
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every cell here")
    given = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    try:
        load_recipe(given.recipe, given.overrides)
        rows = [Row.parse(text) for text in given.rows.split(",")]
        kept = CellFile(given.json, given.recipe, given.overrides, Cell)
        seeds = [int(seed) for seed in given.seeds.split(",")]
        cells = compare(seeds, rows, kept, Study().measure)
    except WardroundError as error:
        parser.exit(error.exit_code, f"{error}\n")
    sys.stdout.write(table(cells) + "\n")


if __name__ == "__main__":
    main()
