"""median and trimmed_mean: a vote on each coordinate, one site one vote.

Of each coordinate the f lowest and the f highest values are cut and the mean of the rest is taken; the
median cuts all but the middle one, or the middle two (Yin et al., ICML 2018). The declared weights do not
count: a weight is itself a claim. With at most f bad sites of more than 2 f, each coordinate of the result
lies between the lowest and the highest honest value, whatever the bad ones sent.

The coordinates are those of a layer's whole change (out, in), for the rules that keep it
(``CHANGE_VOTE_RULES``), or of the one factor that all sites train (``FACTOR_VOTE_RULES``); never of A and B
apart, whose votes would have a product that no site meant. A site that does not train a layer has no vote
there, and where few do, fewer are cut: on a layer of one or two sites the vote bears no bad one. The
result has a higher rank than any site's change: what goes down is cut by ``aggregation.max_rank``.

Memory: one layer's factors of all sites, and a block of rows of all their changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from common.names import CHANGE_VOTE_RULES
from server.aggregation import AggregationRule
from server.geometry import Geometry
from server.robust.base import Estimate, RobustEstimator
from server.steps import Factored, RoundSteps

BLOCK = 1 << 21  # values of all sites' changes in memory at once: 16 MB


class TrimmedMean(RobustEstimator):
    """Cuts ``byzantine`` values at each end.

    Guarantee: with at most as many bad sites, no coordinate leaves the range of the honest sites'.
    """

    name: ClassVar[str] = "trimmed_mean"

    def least_sites(self) -> int:
        return 2 * self.byzantine + 1

    def cut(self, sites: int) -> int:
        """Values to cut at each end, of ``sites``."""
        return self.byzantine

    def fold(self, steps: RoundSteps, geometry: Geometry, rule: AggregationRule) -> Estimate:
        cut = self.cut(len(steps.sites))
        rule.fold_consensus(_votes(steps, rule.name in CHANGE_VOTE_RULES, cut), steps.sites)
        return Estimate(steps.sites, notes={"cut_at_each_end": cut})


class CoordinateMedian(TrimmedMean):
    """As `TrimmedMean`; of three or more sites it bears as many bad ones as can be borne."""

    name: ClassVar[str] = "median"

    def cut(self, sites: int) -> int:
        return (sites - 1) // 2


def trimmed_mean(values: Tensor, cut: int) -> Tensor:
    """(n, ...) -> (...): the mean without the ``cut`` lowest and highest of each coordinate.

    Where n is too small for that, as many are cut as leave one or two.
    """
    count = values.shape[0]
    cut = min(cut, (count - 1) // 2)
    # NumPy sorts along the first axis several times as fast.
    return torch.from_numpy(np.sort(values.numpy(), axis=0)[cut : count - cut].mean(0))


def _votes(steps: RoundSteps, on_changes: bool, cut: int) -> Iterator[tuple[str, Tensor]]:
    """Name -> step agreed on, as `AggregationRule.fold_consensus` takes them."""
    names = [*steps.dense_names(), *(() if on_changes else steps.factor_names())]
    for name in names:
        yield name, trimmed_mean(torch.stack([steps.step(site, name) for site in steps.movers(name)]), cut)
    for layer in steps.layers() if on_changes else ():
        yield layer, _vote_on_change([steps.change(site, layer) for site in steps.trainers(layer)], cut)


def _vote_on_change(changes: Sequence[Factored], cut: int) -> Tensor:
    """(out, in): block by block of rows."""
    out, width = changes[0].left.shape[0], changes[0].right.shape[1]
    rows = max(1, BLOCK // (len(changes) * width))
    blocks = [
        trimmed_mean(torch.stack([one.left[start : start + rows] @ one.right for one in changes]), cut)
        for start in range(0, out, rows)
    ]
    return torch.cat(blocks)
