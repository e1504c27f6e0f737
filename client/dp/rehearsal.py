"""Does this build do what it claims? Tests of noise, draw and clip on made-up data, through the real engine.

They run before a patient's image is read, as often as a site likes, and cost no privacy. A threshold is set
so that a right build fails one test in a thousand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from client.dp.mechanism import ClippedSum, Execution, PrivateGradient
from client.dp.poisson import PoissonSampler
from client.dp.randomness import Randomness
from client.dp.tasks import PrivateTask

LEVEL = 0.001  # of each test: how often it fails a right build
BAND = float(stats.norm.isf(LEVEL / 2))  # standard errors
WIDTH = 5000  # trained numbers of the rehearsal's network
OVERSHOOT = 1e-5  # of the clipping norm, left to rounding
PLOTTED = 99  # quantiles of the noise
HUGE = 1e6  # of the clipping norm: how long an outlier's gradient is


@dataclass(frozen=True)
class RehearsalTerms:
    """Terms of a step (`client.dp.mechanism.StepTerms`) for made-up patients."""

    noise_std: float
    max_grad_norm: float
    steps: int
    sample_rate: float = 0.5
    max_images_per_patient: int = 10
    expected_batch: float = 5.0


class MadeUpTask(PrivateTask):
    """A linear layer of `WIDTH` weights and a table of inputs, whose mean output, scaled, is the loss.

    A patient's gradient is ``scale`` times the mean of its rows.
    """

    def __init__(self, table: Tensor, patients: Sequence[Sequence[int]], scale: float) -> None:
        super().__init__()
        self.layer = nn.Linear(table.shape[1], 1, bias=False)
        self.patients, self._table, self._scale = patients, table, scale

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        weight = self.layer.weight
        assert isinstance(weight, nn.Parameter)
        return {"weight": weight}

    def inputs(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (self._table[rows],)

    def forward(self, *inputs: Tensor) -> Tensor:
        losses: Tensor = self.layer(inputs[0])[:, 0] * self._scale
        return losses


@dataclass(frozen=True)
class NoiseCheck:
    """What was found of ``count`` numbers of noise, in units of the claimed standard deviation.

    Attributes:
        std: of the noise about zero; 1 is claimed.
        std_allowed: how far from 1 a right build strays.
        ks_p: Kolmogorov and Smirnov's p for N(0, 1).
        neighbours, steps: correlation of neighbouring numbers and of the same number in two steps.
        correlation_allowed: how far from 0 a right build strays.
        repeats: numbers that came again at the same place in another step, beyond chance in float32.
        quantiles: (expected of N(0, 1), found), at `PLOTTED` evenly spaced shares: for a picture.
    """

    count: int
    std: float
    std_allowed: float
    ks_p: float
    neighbours: float
    steps: float
    correlation_allowed: float
    repeats: int
    quantiles: tuple[tuple[float, float], ...] = ()

    @property
    def passed(self) -> bool:
        return (
            abs(self.std - 1) <= self.std_allowed
            and self.ks_p > LEVEL
            and max(abs(self.neighbours), abs(self.steps)) <= self.correlation_allowed
            and self.repeats == 0
        )


def check_noise(source: Randomness, noise_std: float, max_grad_norm: float, count: int) -> NoiseCheck:
    """Run whole steps whose gradient is zero: what comes out is the noise, divided by the expected batch.

    Args:
        noise_std: the claim, sigma C.
        count: numbers to look at, in steps of `WIDTH`; at least two steps.
    """
    terms = RehearsalTerms(noise_std, max_grad_norm, steps=max(2, count // WIDTH))
    task = MadeUpTask(torch.ones(10, WIDTH), [[row] for row in range(10)], scale=0.0)
    mechanism = PrivateGradient(task, task.trained, terms, source)
    drawn = torch.stack([mechanism.step(index)["weight"].flatten() for index in range(terms.steps)])
    noise = drawn.double().numpy() * (terms.expected_batch / noise_std)
    flat = noise.ravel()
    return NoiseCheck(
        count=flat.size,
        std=float(sqrt(np.square(flat).mean())),
        std_allowed=BAND / sqrt(2 * flat.size),
        ks_p=float(stats.kstest(flat, "norm").pvalue),
        neighbours=float(np.mean(flat[1:] * flat[:-1])),
        steps=float(np.mean(noise[1:] * noise[:-1])),
        correlation_allowed=BAND / sqrt(flat.size - WIDTH),
        repeats=_repeats(noise),
        quantiles=_quantiles(flat),
    )


def _quantiles(noise: np.ndarray) -> tuple[tuple[float, float], ...]:
    shares = np.arange(1, PLOTTED + 1) / (PLOTTED + 1)
    pairs = zip(stats.norm.ppf(shares), np.quantile(noise, shares), strict=True)
    return tuple((round(float(expected), 6), round(float(found), 6)) for expected, found in pairs)


def _repeats(noise: np.ndarray) -> int:
    """Steps that share more than a hundredth of their numbers with the one before."""
    return int((np.mean(noise[1:] == noise[:-1], axis=1) > 0.01).sum())


@dataclass(frozen=True)
class SamplerCheck:
    """What was found of the draws, and how likely it or worse is if coins are independent (p, two-sided).

    Attributes:
        rate: the share of patient-steps drawn.
        counts_p: of how often each patient was drawn.
        variance_p: of the batch sizes' spread about N q, which shuffling makes nearly zero.
        empty: steps that drew nobody.
        asked_rate, patients, steps: q, N and how often was drawn.
        sizes: batch size -> steps that had it.
    """

    rate: float
    counts_p: float
    variance_p: float
    empty: int
    asked_rate: float
    patients: int
    steps: int
    sizes: dict[int, int]

    @property
    def passed(self) -> bool:
        return min(self.counts_p, self.variance_p) > LEVEL


def check_sampler(sampler: PoissonSampler, source: Randomness, steps: int) -> SamplerCheck:
    """Draw ``steps`` times and look at who came. Every patient of ``sampler`` has a row of its own."""
    owner = {row: place for place, rows in enumerate(sampler.patients) for row in rows}
    present = np.zeros((steps, len(sampler.patients)), dtype=bool)
    for step in range(steps):
        for rows in sampler.draw(source):
            present[step, owner[rows[0]]] = True
    return judge_draws(present, sampler.sample_rate)


def judge_draws(present: np.ndarray, rate: float) -> SamplerCheck:
    """``present`` (steps, patients), bool: who was drawn when, against independent coins of ``rate``."""
    steps, patients = present.shape
    sizes = present.sum(1)
    return SamplerCheck(
        rate=float(present.mean()),
        counts_p=_counts_p(present.sum(0), steps, rate),
        variance_p=_variance_p(sizes, patients, rate),
        empty=int((sizes == 0).sum()),
        asked_rate=rate,
        patients=patients,
        steps=steps,
        sizes={
            int(size): int(count) for size, count in zip(*np.unique(sizes, return_counts=True), strict=True)
        },
    )


def _counts_p(counts: np.ndarray, steps: int, rate: float) -> float:
    """Of how far the patients' counts lie from T q: too far, or too near for coins."""
    if rate == 1:
        return float((counts == steps).all())
    spread = float(np.square(counts - steps * rate).sum()) / (steps * rate * (1 - rate))
    return float(2 * min(stats.chi2.cdf(spread, len(counts)), stats.chi2.sf(spread, len(counts))))


def _variance_p(sizes: np.ndarray, patients: int, rate: float) -> float:
    """Of the mean square of many batch sizes about their mean, by the binomial's own fourth moment."""
    variance = patients * rate * (1 - rate)
    spread = variance * (1 + (2 * patients - 6) * rate * (1 - rate))  # fourth moment less variance squared
    found = float(np.square(sizes - patients * rate).mean())
    if spread < 1e-12:  # everybody in every step, or one patient with a fair coin: the square is certain
        return float(abs(found - variance) < 1e-9)
    return float(2 * stats.norm.sf(abs(found - variance) / sqrt(spread / len(sizes))))


@dataclass(frozen=True)
class ClipCheck:
    """The largest noiseless contribution of one patient, in units of the clipping norm, by kind of patient.

    Attributes:
        outlier: of a patient whose gradient is `HUGE` norms long.
        many_images: of one with ten images, each of them such.
        ordinary: of one whose gradient is half a norm long, which must come through as it is.
    """

    outlier: float
    many_images: float
    ordinary: float

    @property
    def passed(self) -> bool:
        return max(self.outlier, self.many_images) <= 1 + OVERSHOOT and abs(self.ordinary - 0.5) <= OVERSHOOT


def check_clip(max_grad_norm: float, execution: Execution | None = None) -> ClipCheck:
    """Put three made-up patients through the clip, each alone."""
    rows = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(0))
    rows[0:11] = nn.functional.normalize(rows[0:11]) * HUGE
    rows[11] = nn.functional.normalize(rows[11], dim=0) / 2
    patients = [[0], list(range(1, 11)), [11]]
    task = MadeUpTask(rows * max_grad_norm, patients, scale=1.0)
    clipped = ClippedSum(task, task.trained, max_grad_norm, execution or Execution())
    found = [float(clipped([own]).double().norm()) / max_grad_norm for own in patients]
    return ClipCheck(*found)
