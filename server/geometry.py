"""How long the sites' changes are and what angles they make, exactly, without forming a dense change.

For changes ``L_i R_i`` of one layer (`server.steps`), the inner product is that of small matrices::

    <L_i R_i, L_j R_j>  =  sum( (L_i^T L_j) * (R_i R_j^T) )

so all pairs of a layer cost two products of the stacked factors. Memory: one layer's factors, or one dense
tensor, of all sites.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from server.steps import Group, RoundSteps


@dataclass(frozen=True)
class Geometry:
    """Inner products of the sites' changes.

    Attributes:
        sites: in the order of the rows.
        grams: group -> (n, n), float64. A layer or tensor that a site did not train counts as a change of 0.
        sizes: group -> trained numbers of the site that has fewest, of those that have any.
    """

    sites: tuple[str, ...]
    grams: Mapping[Group, Tensor]
    sizes: Mapping[Group, int]

    def moved(self) -> list[Group]:
        """The groups in which a site changed something."""
        return [group for group, gram in self.grams.items() if bool((gram.diagonal() > 0).any())]

    def norms(self, group: Group) -> Tensor:
        """(n,): Frobenius norms of the changes, over all layers or tensors of the group together."""
        return self.grams[group].diagonal().clamp(min=0).sqrt()

    def cosines(self, group: Group) -> Tensor:
        """(n, n): cosines of the angles between changes; 0 beside a change of 0."""
        norms = self.norms(group)
        inverse = torch.where(norms > 0, 1 / norms, 0.0)
        return self.grams[group] * inverse[:, None] * inverse

    def only(self, sites: Collection[str]) -> Geometry:
        """That of some of the sites."""
        rows = [index for index, site in enumerate(self.sites) if site in sites]
        grams = {group: gram[rows][:, rows] for group, gram in self.grams.items()}
        return Geometry(tuple(self.sites[row] for row in rows), grams, self.sizes)


def measure(steps: RoundSteps) -> Geometry:
    """The geometry of the sites in ``steps``, in their order."""
    grams = {Group.factors: _factor_gram(steps), Group.dense: _dense_gram(steps)}
    sizes = {group: [steps.size(site, group) for site in steps.sites] for group in Group}
    smallest = {group: min((size for size in found if size), default=0) for group, found in sizes.items()}
    return Geometry(tuple(steps.sites), grams, smallest)


def _factor_gram(steps: RoundSteps) -> Tensor:
    count = len(steps.sites)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for layer in steps.layers():
        trainers = steps.trainers(layer)
        changes = [steps.change(site, layer) for site in trainers]
        left, right = (
            torch.cat([one.left for one in changes], dim=1),
            torch.cat([one.right for one in changes]),
        )
        ranks = torch.tensor([one.right.shape[0] for one in changes])
        owners = torch.tensor([steps.sites.index(site) for site in trainers]).repeat_interleave(ranks)
        belongs = one_hot(owners, count).double()  # (ranks of all, n)
        gram += belongs.T @ ((left.T @ left) * (right @ right.T)) @ belongs
    return gram


def _dense_gram(steps: RoundSteps) -> Tensor:
    count = len(steps.sites)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for name in steps.dense_names():
        movers = steps.movers(name)
        moved = torch.stack([steps.step(site, name).flatten() for site in movers])
        rows = torch.tensor([steps.sites.index(site) for site in movers])
        gram[rows[:, None], rows] += moved @ moved.T
    return gram
