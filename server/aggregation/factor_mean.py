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
        factors = {suffix: self._factor[f"{layer}.{suffix}"].clone() for suffix in ("lora_A", "lora_B")}
        return factors | self._folded(layer).folded()

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
            a, b = self._factor[f"{layer}.lora_A"], self._factor[f"{layer}.lora_B"]
            self._fold_layer(layer, a.double(), b.double(), votes)

    def _fold_step(self, name: str, step: Tensor, votes: float) -> None:
        layer, _, half = name.rpartition(".")
        self._sums[name].add_(step, alpha=votes)
        halves = {suffix: self._factor[f"{layer}.{suffix}"].double() for suffix in ("lora_A", "lora_B")}
        halves[half] = step  # the other half is as sent
        self._products[layer].addmm_(halves["lora_B"], halves["lora_A"], alpha=votes)

    def _close_layers(self, total: float) -> tuple[float, float]:
        factors: dict[str, Tensor] = {}
        error = norm = 0.0
        for layer, product in self._products.items():
            names = f"{layer}.lora_A", f"{layer}.lora_B"
            means = Means(self._sums[names[0]] / total, self._sums[names[1]] / total, product / total)
            a, b = (
                half.to(self._factor[name].dtype).contiguous()
                for name, half in zip(names, self._next_factors(layer, means), strict=True)
            )
            gap = means.product - b.double() @ a.double()
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
