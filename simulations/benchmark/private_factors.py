"""What a public A is worth under differential privacy, beside a random one and beside no factors at all.

``python -m simulations.benchmark.private_factors [RECIPE] [--seeds 0,1,2] [--arms 0,1] [key=value ...]``

Every arm is DP-FedSGD at the same epsilon with the real mechanism and the real rule: the same patients and
crops, the same draws, noise and schedule. Draws and noise come from a seed, so that a run repeats: a study of
procedural patients protects nobody. It is tested on all sites' test patients, as it starts and as it ends.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from client.account import privacy_plan
from client.dp.mechanism import Execution, PrivateGradient
from client.dp.randomness import SeededRandomness
from client.dp.tasks import segmentation_task
from client.patients import Patient, Split, of_split
from client.private_adaptation import PHYSICAL_BATCH, learning_rate
from client.site import Site
from common import progress
from common.adapter import AdapterUpdate
from common.config import load_recipe
from common.recipe import AggregationConfig, DecoderTraining, Recipe
from common.seeding import derive_seed
from common.teacher import ResidentTeacher, initial_adapter, private_initial_adapter, resident_teacher
from server.aggregation import Share, build_rule
from simulations.benchmark.pool import Pool

PATIENTS = 150  # of a site
SETTINGS = (
    "data.classes=[{name: vessel, label: 255, like: vessel}]", "generator.scope=none",
    "privacy.epsilon=8", "privacy.sample_rate=0.1", "privacy.steps=8", "privacy.max_images_per_patient=1",
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One way of training; ``public``: where the rows of A come from, if there are any."""

    name: str
    adapter: str
    decoder: str
    public: bool = True


ARMS = (
    Arm("head alone", "decoder", "head"),
    Arm("random A, head", "dp", "head", public=False),
    Arm("public A, head", "dp", "head"),
    Arm("decoder", "decoder", "full"),
    Arm("random A, decoder", "dp", "full", public=False),
    Arm("public A, decoder", "dp", "full"),
    Arm("random A alone", "dp", "frozen", public=False),
    Arm("public A alone", "dp", "frozen"),
)


@dataclass(frozen=True)
class Study:
    """One recipe with one seed, its sites cut.

    Attributes:
        train: site -> its labelled training patients.
    """

    pool: Pool
    train: dict[str, list[Patient]]

    @classmethod
    def prepare(cls, recipe: Recipe, folder: Path) -> Study:
        pool = Pool.prepare(recipe, folder)
        train = {}
        for name in pool.tests:
            patients = Site.open(folder / name).patients(pool.plan.data, pool.plan.seed)
            train[name] = [patient for patient in of_split(patients, Split.train) if patient.labelled]
        return cls(pool, train)

    def run(self, arm: Arm) -> dict[str, float]:
        """Mean Dice over all test patients before (``start``) and after (``all``), and each site's."""
        plan, started = self.pool.plan, time.process_time()
        decoder = DecoderTraining(arm.decoder)
        settings = replace(plan.teacher, adapter=arm.adapter, rank=None, decoder=decoder)
        teacher = resident_teacher(settings, plan.data)
        first = (private_initial_adapter if arm.public else initial_adapter)(settings, plan.data, plan.seed)
        rule = build_rule(AggregationConfig("ffa"), plan.privacy.momentum)
        rule.start(first, dict.fromkeys(self.train, Share.of(first)))
        teacher.slots.write(first)
        before = self._dice(teacher)["all"]
        mechanisms = {site: self._mechanism(teacher, site) for site in self.train}
        for index in range(plan.rounds):
            rule.open_round()
            for site, mechanism in mechanisms.items():
                sent = rule.adapter_for(site)
                with teacher.visit(sent, train=True):
                    noised = mechanism.step(index)
                rate = learning_rate(plan, index)
                moved = replace(sent, tensors={k: sent.tensors[k] - rate * v for k, v in noised.items()})
                rule.fold(site, AdapterUpdate(moved, 1.0, sent.digest))
            rule.close_round()
        teacher.slots.write(rule.global_adapter())
        return {"start": before, **self._dice(teacher), "cpu_s": time.process_time() - started}

    def _mechanism(self, teacher: ResidentTeacher, site: str) -> PrivateGradient:
        plan, patients = self.pool.plan, self.train[site]
        adapter = teacher.slots.read()
        with teacher.visit(adapter, train=True) as network:
            task = segmentation_task(network, adapter, patients, plan, None)
            source = SeededRandomness(derive_seed(plan.seed, "study", site))
            terms, execution = privacy_plan(plan.privacy, len(patients)), Execution(PHYSICAL_BATCH)
            return PrivateGradient(task, teacher.slots.trainable(), terms, source, execution)

    def _dice(self, teacher: ResidentTeacher) -> dict[str, float]:
        return self.pool.dice(lambda tiles: teacher.network(tiles).logits)


def recipe_of(name: str, overrides: Sequence[str], seed: int) -> Recipe:
    """Recipe ``name`` with `PATIENTS` phantoms of one image a site, `SETTINGS` and ``overrides``.

    They show vessels: under the demo's lesions the head alone gets all there is to be had.
    """
    each = ("anatomy=vessels", f"train_patients={PATIENTS}", "images_per_patient=1")
    phantoms = [
        f"sites.{site.name}.phantom.{setting}" for site in load_recipe(name).sites for setting in each
    ]
    chosen = ["teacher.adapter=decoder", "baselines=[]", *phantoms, *SETTINGS, *overrides]
    return load_recipe(name, [*chosen, f"run.seed={seed}"])


def study(
    name: str, overrides: Sequence[str], seeds: Sequence[int], arms: Sequence[Arm]
) -> dict[str, dict[str, list[float]]]:
    """Arm -> quantity (as `Study.run`) -> one value a seed."""
    found: dict[str, dict[str, list[float]]] = {arm.name: {} for arm in arms}
    progress.stage(name, len(seeds) * len(arms))
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            prepared = Study.prepare(recipe_of(name, overrides, seed), Path(folder))
            for arm in arms:
                for key, value in prepared.run(arm).items():
                    found[arm.name].setdefault(key, []).append(value)
                progress.step(f"seed {seed}: {arm.name}: {found[arm.name]['all'][-1]:.3f}")
    progress.end()
    return found


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: means over the seeds, and each seed's value for all test patients together."""
    lines = ["| trained under noise | at the start | Dice, all sites (seeds) | worst site | CPU s |",
             "|---|---|---|---|---|"]  # fmt: skip
    for arm, values in found.items():
        worst = min(float(np.mean(one)) for key, one in values.items() if key.startswith("site "))
        each = " ".join(f"{value:.3f}" for value in values["all"])
        start, mean, cpu = (float(np.mean(values[key])) for key in ("start", "all", "cpu_s"))
        lines.append(f"| {arm} | {start:.3f} | {mean:.3f} ({each}) | {worst:.3f} | {cpu:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", help="numbers of the arms, from 0 (default: all)")
    parser.add_argument("--json", type=Path, help="also write every value here")
    given = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    arms = [ARMS[int(number)] for number in given.arms.split(",")] if given.arms else list(ARMS)
    found = study(given.recipe, given.overrides, [int(seed) for seed in given.seeds.split(",")], arms)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(table(found) + "\n")


if __name__ == "__main__":
    main()
