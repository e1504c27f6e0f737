"""FlexLoRA: the mean of the products, and of it to each site as much as its rank holds.

With the weights ``p_k`` normalised over the sites that replied, of each layer::

    U S V^T = svd(sum p_k B_k A_k)        site k:  B = U_r sqrt(S_r),  A = sqrt(S_r) V_r^T,  r = r_k

(after FlexLoRA: Bai et al., NeurIPS 2024; here the strengths are shared evenly by the two factors). The mean
is exact, what goes down is not: what rank r_k does not hold is lost, and the next round starts without it.
The residual says how much of the mean the global adapter lost; a site of lower rank lost more, and sees
another function than the global adapter. Where ``r`` is as high as the rank of the mean, nothing is lost.
Where the mean has fewer than r components, A keeps rows of the initial adapter and B is zero there.

Floats of a layer: r_k (in + out) up, as many down. Mixed ranks, of one preset: the lower ones have no
place for a layer that a site does not train. Noise on both factors is multiplied: the mean holds every
site's product ``N_B N_A`` of two noises; the decomposition itself costs no privacy.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from common.adapter import Adapter
from server.aggregation.base import AggregationRule
from server.aggregation.components import Components, Limits, initial_fold, strongest
from server.aggregation.shares import Share


class FlexLora(AggregationRule):
    name: ClassVar[str] = "flexlora"

    def _start_layers(self, initial: Adapter) -> None:
        self._down = {}
        for layer in initial.layers():
            a, b = initial.tensors[f"{layer}.lora_A"], initial.tensors[f"{layer}.lora_B"]
            self._down[layer] = self._components(layer, Components(a, b).change())

    def _components(self, layer: str, change: Tensor) -> Components:
        dtype = self._started.tensors[f"{layer}.lora_A"].dtype
        return strongest(change, Limits(most=self._started.rank), dtype, self.config.wire_dtype)

    def _factors(self, layer: str, share: Share) -> dict[str, Tensor]:
        spare = self._started.tensors[f"{layer}.lora_A"]
        return self._down[layer].trainable(share.rank, spare) | initial_fold(self._started, layer).folded()

    def _open_layers(self) -> None:
        self._sums = {}
        for layer, down in self._down.items():
            self._sums[layer] = down.a.new_zeros(down.b.shape[0], down.a.shape[1], dtype=torch.float64)

    def _fold_layer(self, layer: str, a: Tensor, b: Tensor, weight: float) -> None:
        self._sums[layer].addmm_(b, a, alpha=weight)

    def _close_layers(self, total: float) -> tuple[float, float]:
        downs = {}
        error = norm = 0.0
        for layer, part in self._sums.items():
            mean = part / total
            downs[layer] = self._components(layer, mean)
            shown = downs[layer].first(self._whole_share.rank)
            error += float((shown.change() - mean).square().sum())
            norm += float((mean + initial_fold(self._started, layer).change()).square().sum())
        self._down, self._sums = downs, {}
        return error, norm

    def _layer_state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for layer, down in self._down.items():
            state |= {f"{layer}.down_A": down.a, f"{layer}.down_B": down.b}
        return state

    def _layer_state_names(self, initial: Adapter) -> Iterable[str]:
        return [f"{layer}.{part}" for layer in initial.layers() for part in ("down_A", "down_B")]

    def _restore_layers(self, layers: dict[str, Tensor]) -> None:
        self._down = {
            layer: Components(layers[f"{layer}.down_A"], layers[f"{layer}.down_B"])
            for layer in self._started.layers()
        }
