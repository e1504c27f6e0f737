"""What one noised release does to privacy, as data: the events that are accounted and booked.

An `Event` holds the few numbers that decide the privacy loss, and says which event of dp-accounting it is.
It carries no epsilon: that depends on everything else that was released about the same patients.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from common.errors import ConfigError

LEAST_NOISE = 0.05  # multiplier: a release below it costs epsilon 200 and more, and its grid the memory


class Mechanism(StrEnum):
    gaussian = "gaussian"
    laplace = "laplace"


@dataclass(frozen=True, order=True)
class Event:
    """``count`` noised releases of one kind.

    Attributes:
        noise_multiplier: noise over sensitivity: standard deviation over clip (Gaussian), scale over
            sensitivity (Laplace). Below `LEAST_NOISE` a release counts as one without noise, which has no
            guarantee.
        sample_rate: chance of each patient to take part in one release, independently (Poisson); 1: all.
        count: releases, each charged, whether or not anyone was drawn.
        group_size: records of one patient that are each drawn and clipped for themselves. 1 unless two
            records turned out to be one person, or a plan clips images instead of patients.
    """

    noise_multiplier: float
    sample_rate: float
    count: int
    mechanism: Mechanism = Mechanism.gaussian
    group_size: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ConfigError(f"noise_multiplier {self.noise_multiplier} must be a number of at least 0")
        if not 0 < self.sample_rate <= 1:
            raise ConfigError(f"sample_rate {self.sample_rate} must be above 0 and at most 1")
        if self.count < 0 or self.group_size < 1:
            raise ConfigError("an event's count is at least 0 and its group_size at least 1")
        if self.mechanism is Mechanism.laplace and self.sample_rate != 1:
            raise ConfigError("a Laplace release is of all patients: sample_rate must be 1")

    @property
    def noised(self) -> bool:
        return self.noise_multiplier >= LEAST_NOISE

    def of_group(self, size: int) -> Event:
        """The same releases as a person with ``size`` records in them meets them."""
        return self if size == 1 else replace(self, group_size=self.group_size * size)

    def triple(self) -> list[float | int]:
        """As the ledger writes it: noise_multiplier, sample_rate, count."""
        return [self.noise_multiplier, self.sample_rate, self.count]

    def dp_event(self) -> Any:
        """The event of dp-accounting.

        A group of k records drawn independently shifts the sum by Binomial(k, q) clips: a mixture of
        Gaussians (Choquette-Choo et al. 2023, arXiv 2310.15526).
        """
        import dp_accounting

        if not self.noised:
            return dp_accounting.NonPrivateDpEvent()
        if self.mechanism is Mechanism.laplace:
            single = dp_accounting.LaplaceDpEvent(self.noise_multiplier / self.group_size)
        elif self.sample_rate == 1:
            single = dp_accounting.GaussianDpEvent(self.noise_multiplier / self.group_size)
        elif self.group_size > 1:
            clips = range(self.group_size + 1)
            chances = [binomial(self.group_size, self.sample_rate, number) for number in clips]
            single = dp_accounting.dp_event.MixtureOfGaussiansDpEvent(
                self.noise_multiplier, [float(number) for number in clips], chances
            )
        else:
            gaussian = dp_accounting.GaussianDpEvent(self.noise_multiplier)
            single = dp_accounting.PoissonSampledDpEvent(self.sample_rate, gaussian)
        return dp_accounting.SelfComposedDpEvent(single, self.count)


def binomial(trials: int, chance: float, successes: int) -> float:
    """Probability of exactly ``successes`` in ``trials`` independent draws of ``chance``."""
    share = chance**successes * (1 - chance) ** (trials - successes)
    return math.comb(trials, successes) * share


def gathered(events: Iterable[Event]) -> tuple[Event, ...]:
    """Equal kinds summed and in one order: the same releases always give the same tuple.

    So the epsilon of a run does not depend on how often it was interrupted or in which order it was booked.
    """
    counts: Counter[Event] = Counter()
    for event, times in Counter(events).items():
        counts[replace(event, count=1)] += event.count * times
    return tuple(replace(kind, count=count) for kind, count in sorted(counts.items()) if count)
