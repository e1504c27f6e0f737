"""HetLoRA: factors of several ranks, padded with zeros, averaged by how much each site changed.

With ``w_k`` the declared weight of a site, and pad() filling A with rows and B with columns of zero up to
the highest rank, of each layer::

    q_k = w_k ||B_k A_k||  /  sum w_j ||B_j A_j||        A = sum q_k pad(A_k)        B = sum q_k pad(B_k)

    site k:  the first r_k rows of A and columns of B

After HetLoRA (Cho et al., EMNLP 2024): the norm (Frobenius) is taken layer by layer here, and it multiplies
the declared weight; the paper's pruning of a site's own rank, which is part of a site's training, is not
here. A row that no reply holds keeps its A with B zero: two zeros would never be trained again. Where
every ``B_k A_k`` is zero, A stays and B is zero.

Not exact: cross terms ``B_i A_j`` as in `fedit`, weights that are not the declared ones, and what a site's
rank cuts off. The residual is that of the global adapter against the mean by declared weights; a site of
lower rank sees another function. Floats of a layer: r_k (in + out) up, as many down. Mixed ranks, of one
preset. Noise on both factors is multiplied, ``N_B N_A`` as in `fedit`, and it adds to the norms that weigh:
a noisier site counts more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from common.adapter import Adapter
from server.aggregation.base import AggregationRule
from server.aggregation.components import Components, initial_fold
from server.aggregation.shares import Share


class HetLora(AggregationRule):
    name: ClassVar[str] = "hetlora"

    def _start_layers(self, initial: Adapter) -> None:
        self._factor = {name: t.clone() for name, t in initial.tensors.items() if ".lora_" in name}

    def _padded(self, layer: str) -> Components:
        return Components(self._factor[f"{layer}.lora_A"], self._factor[f"{layer}.lora_B"])

    def _factors(self, layer: str, share: Share) -> dict[str, Tensor]:
        part = self._padded(layer).first(share.rank)
        factors = {"lora_A": part.a.clone(), "lora_B": part.b.clone()}
        return factors | initial_fold(self._started, layer).folded()

    def _open_layers(self) -> None:
        self._sums = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in self._factor.items()}
        layers = self._started.layers()
        self._products: dict[str, Tensor] = {}
        for layer in layers:
            kept = self._padded(layer)
            self._products[layer] = kept.a.new_zeros(kept.b.shape[0], kept.a.shape[1], dtype=torch.float64)
        self._strengths = dict.fromkeys(layers, 0.0)  # layer -> sum of w_k ||B_k A_k||
        self._reached = dict.fromkeys(layers, 0)  # layer -> the highest rank of a reply that counts

    def _fold_layer(self, layer: str, a: Tensor, b: Tensor, weight: float) -> None:
        product, rank = b @ a, a.shape[0]
        self._products[layer].add_(product, alpha=weight)
        strength = weight * float(torch.linalg.matrix_norm(product))
        if strength == 0:
            return
        self._sums[f"{layer}.lora_A"][:rank].add_(a, alpha=strength)
        self._sums[f"{layer}.lora_B"][:, :rank].add_(b, alpha=strength)
        self._strengths[layer] += strength
        self._reached[layer] = max(self._reached[layer], rank)

    def _close_layers(self, total: float) -> tuple[float, float]:
        factors: dict[str, Tensor] = {}
        error = norm = 0.0
        for layer, product in self._products.items():
            a_name, b_name = f"{layer}.lora_A", f"{layer}.lora_B"
            strength, reached = self._strengths[layer] or 1.0, self._reached[layer]
            a, b = self._factor[a_name].clone(), torch.zeros_like(self._factor[b_name])
            a[:reached] = (self._sums[a_name][:reached] / strength).to(a.dtype)
            b[:, :reached] = (self._sums[b_name][:, :reached] / strength).to(b.dtype)
            a, b = self._sendable(a), self._sendable(b)
            factors |= {a_name: a, b_name: b}
            mean = product / total
            shown = Components(a, b).first(self._whole_share.rank)
            error += float((shown.change() - mean).square().sum())
            norm += float((mean + initial_fold(self._started, layer).change()).square().sum())
        self._factor = factors
        self._sums, self._products, self._strengths, self._reached = {}, {}, {}, {}
        return error, norm

    def _layer_state(self) -> dict[str, Tensor]:
        return dict(self._factor)

    def _layer_state_names(self, initial: Adapter) -> Iterable[str]:
        return [name for name in initial.tensors if ".lora_" in name]

    def _restore_layers(self, layers: dict[str, Tensor]) -> None:
        self._factor = layers
