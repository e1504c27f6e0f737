"""How long the sites' changes are and what angles they make, exactly, without forming a dense change.

For changes ``L_i R_i`` of one layer (`server.steps`), the inner product is that of small matrices::

    <L_i R_i, L_j R_j>  =  sum( (L_i^T L_j) * (R_i R_j^T) )

so all pairs of a layer cost two products of the stacked factors. Memory does not grow with the sites: of a
layer the factors of two tiles of sites are looked at together, of a dense tensor a block of coordinates.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from server.steps import Group, RoundSteps

TILE = 16  # sites
BLOCK = 1 << 21  # numbers of all sites together: 16 MB


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


@dataclass(frozen=True)
class _Stacked:
    """One layer of some sites: (out, R), (R, in), and in ``belongs`` (R, sites) whose each rank is."""

    left: Tensor
    right: Tensor
    belongs: Tensor

    def inner(self, other: _Stacked) -> Tensor:
        """(sites, other's sites)."""
        pairs = (self.left.T @ other.left) * (self.right @ other.right.T)
        return self.belongs.T @ pairs @ other.belongs


def _factor_gram(steps: RoundSteps) -> Tensor:
    gram = _zeros(steps)
    for layer in steps.layers():
        trainers = steps.trainers(layer)
        tiles = [trainers[start : start + TILE] for start in range(0, len(trainers), TILE)]
        for number, tile in enumerate(tiles):
            own = _stacked(steps, layer, tile)
            for other in tiles[number:]:
                inner = own.inner(own if other is tile else _stacked(steps, layer, other))
                rows, columns = _rows(steps, tile), _rows(steps, other)
                gram[rows[:, None], columns] += inner
                if other is not tile:
                    gram[columns[:, None], rows] += inner.T
    return gram


def _stacked(steps: RoundSteps, layer: str, sites: Sequence[str]) -> _Stacked:
    changes = [steps.change(site, layer) for site in sites]
    ranks = torch.tensor([one.right.shape[0] for one in changes])
    owners = torch.arange(len(sites)).repeat_interleave(ranks)
    left = torch.cat([one.left for one in changes], dim=1)
    return _Stacked(left, torch.cat([one.right for one in changes]), one_hot(owners, len(sites)).double())


def _dense_gram(steps: RoundSteps) -> Tensor:
    gram = _zeros(steps)
    for name in steps.dense_names():
        movers = steps.movers(name)
        rows, elements = _rows(steps, movers), steps.answers.elements(movers[0])[name]
        width = min(elements, max(1, BLOCK // len(movers)))
        block = torch.empty(len(movers), width, dtype=torch.float64)
        for start in range(0, elements, width):
            part = block[:, : min(width, elements - start)]
            for row, site in enumerate(movers):
                part[row] = steps.answers.part(site, name, start, start + part.shape[1])
            gram[rows[:, None], rows] += part @ part.T
    return gram


def _zeros(steps: RoundSteps) -> Tensor:
    return torch.zeros(len(steps.sites), len(steps.sites), dtype=torch.float64)


def _rows(steps: RoundSteps, sites: Sequence[str]) -> Tensor:
    return torch.tensor([steps.sites.index(site) for site in sites])
