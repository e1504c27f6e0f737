"""What few denoiser calls cost and save: the plan's solver beside DDIM in 100 steps (Song et al. 2021).

    python -m simulations.benchmark.sampling [RECIPE] [--seed 0] [--json FILE] [key=value ...]

Both sample the same styles, masks and noise with the same network, batch by batch in turn, so that a busy
machine slows both alike. Then each site trains one student on the images of either, of the same federated
teacher, for the same steps, and both students are tested on every site's test patients.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler

import client.generation as generation
from client.curation.quarantine import Screened
from client.generation import Sampling, Solver, plans_solver, synthesise
from client.painters import SyntheticSet
from client.teachers import SiteTeachers
from client.transfer.making import TransferMaker
from client.transfer.painting import Painter
from client.variants import VARIANTS
from common.config import load_recipe
from common.errors import WardroundError
from common.generator import SCHEDULE, generator_of, initial_adapter
from common.recipe import StyleDetail
from common.seeding import derive_rng
from simulations.benchmark.painters import FOREVER, Consortium
from simulations.benchmark.pool import Pool

LONG = 100
FASTER = 5.0  # times: what is promised
RESAMPLES = 2000


def ddim() -> Any:
    """DDIM without noise of its own, a hundred steps."""
    scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False, **SCHEDULE)
    scheduler.set_timesteps(LONG)
    return scheduler


@dataclass(frozen=True)
class Found:
    """What was measured.

    Attributes:
        ours_s, ddim_s: seconds an image, the median batch.
        times: the median of the batches' ratios, DDIM over ours.
        calls: denoiser calls an image of ours.
        ours_dice, ddim_dice: mean of the sites' students over all test patients.
        ci95: of the mean difference ours - DDIM, over patients drawn anew, each with all students.
        far: root mean square difference of the two solvers' pixels.
    """

    ours_s: float
    ddim_s: float
    times: float
    calls: float
    ours_dice: float
    ddim_dice: float
    ci95: tuple[float, float]
    far: float

    def faults(self) -> list[str]:
        """What of the promise does not hold."""
        found = []
        if self.times < FASTER:
            found.append(f"only {self.times:.1f} times faster than DDIM-{LONG}")
        if self.ci95[1] < 0:
            found.append("students of our images are worse, and not by chance")
        return found


class _Given(Painter):
    """A painter whose images were made before."""

    given: SyntheticSet

    def images(self, styles: str, painter: str | None = None) -> Screened:
        return Screened.whole(self.given)


def measure(pool: Pool, folder: Path) -> Found:
    """Times, and both students of every site; ``folder`` is empty, and takes the teacher's run."""
    consortium = Consortium.train(pool, folder)
    sampled: dict[str, list[SyntheticSet]] = {}
    clock: list[tuple[float, float]] = []
    before, made = generation.denoiser_calls, 0
    for name in sorted(consortium.sites):
        pair = in_turn(consortium, name, (plans_solver(consortium.plan), ddim), clock)
        sampled[name] = pair
        made += len(pair[0])
    calls = (generation.denoiser_calls - before) / made - LONG
    values = [_tested(consortium, pool, {n: sets[which] for n, sets in sampled.items()}) for which in (0, 1)]
    apart = [(ours.images - other.images).square().mean().item() for ours, other in sampled.values()]
    return Found(
        ours_s=statistics.median(one for one, _ in clock),
        ddim_s=statistics.median(two for _, two in clock),
        times=statistics.median(two / one for one, two in clock),
        calls=calls,
        ours_dice=float(values[0].mean()),
        ddim_dice=float(values[1].mean()),
        ci95=_interval(values[0].mean(0) - values[1].mean(0), pool.recipe.run.seed),
        far=float(np.sqrt(np.mean(apart))),
    )


def in_turn(
    consortium: Consortium, name: str, solvers: Sequence[Solver], clock: list[tuple[float, float]]
) -> list[SyntheticSet]:
    """The images of site ``name`` by each solver; each pair of times, seconds an image, goes to ``clock``."""
    plan, site = consortium.plan, consortium.sites[name]
    styles = [one for _, one in sorted(consortium.shared(StyleDetail.colour).items())]
    network = generator_of(plan.generator)
    adapter = initial_adapter(plan.generator, plan.seed)
    parts: list[list[SyntheticSet]] = [[] for _ in solvers]
    for start in range(0, plan.generator.images, generation.BATCH):
        size = min(generation.BATCH, plan.generator.images - start)
        batch = replace(plan, generator=replace(plan.generator, images=size))
        seed = site.draw_seed(plan, "synthetic", start)
        seconds = []
        for solver, kept in zip(solvers, parts, strict=True):
            started = time.process_time()  # wall time is the neighbours' too
            images = synthesise(network, adapter, styles, batch, seed, Sampling(solver))
            taken = time.process_time() - started
            seconds.append(taken / size)
            kept.append(images)
        clock.append((seconds[0], seconds[1]))
    return [
        SyntheticSet(torch.cat([one.images for one in kept]), torch.cat([one.masks for one in kept]))
        for kept in parts
    ]


def _tested(consortium: Consortium, pool: Pool, images: dict[str, SyntheticSet]) -> np.ndarray:
    """(students, patients): the Dice of each site's student, taught with its ``images``, on everybody."""
    rows = []
    for name, given in sorted(images.items()):
        train = consortium.patients(name)
        labelled = [patient for patient in train if patient.labelled]
        site, plan = consortium.sites[name], consortium.plan
        teachers = SiteTeachers(site, plan, consortium.teacher, labelled, FOREVER)
        painter = _Given(site, plan, {}, None, labelled, FOREVER)
        object.__setattr__(painter, "given", given)
        student, _ = consortium.distilled(name, TransferMaker(teachers, painter, train), VARIANTS["student"])
        rows.append(pool.each(student)["all"])
    return np.array(rows)


def _interval(differences: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % of the means of ``differences`` (one a patient), drawn with replacement."""
    rng = derive_rng(seed, "patients drawn anew")
    drawn = differences[rng.integers(len(differences), size=(RESAMPLES, len(differences)))].mean(1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(low), float(high)


def table(found: Found) -> str:
    rows = [
        ("denoiser calls an image", f"{found.calls:.0f}", str(LONG)),
        ("CPU s an image", f"{found.ours_s:.3f}", f"{found.ddim_s:.3f}"),
        ("times faster, paired", f"{found.times:.2f}", "1"),
        ("students, all sites (Dice)", f"{found.ours_dice:.4f}", f"{found.ddim_dice:.4f}"),
        ("difference, 95 % interval", f"{found.ci95[0]:+.4f} to {found.ci95[1]:+.4f}", ""),
        ("pixels apart (root mean square)", f"{found.far:.3f}", ""),
    ]
    lines = [f"| | ours | DDIM-{LONG} |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    given = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    try:
        recipe = load_recipe(given.recipe, [*given.overrides, f"run.seed={given.seed}"])
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Pool.prepare(recipe, Path(folder) / "pool"), Path(folder) / "run")
    except WardroundError as error:
        parser.exit(error.exit_code, f"{error}\n")
    if given.json:
        given.json.write_text(json.dumps(asdict(found), indent=1) + "\n")
    sys.stdout.write(table(found) + "\n")
    if found.faults():
        parser.exit(22, "; ".join(found.faults()) + "\n")


if __name__ == "__main__":
    main()
