"""What every estimator does: fold the admitted updates of a round into an open rule, and say what it did."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median_low
from typing import Any, ClassVar

from server.aggregation import AggregationRule
from server.geometry import Geometry
from server.steps import Group, RoundSteps

# Nothing of one site may count for more than this many times the median site's: neither the norm of its
# change, nor the weight that it declares, which is a claim too. Of 380 honest changes that were measured (see
# server/outliers.py) 98 % lay within it, and the largest at 2.67.
BOUND = 1.5


@dataclass(frozen=True)
class Estimate:
    """What an estimator did.

    Attributes:
        counted: the sites whose updates are in the result.
        left_out: site -> reason, in fixed words, of those that are not.
        notes: plain values for the event log.
    """

    counted: list[str]
    left_out: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


class RobustEstimator(ABC):
    """One way to take the updates of a round together where some of them may be bad.

    Args:
        byzantine: how many bad sites are to be borne.
    """

    name: ClassVar[str]

    def __init__(self, byzantine: int) -> None:
        self.byzantine = byzantine

    def least_sites(self) -> int:
        """With fewer it bears nothing, or cannot be computed."""
        return 1

    @abstractmethod
    def fold(self, steps: RoundSteps, geometry: Geometry, rule: AggregationRule) -> Estimate:
        """Fold the sites of ``steps`` into ``rule``, whose round is open and empty.

        Args:
            geometry: of the same sites, in their order.
        """


def bounded_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """``weights``, at most ``BOUND`` times their median (of an even number, the lower one)."""
    bound = BOUND * median_low(weights.values())
    return {site: min(weight, bound) for site, weight in weights.items()}


def fold_weighted(
    steps: RoundSteps,
    rule: AggregationRule,
    weights: Mapping[str, float],
    lengths: Mapping[str, Mapping[Group, float]] | None = None,
) -> None:
    """Fold update after update, one in memory at a time; ``lengths``: site -> shares of its own steps."""
    for site in steps.sites:
        rule.fold(site, steps.trained(site, weights[site], None if lengths is None else lengths[site]))
