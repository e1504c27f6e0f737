"""Items 10 to 14: noise, noise that falls short, the clip, the draw, and seeds that change nothing."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from client.account import MECHANISM, privacy_plan
from client.dp.mechanism import Execution, PrivateGradient
from client.dp.poisson import PoissonSampler
from client.dp.randomness import Randomness, SeededRandomness, SystemRandomness, open_randomness
from client.dp.rehearsal import HUGE, MadeUpTask, RehearsalTerms, check_clip, check_noise, check_sampler
from client.faults import border_answer
from common.errors import DataError, PolicyRefusal
from common.plan import Stage
from common.privacy.entries import EntryType
from simulations.privacy_exam.hospital import DECLARED, agreed, entries, make_home, order, private_plan, start
from simulations.privacy_exam.verdict import Verdict

ROOT = Path(__file__).resolve().parents[2]
SIGMAS = (0.5, 1.0, 4.0)
CLIP = 0.3
SMALL = 20_000  # numbers of noise in which ten percent are found
# Seeds everything that can be seeded, then draws coins and noise as a step does.
SEEDED_DRAWS = """
import random, sys
import numpy, torch
from client.dp.randomness import open_randomness
for seed in (random.seed, numpy.random.seed, torch.manual_seed):
    seed(0)
source = open_randomness(simulated=False)
coins, noise = source.uniforms(1000), source.normals((int(sys.argv[1]),)).numpy()
sys.stdout.buffer.write(coins.tobytes() + noise.tobytes())
"""


class Short(SeededRandomness):
    """Noise of ``share`` of what is asked for."""

    def __init__(self, seed: int, share: float) -> None:
        super().__init__(seed)
        self._share = share

    def normals(self, shape: Sequence[int]) -> Tensor:
        return super().normals(shape) * self._share


def item_10(count: int, seed: int | None = None) -> Verdict:
    """The noise of whole steps at three noise multipliers; of the system's randomness without a ``seed``."""
    found = []
    for sigma in SIGMAS:
        source: Randomness = SystemRandomness() if seed is None else SeededRandomness(seed + int(2 * sigma))
        found.append(check_noise(source, sigma * CLIP, CLIP, count))
    stds = ", ".join(f"{one.std:.4f}" for one in found)
    neighbours = max(abs(one.neighbours) for one in found)
    figure = f"{stds} of the claim; KS p from {min(one.ks_p for one in found):.3f}; lag 1 {neighbours:.4f}"
    limit = f"{found[0].std_allowed:.2%}; 0.001; {found[0].correlation_allowed:.4f}"
    passed = all(one.passed and one.count >= count for one in found)
    return Verdict("10", f"{count} numbers of noise, sigma 0.5, 1, 4", figure, limit, passed)


def item_11(repeats: int, count: int) -> Verdict:
    """Less noise, by the source and in the step's own arithmetic; and builds that are right."""
    source = sum(not check_noise(Short(seed, 0.9), 1.0, 1.0, SMALL).passed for seed in range(repeats))
    whole = PrivateGradient._noised

    def noised(self: PrivateGradient, clipped_sum: Tensor) -> Tensor:
        return whole(self, clipped_sum) * 0.9

    with patch.object(PrivateGradient, "_noised", noised):
        step = sum(not check_noise(SeededRandomness(seed), 1.0, 1.0, SMALL).passed for seed in range(repeats))
    slight = sum(not check_noise(Short(seed, 0.99), 1.0, 1.0, count).passed for seed in range(repeats))
    alarms = sum(not check_noise(SeededRandomness(seed), 1.0, 1.0, count).passed for seed in range(repeats))
    figure = (
        f"10 % found in {source} (source) and {step} (step) of {repeats} builds, "
        f"1 % in {slight}; {alarms} right builds refused"
    )
    limit = f"{repeats}; {repeats}; {repeats - repeats // 20}; at most {repeats // 20}"
    passed = source == step == repeats and slight >= repeats - repeats // 20 and alarms <= repeats // 20
    return Verdict(
        "11", f"rehearsals of builds with less noise, 1 % in {count} numbers", figure, limit, passed
    )


def item_12(count: int) -> Verdict:
    """Patients who would pass the clip, at norms over six orders of ten, by both ways to a gradient."""
    largest, off, stopped, tried = 0.0, 0.0, 0, 0
    for reference in (False, True):
        for number in range(count):
            found = check_clip(10 ** (6 * number / count - 3), Execution(16, reference))
            largest = max(largest, found.outlier, found.many_images)
            off = max(off, abs(found.ordinary - 0.5))
        for value in (math.nan, math.inf, -math.inf):
            tried += 1
            stopped += _stops_for_good(value, Execution(16, reference))
    figure = (
        f"{max(largest - 1, 0.0):.0e} above, an ordinary one off by {off:.0e}; not finite: {stopped} of "
        f"{tried} stop"
    )
    passed = largest <= 1 + 1e-5 and off <= 1e-5 and stopped == tried
    asked = f"clip: gradients {HUGE:.0e} C long, ten images, not finite; {count} norms"
    return Verdict("12", asked, figure, "1e-5; all stop", passed)


def _stops_for_good(value: float, execution: Execution) -> bool:
    """Whether one patient's ``value`` ends a round with nothing but a code, and every later step with it."""
    table = torch.ones(4, 8)
    table[2, 3] = value
    task = MadeUpTask(table, [[0], [1], [2], [3]], scale=1.0)
    terms = RehearsalTerms(1.0, 1.0, steps=2, sample_rate=1.0)
    mechanism = PrivateGradient(task, task.trained, terms, SystemRandomness(), execution)
    refusals = []
    for index in range(2):
        try:
            mechanism.step(index)
        except DataError as stop:
            refusals.append((border_answer(stop), str(value) in str(stop)))
    return refusals == [(("REFUSED_LOCAL", ""), False)] * 2


def item_13(steps: int, seed: int | None = None) -> Verdict:
    """Who is drawn by the coins of a hundred patients; and a step to which nobody came."""
    source: Randomness = SystemRandomness() if seed is None else SeededRandomness(seed)
    found = check_sampler(PoissonSampler([[row] for row in range(100)], 0.08, 1), source, steps)
    task = MadeUpTask(nn.functional.normalize(torch.ones(10, 5000)), [[row] for row in range(10)], scale=1.0)
    terms = RehearsalTerms(2.0, 1.0, steps=2)
    mechanism = PrivateGradient(task, task.trained, terms, source)
    with patch.object(PoissonSampler, "draw", lambda *_: []):
        noise = mechanism.step(0)["weight"].double() * terms.expected_batch / terms.noise_std
    off = abs(float(noise.square().mean().sqrt()) - 1)
    noised = off <= 4 / math.sqrt(2 * noise.numel()) and mechanism.steps_taken == 1
    charged = _charges_for_nobody()
    figure = (
        f"counts p {found.counts_p:.3f}, batch sizes p {found.variance_p:.3f}; an empty draw is "
        f"{'noised' if noised else 'NOT NOISED'} and {'charged' if charged else 'NOT CHARGED'}"
    )
    passed = found.passed and noised and charged
    return Verdict("13", f"{steps} draws of 100 patients", figure, "p > 0.001; noised, charged", passed)


def _charges_for_nobody() -> bool:
    """Whether a hospital books a round to which nobody came like any other, and sends its noise."""
    plan = private_plan()
    with tempfile.TemporaryDirectory() as name:
        home = make_home(Path(name))
        guard = agreed(home, plan)  # before: its rehearsal finds a sampler that draws nobody
        with patch.object(PoissonSampler, "draw", lambda *_: []):
            update = guard.adapt(order(plan, Stage.adapt), start(plan))
        booked = [entry.listed() for entry in entries(home, EntryType.reserve)]
        left = len(entries(home, EntryType.commit))
    terms = privacy_plan(plan.privacy, DECLARED)
    return booked == [[terms.event(1)]] and left == 1 and update.mechanism == MECHANISM


def item_14(count: int) -> Verdict:
    """Two processes that seed everything alike; then a seed for the mechanism itself."""
    drawn = []
    for _ in range(2):
        command = [sys.executable, "-c", SEEDED_DRAWS, str(count // 2)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        drawn.append(np.frombuffer(run.stdout))
    shared = np.intersect1d(drawn[0], drawn[1]).size
    refused = 0
    try:
        open_randomness(simulated=False, seed=0)
    except PolicyRefusal as refusal:
        refused += refusal.field == "randomness"
    try:
        SystemRandomness(0)  # type: ignore[call-arg]
    except TypeError:
        refused += 1
    refused += not SeededRandomness(0).secure
    figure = f"{shared} of {sum(part.size for part in drawn)} numbers in both; {refused} of 3 seeds refused"
    passed = shared == 0 and drawn[0].size == 1000 + count // 2 and refused == 3
    return Verdict("14", "two processes with one seed; a seed for the noise", figure, "0; 3", passed)
