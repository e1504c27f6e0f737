"""multi_krum: the mean of the sites whose changes lie closest to each other.

A site's score is the sum of its squared distances to the ``n - f - 2`` sites nearest to it; the ``n - f``
sites of lowest score are kept, f being ``aggregation.byzantine`` (Multi-Krum: Blanchard et al., NeurIPS 2017,
section 4, with m = n - f). Distances are those of the changes, ``G_ii + G_jj - 2 G_ij`` of the Gram matrix;
each group of tensors is divided by its median squared norm, so that both speak alike.

Works with every rule, for what is kept goes the way of every update, with declared weights bounded as in
`norm_bound`. Needs ``2 f + 3`` sites. It leaves f sites out of every round, attacked or not, and where
hospitals differ that is the same one again and again: the small or unusual one.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from server.aggregation import AggregationRule
from server.geometry import Geometry
from server.robust.base import Estimate, RobustEstimator, bounded_weights, fold_weighted
from server.steps import RoundSteps

LEFT_OUT = "a change far from the others'"


class MultiKrum(RobustEstimator):
    """Guarantee: ``byzantine`` sites are left out, and what they sent has no part in the result."""

    name: ClassVar[str] = "multi_krum"

    def least_sites(self) -> int:
        return 2 * self.byzantine + 3

    def fold(self, steps: RoundSteps, geometry: Geometry, rule: AggregationRule) -> Estimate:
        scores = krum_scores(squared_distances(geometry), self.byzantine).tolist()
        order = sorted(zip(scores, geometry.sites, strict=True))
        kept = steps.only([site for _, site in order[: len(order) - self.byzantine]])
        left_out = {site: LEFT_OUT for site in steps.sites if site not in kept.sites}
        fold_weighted(kept, rule, bounded_weights(kept.weights()))
        return Estimate(kept.sites, left_out, {"scores": {site: score for score, site in order}})


def squared_distances(geometry: Geometry) -> Tensor:
    """(n, n): between the sites' changes; both groups together, each by its median squared norm."""
    total = torch.zeros(len(geometry.sites), len(geometry.sites), dtype=torch.float64)
    for group in geometry.moved():
        gram = geometry.grams[group]
        squares = gram.diagonal()
        distances = squares[:, None] + squares - 2 * gram
        total += distances.clamp(min=0) / squares[squares > 0].median()
    return total


def krum_scores(distances: Tensor, byzantine: int) -> Tensor:
    """(n,): of each site, the sum of its ``n - f - 2`` smallest squared distances to others."""
    count = distances.shape[0]
    others = distances + torch.diag(torch.full((count,), torch.inf, dtype=distances.dtype))
    return others.sort(dim=1).values[:, : count - byzantine - 2].sum(1)
