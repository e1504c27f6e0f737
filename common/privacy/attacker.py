"""What an attacker who sees everything that was sent can do at most: true positives for false alarms.

Someone tries to tell, for each patient, whether that patient's images were used. The bound holds for every
attack, known or not, and is far below what (epsilon, delta) alone allows, because it uses the whole curve
delta(epsilon) of the same releases.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from scipy.special import ndtr, ndtri

from common.privacy.accounting import COARSE_INTERVAL, deltas_of, epsilon
from common.privacy.events import Event, Mechanism, gathered

FALSE_POSITIVE_RATES = (0.001, 0.01, 0.1)
LINES = 600  # of the curve's supporting lines that are tried; fewer only loosen the bound
FARTHEST_DELTA = 1e-12


def true_positive_rates(
    events: Iterable[Event], rates: Sequence[float] = FALSE_POSITIVE_RATES
) -> list[float]:
    """Largest true-positive rate of any attack at each of these false-positive ``rates``.

    Exact for Gaussians of all patients, else `curve_rates`.
    """
    releases = gathered(events)
    if not all(event.noised for event in releases):
        return [1.0 for _ in rates]
    if all(event.mechanism is Mechanism.gaussian and event.sample_rate == 1 for event in releases):
        return [gaussian_rate(gaussian_mu(releases), rate) for rate in rates]
    return curve_rates(releases, rates)


def curve_rates(events: Iterable[Event], rates: Sequence[float]) -> list[float]:
    """The least of ``min(e^eps a + delta, 1 - e^-eps (1 - delta - a))`` over the curve.

    Kairouz et al. 2015; Dong et al. 2022. Rounded pessimistically, so never below the truth.
    """
    releases = gathered(events)
    farthest = epsilon(releases, FARTHEST_DELTA, interval=COARSE_INTERVAL)
    epsilons = [farthest * (index / LINES) ** 2 for index in range(LINES + 1)]  # dense near 0
    curve = list(zip(epsilons, deltas_of(releases, epsilons, COARSE_INTERVAL), strict=True))
    return [min(1.0, min(_line(rate, *point) for point in curve)) for rate in rates]


def gaussian_mu(events: Iterable[Event]) -> float:
    """mu of the one Gaussian comparison, N(0, 1) against N(mu, 1), that these full-batch releases are."""
    return math.sqrt(sum(event.count * (event.group_size / event.noise_multiplier) ** 2 for event in events))


def gaussian_rate(mu: float, rate: float) -> float:
    """Phi(Phi^-1(rate) + mu): the best attack on one Gaussian release (Neyman and Pearson)."""
    return float(ndtr(ndtri(rate) + mu))


def crude_rate(epsilon_value: float, delta: float, rate: float) -> float:
    """What (epsilon, delta) alone would allow, for comparison."""
    if math.isinf(epsilon_value):
        return 1.0
    return min(1.0, _line(rate, epsilon_value, delta))


def _line(rate: float, epsilon_value: float, delta: float) -> float:
    """Both supporting lines at one point of the curve."""
    upper = math.exp(min(epsilon_value, 700.0)) * rate + delta
    return min(upper, 1.0 - math.exp(-epsilon_value) * (1.0 - delta - rate))
