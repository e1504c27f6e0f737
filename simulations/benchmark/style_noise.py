"""What noise does to the style summaries of a recipe's sites: which groups are told, and how far off.

    python -m simulations.benchmark.style_noise [RECIPE] [--epsilons 0.5,1,2,8] [--seeds 0,1,2]
        [--json FILE] [key=value ...]

With each seed the sites are cut, and every labelled training patient is looked at once; nothing is trained.
The noise is that of a release of each epsilon at ``privacy.delta``, drawn `DRAWS` times from a seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from numpy.typing import NDArray

from client.dp.randomness import SeededRandomness
from client.noised_style import CELLS, COUNT, TICKS, noised, summary_of, summed, told_cells
from client.patients import Split, of_split
from client.site import Site
from client.style import summarise_style
from common.config import load_recipe
from common.errors import WardroundError
from common.privacy.plan import PlanSettings, one_release
from common.recipe import Recipe
from common.style import StyleSummary
from simulations.simulate import prepare_sites

DRAWS = 20
COLOURS = [0, 1, 2, 6, 7, 8]  # of `common.style.STYLE_FIELDS`: the mean colours, 0 to 1


@dataclass(frozen=True)
class Row:
    """One epsilon over all seeds, sites and draws.

    Attributes:
        deviation: of the noise on a cell's count, patients.
        groups: told a site; ``of``: that have enough patients; ``found``: of these, that are told.
        false: told a site, and with nobody in it.
        error: mean absolute difference of a told group's colours from those without noise, 0 to 1.
        distance: the same of each group as a site shares it without privacy, from the nearest told.
    """

    epsilon: float | None
    deviation: float
    groups: float
    of: float
    found: float
    false: float
    error: float
    distance: float


@dataclass(frozen=True)
class Look:
    """A site's sums without noise, and its groups by k-means."""

    sums: NDArray[np.int64]
    clustered: StyleSummary
    limits: tuple[int, int]


def looks(recipe: Recipe, folder: Path) -> Iterator[Look]:
    """Of every site of ``recipe``, which is cut into ``folder``."""
    size, groups = recipe.data.image_size, recipe.generator.style_groups
    for name in prepare_sites(recipe, folder):
        site = Site.open(folder / name)
        train = of_split(site.patients(recipe.data, recipe.run.seed), Split.train)
        labelled, least = [patient for patient in train if patient.labelled], site.policy.min_group_patients
        sums = summed(labelled, size, recipe.privacy.max_images_per_patient)
        yield Look(sums, summarise_style(labelled, size, groups, least, 0), (least, groups))


def measure(found: Sequence[Look], epsilon: float | None, delta: float) -> Row:
    """``epsilon`` None: without noise."""
    settings = PlanSettings(1, 1.0, 1, delta)  # how many patients there are decides nothing of the noise
    plan = None if epsilon is None else one_release("style", epsilon, settings)
    deviation = 0.0 if plan is None else plan.noise_multiplier / COUNT
    told: list[tuple[int, int, int, int]] = []  # groups, of, found, false
    errors, distances = list[float](), list[float]()
    for look, draw in product(found, range(1 if plan is None else DRAWS)):
        source, exact = SeededRandomness(draw), look.sums / TICKS
        sums = exact if plan is None else noised(look.sums, plan, source)
        cells, counts = list(told_cells(sums, deviation, look.limits)), exact[:, 0] / COUNT
        large = {cell for cell in range(CELLS) if counts[cell] >= look.limits[0]}
        false = sum(int(counts[cell] == 0) for cell in cells)
        told.append((len(cells), len(large), len(large & set(cells)), false))
        whole = told_cells(exact, 0.0, (1, CELLS))
        truth = dict(zip(whole, colours(summary_of(exact, 0.0, (1, CELLS))), strict=True))
        shown = colours(summary_of(sums, deviation, look.limits))
        errors += [distance(truth[c], own) for c, own in zip(cells, shown, strict=True) if counts[c] > 0]
        distances += [min(distance(one, own) for own in shown) for one in colours(look.clustered)]
    return Row(epsilon, deviation, *map(mean, (*zip(*told, strict=True), errors, distances)))


def colours(style: StyleSummary) -> list[NDArray[np.float64]]:
    return [np.array(group.mean)[COLOURS] for group in style.groups]


def distance(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return float(np.abs(one - other).mean())


def table(rows: Sequence[Row]) -> str:
    head = "epsilon  noise on a count  groups told  large ones told  empty  colour error  to k-means"
    lines = [
        f"{'none' if row.epsilon is None else row.epsilon:>7}  {row.deviation:16.2f}  {row.groups:11.2f}  "
        f"{row.found:6.2f} of {row.of:5.2f}  {row.false:5.2f}  {row.error:12.3f}  {row.distance:10.3f}"
        for row in rows
    ]
    return "\n".join([head, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="nuclei")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--epsilons", default="0.5,1,2,8")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    given = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    found: list[Look] = []
    try:
        for seed in given.seeds.split(","):
            recipe = load_recipe(given.recipe, [*given.overrides, f"run.seed={seed}"])
            with tempfile.TemporaryDirectory() as folder:
                found += looks(recipe, Path(folder))
        asked = [None, *map(float, given.epsilons.split(","))]
        rows = [measure(found, one, recipe.privacy.delta) for one in asked]
    except WardroundError as error:
        parser.exit(error.exit_code, f"{error}\n")
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    sys.stdout.write(f"{len(found)} sites of all seeds, {DRAWS} draws each\n{table(rows)}\n")


if __name__ == "__main__":
    main()
