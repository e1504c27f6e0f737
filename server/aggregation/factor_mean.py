"""What the rules for one preset and rank do alike: means of A, of B and of their product."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.adapter import Adapter
from server.aggregation.base import AggregationRule
from server.aggregation.components import Components, initial_fold
from server.aggregation.shares import Share


@dataclass(frozen=True)
class Means:
    """One layer's weighted means over the replies of a round, float64.

    Attributes:
        a: ``sum p_k A_k`` (r, in).
        b: ``sum p_k B_k`` (out, r).
        product: ``sum p_k B_k A_k`` (out, in), which is what the sites trained.
    """

    a: Tensor
    b: Tensor
    product: Tensor


class FactorMeanRule(AggregationRule):
    """A rule whose sites train the same layers at the same rank; all are sent the same.

    Kept of a layer: one A and one B. Folded factors of the initial adapter are a fixed part of the base,
    unless a subclass says otherwise (`_folded`, `_next_folded`).
    """

    @abstractmethod
    def _next_factors(self, layer: str, means: Means) -> tuple[Tensor, Tensor]:
        """The layer's next A (r, in) and B (out, r), of any float type."""

    def _means(self, layer: str, total: float) -> Means:
        """Of the replies of this round, whose weights sum to ``total``."""
        names = f"{layer}.lora_A", f"{layer}.lora_B"
        a, b = (self._sums[name] / total for name in names)
        return Means(a, b, self._products[layer] / total)

    def _to_keep(self, name: str, half: Tensor) -> Tensor:
        """What is kept of the next factor ``name``: what goes down of it."""
        return self._sendable(half)

    def _folded(self, layer: str) -> Components:
        """What the sites were last told to fold."""
        return initial_fold(self._started, layer)

    def _next_folded(self, layer: str, means: Means, gap: Tensor) -> Components:
        """What they fold next; ``gap`` (out, in), float64: the mean product less that of the next factors.

        Nothing that the last round left may be changed here.
        """
        return self._folded(layer)

    def _start_layers(self, initial: Adapter) -> None:
        self._factor = {name: t.clone() for name, t in initial.tensors.items() if ".lora_" in name}

    def _factors(self, layer: str, share: Share) -> dict[str, Tensor]:
        return self._as_sent(layer) | self._folded(layer).folded()

    def _as_sent(self, layer: str) -> dict[str, Tensor]:
        """Both factors as they go down; never aliases."""
        suffixes = ("lora_A", "lora_B")
        return {suffix: self._sendable(self._factor[f"{layer}.{suffix}"]).clone() for suffix in suffixes}

    def _open_layers(self) -> None:
        self._sums = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in self._factor.items()}
        self._products: dict[str, Tensor] = {}
        for layer in self._started.layers():
            a, b = self._factor[f"{layer}.lora_A"], self._factor[f"{layer}.lora_B"]
            self._products[layer] = a.new_zeros(b.shape[0], a.shape[1], dtype=torch.float64)

    def _fold_layer(self, layer: str, a: Tensor, b: Tensor, weight: float) -> None:
        self._sums[f"{layer}.lora_A"].add_(a, alpha=weight)
        self._sums[f"{layer}.lora_B"].add_(b, alpha=weight)
        self._products[layer].addmm_(b, a, alpha=weight)

    def _fold_standing(self, votes: float) -> None:
        super()._fold_standing(votes)
        for layer in self._products:
            sent = self._as_sent(layer)
            self._fold_layer(layer, sent["lora_A"].double(), sent["lora_B"].double(), votes)

    def _fold_step(self, name: str, step: Tensor, votes: float) -> None:
        layer, _, half = name.rpartition(".")
        self._sums[name].add_(step, alpha=votes)
        halves = {suffix: sent.double() for suffix, sent in self._as_sent(layer).items()}
        halves[half] = step  # the other half is as sent
        self._products[layer].addmm_(halves["lora_B"], halves["lora_A"], alpha=votes)

    def _close_layers(self, total: float) -> tuple[float, float]:
        factors: dict[str, Tensor] = {}
        error = norm = 0.0
        for layer in self._products:
            names = f"{layer}.lora_A", f"{layer}.lora_B"
            means = self._means(layer, total)
            a, b = (
                self._to_keep(name, half.to(self._factor[name].dtype)).contiguous()
                for name, half in zip(names, self._next_factors(layer, means), strict=True)
            )
            gap = means.product - self._sendable(b).double() @ self._sendable(a).double()
            before = self._folded(layer).change()
            moved = self._next_folded(layer, means, gap).change() - before
            error += float((moved - gap).square().sum())
            norm += float((means.product + before).square().sum())
            factors |= {names[0]: a, names[1]: b}
        self._factor = factors
        self._sums, self._products = {}, {}
        return error, norm

    def _layer_state(self) -> dict[str, Tensor]:
        return dict(self._factor)

    def _layer_state_names(self, initial: Adapter) -> Iterable[str]:
        return [name for name in initial.tensors if ".lora_" in name]

    def _restore_layers(self, layers: dict[str, Tensor]) -> None:
        self._factor = {name: layers[name] for name in layers if name.endswith((".lora_A", ".lora_B"))}
