"""FedIT: FedAvg of the two factors, each for itself. The textbook baseline.

``A = sum p_k A_k`` and ``B = sum p_k B_k`` (Zhang et al., arXiv 2305.05644). The mean of products is not
the product of means: ``B A`` holds cross terms ``B_i A_j`` of different sites. `close_round` reports how
far that puts the result from the mean of what the sites trained, and nothing corrects it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from common.adapter import Adapter
from server.aggregation.base import AggregationRule, Share


class FedIT(AggregationRule):
    name: ClassVar[str] = "fedit"

    def _check_shares(self, initial: Adapter, shares: Mapping[str, Share]) -> list[str]:
        whole = Share.of(initial)
        return [
            f"site {site!r} has {share.preset} of rank {share.rank}, the adapter {whole.preset} of rank "
            f"{whole.rank}: factors of other layers or ranks have no mean; use aggregation.rule=exact_split"
            for site, share in sorted(shares.items())
            if share != whole
        ]

    def _start_layers(self, initial: Adapter) -> None:
        self._factor_means = {name: t.clone() for name, t in initial.tensors.items() if ".lora_" in name}

    def _factors(self, layer: str, share: Share) -> dict[str, Tensor]:
        factors = {suffix: self._factor_means[f"{layer}.{suffix}"].clone() for suffix in ("lora_A", "lora_B")}
        return factors | {suffix: tensor.clone() for suffix, tensor in self._folded(layer).items()}

    def _open_layers(self) -> None:
        self._sums = {
            name: torch.zeros_like(t, dtype=torch.float64) for name, t in self._factor_means.items()
        }
        self._products: dict[str, Tensor] = {}  # layer -> sum of weight * B A, only to report the residual
        for layer in self._started.layers():
            a, b = self._factor_means[f"{layer}.lora_A"], self._factor_means[f"{layer}.lora_B"]
            self._products[layer] = torch.zeros(b.shape[0], a.shape[1], dtype=torch.float64)

    def _fold_layer(self, layer: str, a: Tensor, b: Tensor, weight: float) -> None:
        self._sums[f"{layer}.lora_A"].add_(a, alpha=weight)
        self._sums[f"{layer}.lora_B"].add_(b, alpha=weight)
        self._products[layer].addmm_(b, a, alpha=weight)

    def _close_layers(self, total: float) -> tuple[float, float]:
        means = {name: (part / total).to(self._factor_means[name].dtype) for name, part in self._sums.items()}
        error = norm = 0.0
        for layer, product in self._products.items():
            mean = product / total
            down = means[f"{layer}.lora_B"].double() @ means[f"{layer}.lora_A"].double()
            error += float((down - mean).square().sum())
            norm += float((mean + self._folded_change(layer)).square().sum())
        self._factor_means = means
        self._sums, self._products = {}, {}
        return error, norm

    def _folded(self, layer: str) -> dict[str, Tensor]:
        """Folded factors of the initial adapter, if any: a fixed part of the base here."""
        tensors = self._started.tensors
        names = {suffix: f"{layer}.{suffix}" for suffix in ("folded_A", "folded_B")}
        return {suffix: tensors[name] for suffix, name in names.items() if name in tensors}

    def _folded_change(self, layer: str) -> Tensor | float:
        folded = self._folded(layer)
        return folded["folded_B"].double() @ folded["folded_A"].double() if folded else 0.0

    def _layer_state(self) -> dict[str, Tensor]:
        return dict(self._factor_means)

    def _layer_state_names(self, initial: Adapter) -> Iterable[str]:
        return [name for name in initial.tensors if ".lora_" in name]

    def _restore_layers(self, layers: dict[str, Tensor]) -> None:
        self._factor_means = layers
