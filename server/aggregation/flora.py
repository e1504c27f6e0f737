"""FLoRA: everything that was trained is folded, and the factors start anew.

With the weights ``p_k`` normalised over the sites that replied, of each layer::

    F <- F + sum p_k B_k A_k        A <- fresh rows        B <- 0        (FLoRA: Wang et al., NeurIPS 2024)

Exact, at any mix of ranks and presets. The paper stacks the factors, ``[B_1 .. B_K]`` on ``[p_1 A_1; ..]``,
whose product is the same sum; here the sum itself is kept, so that no reply is, and goes down as its
singular components. The rows of A are drawn anew each round, normal, as strong as the initial adapter's,
from a seed made of the layer's name and the round. A site of rank r has the first r of them.

What re-initialisation costs: with ``B = 0`` the gradient of A is zero at first, and B must find its way
from nothing in every round, in directions that have nothing to do with what was learnt. With few steps a
round much of each is spent on that. `exact_split` is exact too, and goes on training the strongest
directions.

``energy`` and ``max_rank`` bound what is sent of ``F``. What they cut off stays in ``F``, and goes down
once it is among the strongest (error feedback); the residual reports it.

Floats of a layer: r_k (in + out) up; (r_k + f)(in + out) down with f components of ``F``, at most
``max_rank``, of which every round adds up to the sum of the sites' ranks. Mixed ranks and presets. Noise on
both factors is multiplied: every site's product ``N_B N_A`` of two noises is in ``F``; a site that trains B
alone adds linear noise only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from common.adapter import Adapter
from common.recipe import AggregationConfig
from server.aggregation.base import AggregationRule
from server.aggregation.components import Components, Limits, check_caps, initial_change, strongest
from server.aggregation.shares import Share


class Flora(AggregationRule):
    name: ClassVar[str] = "flora"

    def __init__(self, config: AggregationConfig) -> None:
        super().__init__(config)
        check_caps(self.name, config)

    def _start_layers(self, initial: Adapter) -> None:
        layers = initial.layers()
        self._closed = torch.tensor(0)  # rounds
        self._rows = {layer: initial.tensors[f"{layer}.lora_A"].clone() for layer in layers}
        self._changes = {layer: initial_change(initial, layer) for layer in layers}
        self._sent = {layer: self._components(layer, change) for layer, change in self._changes.items()}

    def _components(self, layer: str, change: Tensor) -> Components:
        return strongest(change, Limits(self.config.max_rank, self.config.energy), self._rows[layer].dtype)

    def _factors(self, layer: str, share: Share) -> dict[str, Tensor]:
        sent = self._sent[layer]
        if layer not in share.layers:
            return sent.folded()
        return sent.first(0).trainable(share.rank, self._rows[layer]) | sent.folded()

    def _open_layers(self) -> None:
        self._sums = {layer: torch.zeros_like(change) for layer, change in self._changes.items()}

    def _fold_layer(self, layer: str, a: Tensor, b: Tensor, weight: float) -> None:
        self._sums[layer].addmm_(b, a, alpha=weight)

    def _fold_step(self, name: str, step: Tensor, votes: float) -> None:
        self._sums[name].add_(step, alpha=votes)

    def _close_layers(self, total: float) -> tuple[float, float]:
        changes, sent, rows = {}, {}, {}
        closed = self._closed + 1
        error = norm = 0.0
        for layer, part in self._sums.items():
            step = part / total
            changes[layer] = self._changes[layer] + step
            sent[layer] = self._components(layer, changes[layer])
            rows[layer] = fresh_rows(self._started.tensors[f"{layer}.lora_A"], layer, int(closed))
            mean = self._sent[layer].change() + step
            error += float((sent[layer].change() - mean).square().sum())
            norm += float(mean.square().sum())
        self._changes, self._sent, self._rows, self._closed = changes, sent, rows, closed
        self._sums = {}
        return error, norm

    def _layer_state(self) -> dict[str, Tensor]:
        state = {"rounds": self._closed}
        for layer, sent in self._sent.items():
            state |= {f"{layer}.change": self._changes[layer], f"{layer}.rows": self._rows[layer]}
            state |= {f"{layer}.folded_A": sent.a, f"{layer}.folded_B": sent.b}
        return state

    def _layer_state_names(self, initial: Adapter) -> Iterable[str]:
        parts = ("change", "rows", "folded_A", "folded_B")
        return ["rounds", *(f"{layer}.{part}" for layer in initial.layers() for part in parts)]

    def _restore_layers(self, layers: dict[str, Tensor]) -> None:
        names = self._started.layers()
        self._closed = layers["rounds"]
        self._changes = {layer: layers[f"{layer}.change"] for layer in names}
        self._rows = {layer: layers[f"{layer}.rows"] for layer in names}
        self._sent = {
            layer: Components(layers[f"{layer}.folded_A"], layers[f"{layer}.folded_B"]) for layer in names
        }


def fresh_rows(like: Tensor, layer: str, index: int) -> Tensor:
    """Normal rows of the shape, type and root mean square of ``like``, the same for a layer and round."""
    seed = int.from_bytes(hashlib.sha256(f"{layer}|{index}".encode()).digest()[:7], "big")
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (drawn * like.double().square().mean().sqrt()).to(like.dtype)
