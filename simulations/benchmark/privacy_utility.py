"""What privacy costs in Dice: a recipe's noised steps at several epsilons, beside training without noise.

``python -m simulations.benchmark.privacy_utility RECIPE [--rows none:0,none:300,8,3:40:0.9] [--plot FILE.svg]
[key=value ...]``

A row is ``EPSILON:STEPS:RATE``; what it leaves out is the recipe's. ``none`` trains without noise: pooled,
on the same crops, by the optimiser of an ordinary round, and ``none:0`` is the teacher as it ships. ``best``
is what would be done if privacy did not matter: the whole decoder, on new crops at every step.

The noised rows are made by what makes them in a run: the plan's calibration, `PrivateGradient` at each site,
the server's rule with its momentum and its rounding. What a run has besides, and this has not, is the ledger
and the wire, which change no number; and the noise is of a seed, so that a cell can be had again. Nothing
here may be released.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from client.account import privacy_plan
from client.adaptation import adapt
from client.deadline import Deadline
from client.dp.mechanism import Execution, PrivateGradient
from client.dp.randomness import Randomness, SeededRandomness
from client.dp.tasks import segmentation_task
from client.evaluation import Forward
from client.measuring import model_path
from client.patients import Patient, Split, of_split
from client.private_adaptation import PHYSICAL_BATCH, learning_rate
from client.site import Site
from client.students import load_student
from client.workshop import Workshop
from common.adapter import Adapter, AdapterUpdate
from common.config import load_recipe
from common.errors import WardroundError
from common.plan import RunPlan
from common.precision import pack, unpack
from common.recipe import DecoderTraining, GeneratorScope, Recipe
from common.seeding import derive_seed
from common.teacher import ResidentTeacher, initial_adapter, resident_teacher
from server.aggregation import Share, build_rule
from simulations.benchmark.aggregation import CellFile, compare
from simulations.benchmark.pool import Pool
from simulations.benchmark.privacy_curve import curve, table
from simulations.benchmark.privacy_rows import Cell, Row

REFERENCE_BATCH = 8  # crops a site and step of training without noise


@dataclass(frozen=True)
class Sites:
    """The sites of one seed as a row sees them, with the one teacher that they share."""

    recipe: Recipe
    plan: RunPlan
    folders: dict[str, Site]
    train: dict[str, list[Patient]]
    teacher: ResidentTeacher

    @classmethod
    def of(cls, pool: Pool, row: Row) -> Sites:
        """Those of ``pool`` under ``row``: fewer patients if it says so, and its privacy."""
        whole = replace(pool.recipe.teacher, decoder=DecoderTraining.full)
        recipe = replace(
            pool.recipe,
            teacher=whole if row.best else pool.recipe.teacher,
            privacy=row.privacy(pool.recipe.privacy),
            generator=replace(pool.recipe.generator, scope=GeneratorScope.none),
        )
        plan = replace(
            pool.plan,
            teacher=recipe.teacher,
            privacy=recipe.privacy,
            rounds=recipe.privacy.steps,
            baselines=[],
        )
        folders = {site.name: Site.open(_folder(site.manifest)) for site in pool.recipe.sites}
        train = {
            name: [p for p in of_split(site.patients(plan.data, plan.seed), Split.train) if p.labelled]
            for name, site in folders.items()
        }
        kept = {name: patients[: row.patients] for name, patients in train.items()}
        return cls(recipe, plan, folders, kept, resident_teacher(recipe.teacher, plan.data))

    def first(self) -> Adapter:
        return initial_adapter(self.recipe.teacher, self.plan.data, self.plan.seed)


def _folder(manifest: str | None) -> Path:
    """The site's folder, as `prepare_sites` lays it out around its manifest."""
    assert manifest is not None, "a pool's recipe names a manifest for every site"
    return Path(manifest).parent.parent


def measure(pool: Pool, row: Row, students: bool = False) -> Cell:
    """One cell.

    Raises:
        ConfigError: the row is no privacy plan, or the recipe trains what has no private gradient.
    """
    sites = Sites.of(pool, row)
    noise, started = 0.0, time.process_time()
    if row.epsilon is None:
        adapter, steps = without_noise(sites, row)
    else:
        sources = {
            name: SeededRandomness(derive_seed(pool.recipe.run.seed, name, str(row)))
            for name in sorted(sites.train)
        }
        adapter, noise = noised(sites, sources)
        steps = sites.plan.rounds
    seconds = time.process_time() - started
    with sites.teacher.visit(adapter) as network:
        dice = pool.dice(lambda tiles: network(tiles).logits)
    patients = float(np.mean([len(found) for found in sites.train.values()]))
    made = trained_students(pool, sites, adapter) if students else {}
    return Cell(row, pool.recipe.run.seed, dice, seconds, steps, noise, patients, made)


def noised(sites: Sites, sources: dict[str, Randomness]) -> tuple[Adapter, float]:
    """The teacher after the plan's noised rounds, and the noise a coordinate of the site that has most.

    Args:
        sources: site -> of its coins and its noise.
    """
    plan, first = sites.plan, sites.first()
    rule = build_rule(plan.aggregation, plan.privacy.momentum)
    rule.start(first, {name: Share.of(first) for name in sites.train})
    slots = sites.teacher.slots
    with sites.teacher.visit(first, train=True) as network:
        mechanisms = {}
        for name, patients in sorted(sites.train.items()):
            terms = privacy_plan(plan.privacy, len(patients))
            task = segmentation_task(network, first, patients, plan, sites.folders[name].folder)
            execution = Execution(max(PHYSICAL_BATCH, terms.max_images_per_patient))
            mechanisms[name] = PrivateGradient(task, slots.trainable(), terms, sources[name], execution)
        for index in range(plan.rounds):
            rule.open_round()
            for name, mechanism in mechanisms.items():
                sent = rule.adapter_for(name)
                slots.write(sent)
                rate = learning_rate(plan, index)
                step = replace(sent, tensors={k: -rate * g for k, g in mechanism.step(index).items()})
                trained = sent.advanced(unpack(pack(step, plan.aggregation.wire_dtype)))
                rule.fold(name, AdapterUpdate(trained, float(mechanism.terms.patients), sent.digest))
            rule.close_round()
    return rule.global_adapter(), max(one.terms.noise_per_coordinate for one in mechanisms.values())


def without_noise(sites: Sites, row: Row) -> tuple[Adapter, int]:
    """The teacher after ``row.steps`` steps on all sites' patients together, and how many those were."""
    plan, first, steps = sites.plan, sites.first(), row.steps or 0
    if not steps:
        return first, 0
    pooled = [patient for found in sites.train.values() for patient in found]
    crops = sum(sample.mask is not None for patient in pooled for sample in patient.samples)
    settings = replace(
        plan.teacher,
        steps=steps,
        batch_size=REFERENCE_BATCH * len(sites.train),
        learning_rate=row.learning_rate or plan.teacher.learning_rate,
        cached_views=0 if row.best else crops,
    )
    plan = replace(plan, rounds=1, teacher=settings)
    seed = derive_seed(plan.seed, "without noise")
    return adapt(sites.teacher, first, pooled, plan, (0, seed), Deadline(float("inf"))).adapter, steps


def trained_students(pool: Pool, sites: Sites, adapter: Adapter) -> dict[str, float]:
    """What the sites' students reach that learn from ``adapter``, see `Cell.student`."""
    own, everywhere = [], []
    for name, site in sites.folders.items():
        Workshop(site, sites.plan, adapter, {}, None, sites.train[name], Deadline(float("inf"))).run()
        student = load_student(model_path(site, "student")).module
        forward: Forward = student
        dice = pool.dice(forward)
        own.append(dice[f"site {name}"])
        everywhere.append(dice["all"])
    return {"own": float(np.mean(own)), "worst": min(own), "all": float(np.mean(everywhere))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--rows", default="none:0,none:300,8,3,1", help="EPSILON:STEPS:RATE, ...")
    parser.add_argument("--patients", type=int, help="of each site, the first so many (default: all)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--students", action="store_true", help="also train the sites' students")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every cell here")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the curve here")
    given = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    try:
        load_recipe(given.recipe, given.overrides)
        rows = [Row.parse(text, given.patients) for text in given.rows.split(",")]
        kept = CellFile(given.json, given.recipe, given.overrides, Cell)
        seeds = [int(seed) for seed in given.seeds.split(",")]
        cells = compare(seeds, rows, kept, lambda pool, row, _: measure(pool, row, given.students))
        drawn = curve(cells) if given.plot else None
    except WardroundError as error:
        parser.exit(error.exit_code, f"{error}\n")
    sys.stdout.write(table(cells) + "\n")
    if drawn is not None:
        given.plot.write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
