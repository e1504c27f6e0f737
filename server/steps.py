"""What the sites of a round moved: their answers, beside what each was sent.

An answer holds steps, trained tensor minus sent tensor. With A (r, in) and B (out, r) as sent and the steps
dA and dB, a layer's weight changes by::

    (B + dB)(A + dA) - B A  =  dB A + B dA + dB dA  =  [dB, B + dB] [A; dA]

which is kept as two factors of rank 2r: no large numbers cancel, and the dense change is not needed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from common.adapter import Adapter, AdapterUpdate
from server.aggregation import AggregationRule, Share
from server.aggregation.base import is_factor
from server.answers import Answers


class Group(StrEnum):
    """Tensors of a kind are compared together: a step of one kind has another size than one of the other."""

    factors = "factors"
    dense = "dense"


@dataclass(frozen=True)
class Factored:
    """A matrix ``left @ right``: (out, k) times (k, in), float64."""

    left: Tensor
    right: Tensor

    def inner(self, other: Factored) -> float:
        """The sum over the products of the two matrices' entries, neither of which is formed."""
        return float(((self.left.T @ other.left) * (self.right @ other.right.T)).sum())


class RoundSteps:
    """Reads ``answers`` one tensor at a time.

    Args:
        sent: site -> what it was sent; sites that were sent the same may share one (`sent_to`).
        sites: to look at; None: all that answered.
    """

    def __init__(
        self, answers: Answers, sent: Mapping[str, Adapter], sites: Collection[str] | None = None
    ) -> None:
        self.answers = answers
        self.sent = sent
        self.sites = sorted(answers.sites() if sites is None else sites)

    def only(self, sites: Collection[str]) -> RoundSteps:
        return RoundSteps(self.answers, self.sent, sites)

    def layers(self) -> list[str]:
        """The layers of which a site moved a factor."""
        return sorted({name.rpartition(".")[0] for name in self.factor_names()})

    def factor_names(self) -> list[str]:
        return sorted(name for name in self._names() if is_factor(name))

    def dense_names(self) -> list[str]:
        return sorted(name for name in self._names() if not is_factor(name))

    def weights(self) -> dict[str, float]:
        """What the sites declared."""
        return {site: self.answers.weight(site) for site in self.sites}

    def trainers(self, layer: str) -> list[str]:
        """The sites that moved a factor of ``layer``."""
        return [site for site in self.sites if any(self._factor_steps(site, layer))]

    def movers(self, name: str) -> list[str]:
        """The sites that sent a step of tensor ``name``."""
        return [site for site in self.sites if name in self.answers.elements(site)]

    def size(self, site: str, group: Group) -> int:
        """How many numbers of ``group`` the site sent."""
        elements = self.answers.elements(site)
        return sum(count for name, count in elements.items() if group_of(name) is group)

    def step(self, site: str, name: str) -> Tensor:
        """The step of one tensor, float64."""
        return self.answers.tensor(site, name).double()

    def change(self, site: str, layer: str) -> Factored:
        """The change of a layer's weight."""
        a, b, da, db = self._moved(site, layer)
        if da is None or db is None:
            return self.first_order(site, layer)
        return Factored(torch.cat([db, b + db], dim=1), torch.cat([a, da]))

    def first_order(self, site: str, layer: str) -> Factored:
        """``dB A + B dA``: what grows with the steps' length."""
        a, b, da, db = self._moved(site, layer)
        lefts = [*([] if db is None else [db]), *([] if da is None else [b])]
        rights = [*([] if db is None else [a]), *([] if da is None else [da])]
        return Factored(torch.cat(lefts, dim=1), torch.cat(rights))

    def second_order(self, site: str, layer: str) -> Factored | None:
        """``dB dA``: what grows with the square of it; None where one factor alone was trained."""
        _, _, da, db = self._moved(site, layer)
        return None if da is None or db is None else Factored(db, da)

    def trained(
        self, site: str, weight: float, lengths: Mapping[Group, float] | None = None
    ) -> AdapterUpdate:
        """The whole update as a rule folds it: sent plus step, float64, so that nothing is rounded.

        Args:
            weight: to fold it with.
            lengths: of each group's steps, as shares of their own; None: all of it.
        """
        sent, about = self.sent[site].tensors, self.answers.update(site)
        tensors = {}
        for name, step in about.adapter.tensors.items():
            length = 1.0 if lengths is None else lengths[group_of(name)]
            tensors[name] = torch.add(sent[name].double(), step.double(), alpha=length)
        return replace(about, adapter=replace(about.adapter, tensors=tensors), weight=weight)

    def _names(self) -> set[str]:
        return {name for site in self.sites for name in self.answers.elements(site)}

    def _factor_steps(self, site: str, layer: str) -> tuple[bool, bool]:
        """Whether the site sent a step of A, and one of B."""
        names = self.answers.elements(site)
        return f"{layer}.lora_A" in names, f"{layer}.lora_B" in names

    def _moved(self, site: str, layer: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """A and B as sent, and the steps of them that came back."""
        names = f"{layer}.lora_A", f"{layer}.lora_B"
        a, b = (self.sent[site].tensors[name].double() for name in names)
        has = self._factor_steps(site, layer)
        da, db = (self.step(site, name) if there else None for name, there in zip(names, has, strict=True))
        return a, b, da, db


def group_of(name: str) -> Group:
    return Group.factors if is_factor(name) else Group.dense


def sent_to(rule: AggregationRule, sites: Collection[str]) -> dict[str, Adapter]:
    """What ``rule`` sends each of ``sites``; one adapter in memory for all sites that train the same."""
    shared: dict[Share, Adapter] = {}
    for site in sites:
        share = rule.share_of(site)
        if share not in shared:
            shared[share] = rule.adapter_for(site)
    return {site: shared[rule.share_of(site)] for site in sites}
