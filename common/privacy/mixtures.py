"""Privacy loss of several records of one patient that are drawn and clipped each for itself.

With k records, each in a release with chance q, the sum of clipped gradients shifts by Binomial(k, q) clips:
a mixture of Gaussians (Choquette-Choo et al. 2023, arXiv 2310.15526). dp-accounting has the same event, but
solves for each point of its grid alone, which takes it minutes; here the grid is solved at once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import log_ndtr, logsumexp, ndtr

_Array = npt.NDArray[np.float64]
TAIL = 9.8  # standard deviations: what lies beyond has a chance of e^-50
NEWTON_STEPS = 60
TOLERANCE = 1e-13


class BinomialMixture:
    """P = sum_i Binomial(k, q)(i) N(i, sigma^2) against Q = N(0, sigma^2), in units of the clip.

    log P/Q rises with the outcome x, so each set {log P/Q > epsilon} is a half line from `threshold`.
    """

    def __init__(self, noise_multiplier: float, sample_rate: float, group_size: int) -> None:
        self.sigma = noise_multiplier
        self.shifts = np.arange(group_size + 1, dtype=np.float64)
        logs = [math.lgamma(group_size + 1) - math.lgamma(i + 1) - math.lgamma(group_size - i + 1)
                + i * math.log(sample_rate) + (group_size - i) * math.log1p(-sample_rate)
                for i in range(group_size + 1)]  # fmt: skip
        self.log_chances = np.array(logs)
        self.floor = logs[0]  # log P/Q is above this everywhere

    def loss(self, outcome: float) -> float:
        """log P/Q at ``outcome``."""
        exponents = (2 * self.shifts * outcome - self.shifts**2) / (2 * self.sigma**2)
        return float(logsumexp(self.log_chances + exponents))

    def threshold(self, epsilons: _Array) -> _Array:
        """The outcome at which log P/Q is ``epsilons``; -inf where it is above that everywhere.

        Newton's method on the log of the terms that shift at all, which is convex and at least linear. It
        starts where the largest term alone reaches the goal, right of the root, and so comes down to it.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            goal = epsilons + np.log(-np.expm1(self.floor - epsilons))
        reachable = epsilons > self.floor
        goal = np.where(reachable, goal, 0.0)
        shifts, logs, variance = self.shifts[1:, None], self.log_chances[1:, None], self.sigma**2
        outcomes: _Array = ((goal - logs) * variance / shifts + shifts / 2).min(axis=0)
        for _ in range(NEWTON_STEPS):
            terms = logs + (2 * shifts * outcomes - shifts**2) / (2 * variance)
            total = logsumexp(terms, axis=0)
            slope = (np.exp(terms - total) * shifts).sum(axis=0) / variance
            step = (total - goal) / slope
            outcomes = outcomes - step
            if float(np.abs(step).max(initial=0.0)) < TOLERANCE * self.sigma**2:
                break
        return np.where(reachable, outcomes, -np.inf)

    def deltas(self, epsilons: _Array, adding: bool) -> _Array:
        """Hockey-stick divergence at ``epsilons``: of P from Q, or of Q from P if ``adding``."""
        chances = np.exp(self.log_chances)[:, None]
        outcomes = self.threshold(-epsilons if adding else epsilons) / self.sigma
        places = outcomes - self.shifts[:, None] / self.sigma
        if adding:  # the half line below the threshold
            with np.errstate(divide="ignore"):
                weighted = np.exp(epsilons + np.log((chances * ndtr(places)).sum(axis=0)))
            raw = ndtr(outcomes) - weighted
        else:
            raw = (chances * ndtr(-places)).sum(axis=0) - np.exp(epsilons + log_ndtr(-outcomes))
        monotone: _Array = np.minimum.accumulate(np.clip(raw, 0.0, 1.0))
        return monotone

    def distribution(self, interval: float, adding: bool) -> Any:
        """The privacy loss on a grid, rounded pessimistically by Connect-the-Dots (arXiv 2207.04380)."""
        from dp_accounting.pld import pld_pmf

        low = self.loss(-TAIL * self.sigma)
        high = self.loss((0.0 if adding else float(self.shifts[-1])) + TAIL * self.sigma)
        low, high = (-high, -low) if adding else (low, high)
        first, last = math.floor(low / interval), math.ceil(high / interval)
        epsilons: _Array = np.arange(first, last + 1, dtype=np.float64) * interval
        return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(
            interval, first, last, self.deltas(epsilons, adding)
        )


def mixture_pld(noise_multiplier: float, sample_rate: float, group_size: int, interval: float) -> Any:
    """One release's privacy loss distribution of dp-accounting, for a group added or removed."""
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    mixture = BinomialMixture(noise_multiplier, sample_rate, group_size)
    return PrivacyLossDistribution(
        mixture.distribution(interval, adding=False), mixture.distribution(interval, adding=True)
    )
