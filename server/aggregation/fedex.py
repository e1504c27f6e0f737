"""FedEx: the means of the factors are trained on, and what they miss is folded.

With the weights ``p_k`` normalised over the sites that replied, of each layer::

    A = sum p_k A_k        B = sum p_k B_k        F <- F + sum p_k B_k A_k - B A

``A`` and ``B`` are trainable again, ``F`` goes down as factors that the sites fold into their frozen base
(FedEx-LoRA: Singhal et al., ACL 2025). Exact: ``F + B A`` moves by what the sites trained, on average. After
the paper: its sites add each round's residual to their weights for good; here a site starts each round
from the base, so ``F`` is the sum of all residuals, sent as its singular components.

``energy`` and ``max_rank`` bound what is sent of ``F``. What they cut off stays in ``F``, and goes down
once it is among the strongest (error feedback); the residual reports it. Floats of a layer: r (in + out) up;
(r + f)(in + out) down with f components of ``F``, at most ``max_rank``, of which every round adds up to
(sites + 1) r. One preset and rank for all sites. Noise on both factors is multiplied: every site's
product ``N_B N_A`` of two noises is in ``F``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from common.adapter import Adapter
from common.recipe import AggregationConfig
from server.aggregation.components import Components, Limits, check_caps, initial_fold, strongest
from server.aggregation.factor_mean import FactorMeanRule, Means


class FedEx(FactorMeanRule):
    name: ClassVar[str] = "fedex"

    def __init__(self, config: AggregationConfig) -> None:
        super().__init__(config)
        check_caps(self.name, config)

    def _next_factors(self, layer: str, means: Means) -> tuple[Tensor, Tensor]:
        return means.a, means.b

    def _start_layers(self, initial: Adapter) -> None:
        super()._start_layers(initial)
        self._sent = {layer: initial_fold(initial, layer) for layer in initial.layers()}
        self._kept = {layer: sent.change() for layer, sent in self._sent.items()}

    def _folded(self, layer: str) -> Components:
        return self._sent[layer]

    def _next_folded(self, layer: str, means: Means, gap: Tensor) -> Components:
        self._waiting[layer] = self._kept[layer] + gap
        # Two matrices that cancel leave rounding of the size of either.
        beside = float(torch.linalg.matrix_norm(means.product))
        limits = Limits(self.config.max_rank, self.config.energy, beside=beside)
        dtype = self._factor[f"{layer}.lora_A"].dtype
        sent = strongest(self._waiting[layer], limits, dtype, self.config.wire_dtype)
        self._waiting_sent[layer] = sent
        return sent

    def _close_layers(self, total: float) -> tuple[float, float]:
        self._waiting: dict[str, Tensor] = {}
        self._waiting_sent: dict[str, Components] = {}
        gap_and_norm = super()._close_layers(total)
        self._kept, self._sent = self._waiting, self._waiting_sent
        self._waiting, self._waiting_sent = {}, {}
        return gap_and_norm

    def _layer_state(self) -> dict[str, Tensor]:
        # The components are kept beside F: another machine's decomposition may differ in the last bit.
        state = super()._layer_state() | {f"{layer}.kept": kept for layer, kept in self._kept.items()}
        for layer, sent in self._sent.items():
            state |= {f"{layer}.folded_A": sent.a, f"{layer}.folded_B": sent.b}
        return state

    def _layer_state_names(self, initial: Adapter) -> Iterable[str]:
        own = [f"{layer}.{part}" for layer in initial.layers() for part in ("kept", "folded_A", "folded_B")]
        return [*super()._layer_state_names(initial), *own]

    def _restore_layers(self, layers: dict[str, Tensor]) -> None:
        super()._restore_layers(layers)
        names = self._started.layers()
        self._kept = {layer: layers[f"{layer}.kept"] for layer in names}
        self._sent = {
            layer: Components(layers[f"{layer}.folded_A"], layers[f"{layer}.folded_B"]) for layer in names
        }
