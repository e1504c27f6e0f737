"""What encoder, decoder, adapter and pre-training each bring on real images.

``python -m simulations.benchmark.teachers RECIPE... [--seeds 0,1,2] [--rows NAME,...] [key=value ...]``

Every row is one teacher, adapted for the same number of steps on the same batches: the labelled training
patients of all the recipe's sites together, so that nothing but the row's own ingredient differs. It is then
tested on every site's test patients. Zero-shot rows see no label at all.
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
from torch import nn

from client.adaptation import adapt
from client.deadline import Deadline
from common import checkpoints, progress
from common.config import load_recipe
from common.plan import RunPlan
from common.recipe import DecoderTraining, Recipe
from common.seeding import derive_seed
from common.teacher import ResidentTeacher, Teacher, bare_teacher, select_head, shipped_teacher, teacher_slots
from simulations.benchmark.pool import Pool


@dataclass(frozen=True)
class Row:
    """One teacher: which parts keep their pre-trained weights, and what is trained."""

    name: str
    encoder: bool = True
    decoder: bool = True
    adapter: str = "base"
    train_decoder: str = "full"
    steps: bool = True
    learning_rate: float | None = None
    multi_scale: bool = True


ROWS = (
    Row("zero-shot, no label", steps=False),
    Row("fresh encoder, pre-trained decoder, no label", encoder=False, steps=False),
    Row("pre-trained, LoRA + decoder"),
    Row("random, LoRA + decoder", encoder=False, decoder=False),
    Row("random, everything trained", encoder=False, decoder=False, adapter="full", learning_rate=1e-3),
    Row("pre-trained, everything trained", adapter="full", learning_rate=1e-3),
    Row("pre-trained encoder, fresh decoder, LoRA + decoder", decoder=False),
    Row("pre-trained encoder, fresh decoder of one scale, LoRA + decoder", decoder=False, multi_scale=False),
    Row("fresh encoder, pre-trained decoder, LoRA + decoder", encoder=False),
    Row("pre-trained, decoder alone", adapter="decoder"),
    Row("pre-trained, bottleneck adapters + decoder", adapter="bottleneck"),
    Row("pre-trained, norms and biases + decoder", adapter="norm"),
    Row("pre-trained, LoRA + head", train_decoder="head"),
    Row("pre-trained, head alone", adapter="decoder", train_decoder="head"),
    Row("pre-trained, LoRA alone", train_decoder="frozen"),
)


class StudyTeacher(ResidentTeacher):
    """A teacher of its own for one row: parts that the row does without start from fresh weights."""

    def __init__(self, row: Row, plan: RunPlan, seed: int) -> None:
        name, data = plan.teacher.name, plan.data
        self.network = shipped_teacher(name, data.image_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % 2**63)
            fresh = bare_teacher(name)
            nn.init.normal_(fresh.encoder.get_parameter("vision_encoder.pos_embed"), std=0.02)
            fresh.encoder.resize_positions(data.image_size)
            if not row.multi_scale:
                fresh = Teacher(fresh.encoder, len(checkpoints.card(name)["heads"]), multi_scale=False)
        if not row.encoder:
            self.network.encoder.load_state_dict(fresh.encoder.state_dict())
        if not row.decoder:
            self.network.decoder, self.network.multi_scale = fresh.decoder, fresh.multi_scale
        heads = checkpoints.card(name)["heads"]
        select_head(self.network.decoder.head, [heads.index(item.like) for item in data.classes])
        self.slots = teacher_slots(self.network, plan.teacher)
        self.network.eval()


@dataclass(frozen=True)
class Study:
    """One recipe with one seed: the patients of all sites, pooled."""

    pool: Pool

    @classmethod
    def prepare(cls, recipe: Recipe, folder: Path) -> Study:
        return cls(Pool.prepare(recipe, folder))

    def run(self, row: Row) -> dict[str, float]:
        """Mean Dice over all test patients and over each group's, and the processor seconds of training."""
        planned = self.pool.plan
        decoder = DecoderTraining(row.train_decoder)
        settings = replace(planned.teacher, adapter=row.adapter, rank=None, decoder=decoder)
        if row.learning_rate is not None:
            settings = replace(settings, learning_rate=row.learning_rate)
        steps = planned.rounds * settings.steps
        plan = replace(planned, rounds=1, teacher=replace(settings, steps=steps))
        seed = derive_seed(plan.seed, "study")
        teacher = StudyTeacher(row, plan, derive_seed(seed, "fresh"))
        adapter = teacher.slots.initial(seed)
        started = time.process_time()
        if row.steps:
            adapter = adapt(teacher, adapter, self.pool.train, plan, (0, seed), Deadline(1e9)).adapter
        seconds = time.process_time() - started
        teacher.slots.write(adapter)
        found = {"trained": float(sum(p.numel() for p in teacher.slots.trainable().values()) * row.steps)}
        return {**found, **self.pool.dice(lambda tiles: teacher.network(tiles).logits), "cpu_s": seconds}


def study(
    name: str, overrides: Sequence[str], seeds: Sequence[int], rows: Sequence[Row]
) -> dict[str, dict[str, list[float]]]:
    """Row -> quantity (``all``, ``site ...``, ``group ...``, ``trained``, ``cpu_s``) -> one value a seed."""
    found: dict[str, dict[str, list[float]]] = {row.name: {} for row in rows}
    progress.stage(name, len(seeds) * len(rows))
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            recipe = load_recipe(name, [*overrides, f"run.seed={seed}"])
            prepared = Study.prepare(recipe, Path(folder))
            for row in rows:
                for key, value in prepared.run(row).items():
                    found[row.name].setdefault(key, []).append(value)
                progress.step(f"seed {seed}: {row.name}: {found[row.name]['all'][-1]:.3f}")
    progress.end()
    return found


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: means over the seeds, and each seed's value for all test patients together."""
    groups = sorted({key for values in found.values() for key in values if key.startswith("group ")})
    head = ["teacher", "trained", "Dice, all sites (seeds)", *(key.removeprefix("group ") for key in groups)]
    lines = ["| " + " | ".join([*head, "CPU s"]) + " |", "|---" * (len(head) + 1) + "|"]
    for row, values in found.items():
        each = " ".join(f"{value:.3f}" for value in values["all"])
        cells = [row, f"{values['trained'][0]:,.0f}", f"{np.mean(values['all']):.3f} ({each})"]
        cells += [f"{np.mean(values[key]):.3f}" for key in groups] + [f"{np.mean(values['cpu_s']):.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", help="numbers of the rows, from 0 (default: all)")
    parser.add_argument("--json", type=Path, help="also write every value here")
    given = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    rows = [ROWS[int(number)] for number in given.rows.split(",")] if given.rows else list(ROWS)
    found = study(given.recipe, given.overrides, [int(seed) for seed in given.seeds.split(",")], rows)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(table(found) + "\n")


if __name__ == "__main__":
    main()
