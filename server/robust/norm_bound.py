"""norm_bound: no site moves the result further than a site of ordinary size could.

In each group of tensors the bound is ``c`` times the median norm of the changes (`BOUND`; of an even number
the lower median, and sites that changed nothing have no say). A site beyond it is shortened along its own
steps: with ``A + t dA`` and ``B + t dB`` a layer changes by ``t (dB A + B dA) + t^2 dB dA``, whose squared
norm over all layers is a polynomial of t, known from three inner products. Declared weights are bounded
likewise. Then the mean is taken as always: where nothing is bounded, it is the exact weighted one.

Works with every rule and from one site on. It bears a change of absurd size; one of ordinary size counts as
any other does, so a single bad site of n still turns the result by up to ``c / n`` of an ordinary change.
With two sites the bound is that of the smaller change: neither can say which of them is wrong.
"""

from __future__ import annotations

import math
from statistics import median_low
from typing import ClassVar

from server.aggregation import AggregationRule
from server.geometry import Geometry
from server.robust.base import BOUND, Estimate, RobustEstimator, bounded_weights, fold_weighted
from server.steps import Group, RoundSteps

HALVINGS = 60  # of an interval of length 1: beyond float64's resolution


class NormBound(RobustEstimator):
    """Guarantee: in each group every folded change is at most ``BOUND`` times the median norm long."""

    name: ClassVar[str] = "norm_bound"

    def fold(self, steps: RoundSteps, geometry: Geometry, rule: AggregationRule) -> Estimate:
        lengths = {site: dict.fromkeys(Group, 1.0) for site in steps.sites}
        for group in geometry.moved():
            norms = geometry.norms(group).tolist()
            bound = BOUND * median_low(norm for norm in norms if norm > 0)
            for site, norm in zip(geometry.sites, norms, strict=True):
                if norm > bound:
                    lengths[site][group] = length_within(steps, site, group, bound)
        weights = steps.weights()
        bounded = bounded_weights(weights)
        fold_weighted(steps, rule, bounded, lengths)
        shortened = {site: found for site, found in lengths.items() if min(found.values()) < 1}
        lighter = {site: weight for site, weight in bounded.items() if weight < weights[site]}
        return Estimate(steps.sites, notes={"shortened": shortened, "weights_bounded": lighter})


def length_within(steps: RoundSteps, site: str, group: Group, bound: float) -> float:
    """A share t of the site's steps, 0 to 1, with which its change in ``group`` is at most ``bound`` long."""
    first = mixed = second = 0.0  # of ||t P + t^2 Q||^2 = first t^2 + 2 mixed t^3 + second t^4
    if group is Group.dense:
        moved = [steps.step(site, name) for name in steps.dense_names() if site in steps.movers(name)]
        first = sum(float(step.square().sum()) for step in moved)
    for layer in steps.layers() if group is Group.factors else []:
        if site in steps.trainers(layer):
            linear, square = steps.first_order(site, layer), steps.second_order(site, layer)
            first += linear.inner(linear)
            if square is not None:
                mixed += linear.inner(square)
                second += square.inner(square)
    fits, too_long = 0.0, 1.0
    for _ in range(HALVINGS):
        t = (fits + too_long) / 2
        if math.sqrt(max(first * t**2 + 2 * mixed * t**3 + second * t**4, 0.0)) <= bound:
            fits = t
        else:
            too_long = t
    return fits
