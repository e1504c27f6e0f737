"""No robustness: the exact mean by declared weights of what was admitted."""

from __future__ import annotations

from typing import ClassVar

from server.aggregation import AggregationRule
from server.geometry import Geometry
from server.robust.base import Estimate, RobustEstimator, fold_weighted
from server.steps import RoundSteps


class WeightedMean(RobustEstimator):
    name: ClassVar[str] = "none"

    def fold(self, steps: RoundSteps, geometry: Geometry, rule: AggregationRule) -> Estimate:
        fold_weighted(steps, rule, steps.weights())
        return Estimate(steps.sites)
