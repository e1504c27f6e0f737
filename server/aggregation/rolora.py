"""RoLoRA: B and A take turns, and what is not trained is the same at all sites.

With the weights ``p_k`` normalised over the sites that replied, of each layer::

    rounds 0, 2, 4, ...    B <- sum p_k B_k        A stays
    rounds 1, 3, 5, ...    A <- sum p_k A_k        B stays        (RoLoRA: Chen et al., NeurIPS 2025)

Exact: ``sum p_k (B_k A) = (sum p_k B_k) A``, and the same with A in B's place. Unlike `ffa` both factors
learn. B comes first, for it starts at zero: as long as it is, the gradient of A is zero too. A run of one
round is therefore `ffa`, and the generator's adapter in its default of one round trains B alone. Dense
tensors (the decoder) are trained in every round.

Floats of a layer: r out up in a round of B, r in up in one of A; r (in + out) down. One preset and rank for
all sites, and one that trains both factors. Noise stays linear in every round: ``(B + N) A = B A + N A`` and
``B (A + N) = B A + B N``; over rounds, what B took up is multiplied by what A takes up.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from common.adapter import Adapter
from common.tuning.halves import Half, Halves, trained_halves
from server.aggregation.factor_mean import FactorMeanRule, Means
from server.aggregation.shares import Share


class RoLora(FactorMeanRule):
    name: ClassVar[str] = "rolora"

    def _start_layers(self, initial: Adapter) -> None:
        super()._start_layers(initial)
        self._closed = torch.tensor(0)  # rounds

    def _halves(self, share: Share) -> Halves:
        return trained_halves(share.preset, self.name, int(self._closed))

    def _next_factors(self, layer: str, means: Means) -> tuple[Tensor, Tensor]:
        # Not the mean of the factor that stayed: a mean of equals may differ from them in the last bit.
        if Half.b in self._halves(self._whole_share):
            return self._factor[f"{layer}.lora_A"], means.b
        return means.a, self._factor[f"{layer}.lora_B"]

    def _close_layers(self, total: float) -> tuple[float, float]:
        gap_and_norm = super()._close_layers(total)
        self._closed = self._closed + 1
        return gap_and_norm

    def _layer_state(self) -> dict[str, Tensor]:
        return super()._layer_state() | {"rounds": self._closed}

    def _layer_state_names(self, initial: Adapter) -> Iterable[str]:
        return ["rounds", *super()._layer_state_names(initial)]

    def _restore_layers(self, layers: dict[str, Tensor]) -> None:
        super()._restore_layers(layers)
        self._closed = layers["rounds"]
