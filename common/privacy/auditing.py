"""What an audit can say: lower bounds on epsilon from attacks, each with its confidence and its ceiling.

Whoever audits guesses, for canaries or patients of whom an independent fair coin decided whether they were
used, which of them were. Too many right guesses contradict a claimed epsilon; few of them prove nothing. So
beside every lower bound stands the largest one that an audit of that size could have given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import betainc, betaincinv, ndtri

ALPHA = 0.05  # how often a bound may be above the truth
SHARES = (1.0, 0.5, 0.2)  # of the canaries, on which it is guessed: all, or those that stand out most
_PRECISION = 1e-9  # of a bound

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class OneRun:
    """What the guesses of one training say.

    Attributes:
        canaries: m, each with a coin of its own.
        guesses, right: r and v, of the share of canaries that gave the largest bound.
        lower: on epsilon, at confidence 1 - alpha for all shares together; 0 says nothing.
        ceiling: ``lower`` had every guess been right.
    """

    canaries: int
    guesses: int
    right: int
    lower: float
    ceiling: float


def one_run_p_value(epsilon: float, counts: tuple[int, int, int], delta: float) -> float:
    """The chance of so many right guesses, or more, under (``epsilon``, ``delta``)-privacy; an upper bound.

    Steinke, Nasr and Jagielski 2023 (arXiv 2305.08846), theorem 5.2:
    ``b + 2 m delta max over i of (P[X >= v - i] - b) / i`` with ``b = P[X >= v]``, X binomial of r draws
    with chance 1 / (1 + e^-epsilon).

    Args:
        counts: canaries m, guesses r <= m, right ones v <= r.
    """
    canaries, guesses, right = counts
    chance = 1 / (1 + math.exp(-epsilon))
    if right == 0:
        return 1.0
    fewer: _Array = np.arange(right - 1, -1, -1, dtype=np.float64)  # v - i for i from 1 to v
    reached = _at_least(np.array([float(right)]), guesses, chance)[0]
    gains = (_at_least(fewer, guesses, chance) - reached) / np.arange(1, right + 1)
    return float(min(1.0, reached + 2 * canaries * delta * gains.max()))


@lru_cache(maxsize=4096)
def one_run_epsilon(counts: tuple[int, int, int], delta: float, alpha: float = ALPHA) -> float:
    """The largest epsilon that ``counts`` (as for `one_run_p_value`) reject at level ``alpha``; 0: none.

    Guarantee: under (epsilon, delta)-privacy it is above epsilon in at most a share ``alpha`` of audits
    whose number of guesses was fixed beforehand.
    """

    def excess(epsilon: float) -> float:
        return one_run_p_value(epsilon, counts, delta) - alpha

    if excess(0.0) >= 0:
        return 0.0
    high = 1.0
    while excess(high) < 0:
        high *= 2
    return max(0.0, float(brentq(excess, 0.0, high, xtol=_PRECISION)) - _PRECISION)


def one_run(
    scores: Sequence[float],
    inside: Sequence[bool],
    delta: float,
    alpha: float = ALPHA,
    shares: Sequence[float] = SHARES,
) -> OneRun:
    """Guess that those of the highest scores were used and those of the lowest were not.

    Guarantee: at most a share ``alpha`` of audits has ``lower`` above the true epsilon, where ``inside`` are
    independent fair coins: each of the ``shares`` that is tried has its part of alpha (Bonferroni).

    Raises:
        ValueError: there are fewer than two canaries, a score is not finite, or the lengths differ.
    """
    known: npt.NDArray[np.bool_] = np.asarray(inside, dtype=bool)
    if len(scores) != len(known) or len(known) < 2 or not np.isfinite(scores).all():
        raise ValueError("an audit wants two canaries or more, each with a finite score and a coin")
    order = _ascending(scores)
    found = []
    for guesses in _guess_counts(len(known), shares):
        out, used = order[: guesses // 2], order[len(order) - (guesses - guesses // 2) :]
        right = int((~known[out]).sum() + known[used].sum())
        counts = (len(known), guesses, right)
        found.append((one_run_epsilon(counts, delta, alpha / len(shares)), right / guesses, counts))
    lower, _, counts = max(found)
    return OneRun(*counts, lower, one_run_ceiling(len(known), delta, alpha, shares))


def one_run_ceiling(
    canaries: int, delta: float, alpha: float = ALPHA, shares: Sequence[float] = SHARES
) -> float:
    """The bound of `one_run` if every guess is right."""
    counts = ((canaries, guesses, guesses) for guesses in _guess_counts(canaries, shares))
    return max(one_run_epsilon(count, delta, alpha / len(shares)) for count in counts)


def _guess_counts(canaries: int, shares: Sequence[float]) -> list[int]:
    return [max(2, round(share * canaries)) for share in shares]


def _ascending(scores: Sequence[float]) -> npt.NDArray[np.int64]:
    """Places by score. Equal scores come in an order that has nothing to do with who stands where."""
    shuffled = np.random.default_rng(0).permutation(len(scores))
    return shuffled[np.argsort(np.asarray(scores, dtype=np.float64)[shuffled], kind="stable")]


def _at_least(successes: _Array, trials: int, chance: float) -> _Array:
    """P[X >= each of ``successes``], X binomial; by the incomplete beta function."""
    certain = successes <= 0
    inner: _Array = np.where(certain, 1.0, successes)
    tails: _Array = np.where(certain, 1.0, betainc(inner, trials - inner + 1, chance))
    return tails


def clopper_pearson(successes: int, trials: int, alpha: float = ALPHA) -> tuple[float, float]:
    """The exact interval of a chance, ``alpha`` / 2 on either side (Clopper and Pearson 1934)."""
    low = 0.0 if successes == 0 else float(betaincinv(successes, trials - successes + 1, alpha / 2))
    high = 1.0 if successes == trials else float(betaincinv(successes + 1, trials - successes, 1 - alpha / 2))
    return low, high


def multi_run_epsilon(found: int, cleared: int, trainings: int, delta: float, alpha: float = ALPHA) -> float:
    """A lower bound on epsilon from ``trainings`` with one canary and as many without it; 0: nothing.

    ``max(ln((TPR - delta) / FPR), ln((TNR - delta) / FNR))``, each rate at its end of an exact interval
    (Jagielski et al. 2020; Nasr et al. 2021), both at once with confidence 1 - ``alpha``.

    Args:
        found: trainings with the canary that a threshold, fixed beforehand, calls so.
        cleared: trainings without it that it calls so.
    """
    hit, spared = clopper_pearson(found, trainings, alpha)[0], clopper_pearson(cleared, trainings, alpha)[0]
    ratios = ((hit - delta) / (1 - spared), (spared - delta) / (1 - hit))
    return max(0.0, *(math.log(ratio) for ratio in ratios if ratio > 0))


@dataclass(frozen=True)
class Area:
    """Area under the ROC curve, and its 95 % interval. 0.5 is guessing."""

    value: float
    low: float
    high: float


def area(inside: Sequence[float], outside: Sequence[float]) -> Area:
    """How often one who was used has a higher score than one who was not; ties count half.

    DeLong, DeLong and Clarke-Pearson 1988. Where their variance is 0, as for a perfect attack, Hoeffding's
    interval for as many independent pairs stands in.

    Raises:
        ValueError: a side is empty.
    """
    used, others = np.asarray(inside, dtype=np.float64), np.asarray(outside, dtype=np.float64)
    if not len(used) or not len(others):
        raise ValueError("the area under a curve wants someone on each side")
    wins = (used[:, None] > others) + 0.5 * (used[:, None] == others)
    value, pairs = float(wins.mean()), min(len(used), len(others))
    variance = 0.0
    if pairs > 1:
        variance = wins.mean(1).var(ddof=1) / len(used) + wins.mean(0).var(ddof=1) / len(others)
    half = -ndtri(ALPHA / 2) * math.sqrt(variance) or math.sqrt(math.log(2 / ALPHA) / (2 * pairs))
    return Area(value, max(0.0, value - float(half)), min(1.0, value + float(half)))


@dataclass(frozen=True)
class Rate:
    """Share of those used that are named while at most a share ``fpr`` of the others is.

    ``value``, ``low`` and ``high`` (exact, at the threshold that the others gave) are None where one false
    alarm is already more than that share: not ``measurable``.
    """

    fpr: float
    value: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def measurable(self) -> bool:
        return self.value is not None


def rate_at(fpr: float, inside: Sequence[float], outside: Sequence[float]) -> Rate:
    """The true-positive rate at the false-positive rate ``fpr``."""
    alarms = math.floor(fpr * len(outside) + 1e-9)
    if alarms < 1:
        return Rate(fpr)
    threshold = sorted(outside, reverse=True)[alarms] if alarms < len(outside) else -math.inf
    named = sum(score > threshold for score in inside)
    return Rate(fpr, named / len(inside), *clopper_pearson(named, len(inside)))


def roc(inside: Sequence[float], outside: Sequence[float]) -> list[tuple[float, float]]:
    """(false-positive rate, true-positive rate) of every threshold, from (0, 0) to (1, 1)."""
    points = [(0.0, 0.0)]
    for threshold in sorted({*inside, *outside}, reverse=True):
        named = [sum(score >= threshold for score in side) / len(side) for side in (outside, inside)]
        points.append((named[0], named[1]))
    return points
