"""What models reach with few labels: Dice against labelled training patients a site, the rest unlabelled.

    python -m simulations.benchmark.low_label RECIPE [--labels 10,20,40,80] [--models NAME,...]
        [--seeds 0,1,2] [--json FILE] [--plot FILE.svg] [key=value ...]

The sites are cut once a seed, with the most labels that are asked for, and masks are then taken away: the
same images, the same test patients at every point of a curve, and who has a label among 10 has it among 20.
For each seed and number of labels the federation is walked once, and every model is trained from it: students
and baselines by the recipe's own names (``student``, ``teacher``, any of ``baselines``). Models of one point
differ in nothing but themselves.

FILE is rewritten after every point, and what it holds already is not measured again. Models that are asked
for later cost the walk of their points once more.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from client.app import app as client_app
from client.manifest_rows import read_manifest
from client.patients import Split
from client.site import Site, forget_patients
from common import progress
from common.config import load_recipe
from common.errors import DataError, UsageError, WardroundError
from common.names import BASELINES, POOLED_BASELINES
from common.plan import Stage
from common.recipe import Recipe, SiteConfig
from common.seeding import derive_rng
from server.collect import Collector
from server.events import EventLog
from server.phases import Walk
from simulations.baselines import train_pooled
from simulations.benchmark.aggregation import CellFile
from simulations.benchmark.label_plot import Curve, save_plot
from simulations.comparisons import (
    WHERE,
    SeedValues,
    compare,
    comparison_table,
    goal_lines,
)
from simulations.crosstest import CrossTest, cross_test
from simulations.loopback import LoopbackGrid, environment, task_identity
from simulations.results import ORDER
from simulations.simulate import prepare_sites

ALWAYS = ("teacher", "student")  # every walk makes them
MODELS = (*ALWAYS, "local_only", "local_only_scratch", "no_federation", "fedavg", "feddf", "centralised")


@dataclass(frozen=True)
class Row:
    """One point of one curve."""

    labels: int
    model: str


@dataclass(frozen=True)
class Cell:
    """One point with one seed.

    Attributes:
        values: site that has the model -> tested site -> Dice of each test patient, the mean over classes.
        cpu_s: processor seconds of the walk and of all models of the point, tests included.
    """

    row: Row
    seed: int
    cpu_s: float
    values: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)


def with_labels(recipe: Recipe, sites: Path, labels: int, folder: Path) -> Recipe:
    """``recipe`` at sites that know the masks of ``labels`` training patients each; manifests in ``folder``.

    Args:
        sites: as `prepare_sites` left them, with all masks.

    Raises:
        DataError: a site has fewer, or its manifest has no split column.
    """
    asked = {site.name: site for site in recipe.sites}
    found = []
    for home in sorted(path for path in sites.iterdir() if path.is_dir()):
        site = Site.open(home)
        path = folder / f"{site.name}.csv"
        _hide(site, recipe.run.seed, labels, path)
        given = asked.get(site.name, SiteConfig(site.name))
        found.append(replace(given, manifest=str(path), cut=None, phantom=None))
    return replace(recipe, cohort=None, sites=found)


def _hide(site: Site, seed: int, labels: int, path: Path) -> None:
    manifest = read_manifest(site.manifest)
    known = manifest.labelled_patients(Split.train)
    if not manifest.has_splits:
        raise DataError(f"site {site.name}: a low-label curve needs a split column in its manifest")
    if len(known) < labels:
        raise DataError(
            f"site {site.name}: {labels} labels are asked for and {len(known)} training patients have one; "
            "ask for fewer with --labels"
        )
    order = derive_rng(seed, site.name, "low label").permutation(len(known))
    kept = {known[place] for place in order[:labels]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "mask", "patient", "split", "spacing_mm", "group"])
        for row in manifest.rows:
            shown = row.mask if row.split != Split.train or row.patient in kept else None
            spacing = "" if row.spacing_mm is None else "x".join(map(repr, row.spacing_mm))
            files = [str(item.resolve()) if item else "" for item in (row.image, shown)]
            writer.writerow([*files, row.patient, row.split, spacing, row.group])


def measure(recipe: Recipe, models: Sequence[str], folder: Path) -> CrossTest:
    """The walk of ``recipe`` in ``folder`` up to its students, and ``models`` tested at every site."""
    at_sites = [name for name in models if name not in (*ALWAYS, *POOLED_BASELINES)]
    pooled = [name for name in models if name in POOLED_BASELINES]
    recipe = replace(recipe, baselines=at_sites)
    run, homes = folder / "run", folder / "sites"
    names = prepare_sites(recipe, homes)
    grid = LoopbackGrid(client_app, len(names))
    collector = Collector(grid, EventLog(run / "events.jsonl"), grid.window)
    with environment({"WARDROUND_SITES": str(homes)}), task_identity():
        walk = Walk(collector, recipe, run)
        walk.train()
    sites = [Site.open(homes / name) for name in names]
    train_pooled(pooled, sites, walk.plan)
    return cross_test(sites, walk.plan, walk.rules[Stage.adapt].global_adapter(), pooled)


def cells_of(crossed: CrossTest, labels: int, models: Sequence[str], cpu_s: float) -> list[Cell]:
    """One a model; several classes are taken together patient by patient."""
    by_class: dict[tuple[str, str, str], list[list[float | None]]] = {}
    seed = 0
    for tested, site in crossed.values.items():
        seed = site.seed
        for column in site.columns:
            if column.metric == "dice" and column.model in models:
                by_class.setdefault((column.model, column.trained_at, tested), []).append(column.values)
    cells = {model: Cell(Row(labels, model), seed, cpu_s) for model in models}
    for (model, trainer, tested), columns in by_class.items():
        cells[model].values.setdefault(trainer, {})[tested] = [
            _mean(row) for row in zip(*columns, strict=True)
        ]
    return list(cells.values())


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 6) if known else None


def run_points(kept: CellFile, labels: Sequence[int], models: Sequence[str], seeds: Sequence[int]) -> None:
    """Measure what ``kept`` lacks, and keep it there.

    Raises:
        DataError: a site has fewer labels than are asked for, or a site's training fails.
        FederationError: a walk ended early.
    """
    for seed in seeds:
        missing = {n: [m for m in models if kept.get(Row(n, m), seed) is None] for n in labels}
        if not any(missing.values()):
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            recipe = load_recipe(kept.about["recipe"], [*kept.about["overrides"], f"run.seed={seed}"])
            if recipe.cohort is not None:
                recipe = replace(recipe, cohort=replace(recipe.cohort, labelled=max(labels)))
            prepare_sites(recipe, folder / "whole")
            for count in (n for n in labels if missing[n]):
                progress.stage(f"seed {seed}, {count} labels a site: {', '.join(missing[count])}")
                here = folder / str(count)
                shown = with_labels(recipe, folder / "whole", count, here / "manifests")
                started = time.process_time()
                crossed = measure(shown, missing[count], here)
                for cell in cells_of(crossed, count, missing[count], time.process_time() - started):
                    kept.add(cell)
                forget_patients()
    progress.end()


def values_at(cells: Sequence[Cell], labels: int) -> list[SeedValues]:
    """What was measured with ``labels`` labels, by seed."""
    found = []
    for seed in sorted({cell.seed for cell in cells if cell.row.labels == labels}):
        mine = [cell for cell in cells if (cell.row.labels, cell.seed) == (labels, seed)]
        values = {
            (cell.row.model, trainer): {
                tested: np.array([np.nan if v is None else v for v in column])
                for tested, column in by_site.items()
            }
            for cell in mine
            for trainer, by_site in cell.values.items()
        }
        found.append(SeedValues(seed, values))
    return found


def curves_of(cells: Sequence[Cell], where: str) -> list[Curve]:
    """One a model, in the order of the results' tables; points that some seed lacks are left out."""
    labels = sorted({cell.row.labels for cell in cells})
    present = {cell.row.model for cell in cells}
    ordered = [model for model in ORDER if model in present] + sorted(present - set(ORDER))
    at = {count: values_at(cells, count) for count in labels}
    curves = []
    for model in ordered:
        points = [(count, compare(at[count], model, [], where)) for count in labels]
        known = [(count, found.mean, found.ci95) for count, found in points if found is not None]
        curves.append(Curve(model, known))
    return curves


def table(cells: Sequence[Cell]) -> str:
    """Markdown: a table for each of own and all, then the goals and the paired comparisons of each point."""
    labels = sorted({cell.row.labels for cell in cells})
    parts = []
    for where in WHERE:
        lines = [
            f"| Dice, tested on {where} | {' | '.join(f'{count} labels' for count in labels)} |",
            "|---" * (len(labels) + 1) + "|",
        ]
        for curve in curves_of(cells, where):
            shown = {
                count: f"{mean:.3f} [{low:.3f}, {high:.3f}]" for count, mean, (low, high) in curve.points
            }
            lines.append(f"| {curve.model} | {' | '.join(shown.get(count, '-') for count in labels)} |")
        parts.append("\n".join(lines))
    rivals = sorted({cell.row.model for cell in cells} - {"student"})
    for count in labels:
        seeds = values_at(cells, count)
        pairs = [(f"{count} labels", "student", rival) for rival in rivals]
        parts.append("\n".join([*comparison_table(seeds, pairs), "", *goal_lines(seeds)]))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--labels", default="10,20,40,80", help="labelled training patients a site")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every point here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves here, as SVG")
    given = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    models = [name for name in given.models.split(",") if name]
    try:
        if unknown := [name for name in models if name not in (*ALWAYS, *BASELINES)]:
            known = ", ".join((*ALWAYS, *BASELINES))
            raise UsageError(f"--models: no model {', '.join(unknown)}; known: {known}")
        labels, seeds = (sorted({int(n) for n in text.split(",")}) for text in (given.labels, given.seeds))
        kept = CellFile(given.json, given.recipe, given.overrides, Cell)
        run_points(kept, labels, models, seeds)
        if given.plot is not None:
            save_plot(given.plot, {where: curves_of(kept.cells, where) for where in WHERE})
    except WardroundError as error:
        parser.exit(error.exit_code, f"{error}\n")
    except ValueError:
        parser.exit(UsageError.exit_code, "--labels and --seeds are whole numbers, such as 10,20,40\n")
    sys.stdout.write(table(kept.cells) + "\n")


if __name__ == "__main__":
    main()
