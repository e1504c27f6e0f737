"""exact_split: the exact mean of the sites' weights, at any mix of ranks. The default.

The server keeps each layer's whole change ``G`` (out, in) and adds the mean of what the sites changed::

    G <- G + sum_k p_k (B'_k A'_k - B_k A_k)        B_k A_k as sent, B'_k A'_k as it came back

with the weights ``p_k`` normalised over the sites that replied. Down goes the singular value
decomposition of ``G``: to a site of rank r its first r components as trainable factors, and the rest as
factors that the site folds into its frozen base; of a layer that the site does not train, all of it is
folded. So ``W0 + folded + B_k A_k = W0 + G`` for every rank and preset, nothing is re-initialised, and no
cross term of two sites appears. A site that trains B alone has the A that it was sent: ``A'_k = A_k``.

Two things bound what goes down: ``energy``, the share of ``||G||^2`` that the components must hold, and
``max_rank``. What they cut off stays in ``G`` and comes with a later round (error feedback).

Exact without such a cut, and at any mix of ranks and presets. Floats of a layer: r_k (in + out) up;
n (in + out) down for n components, at most ``max_rank``. Noise on both factors is multiplied: every site's
product ``N_B N_A`` of two noises is in ``G``; a site that trains B alone adds linear noise only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from common.adapter import Adapter
from common.recipe import AggregationConfig
from server.aggregation.base import AggregationRule
from server.aggregation.components import Components, Limits, check_caps, initial_change, strongest
from server.aggregation.shares import Share


class ExactSplit(AggregationRule):
    name: ClassVar[str] = "exact_split"

    def __init__(self, config: AggregationConfig) -> None:
        super().__init__(config)
        check_caps(self.name, config)

    def _check_shares(self, initial: Adapter, shares: Mapping[str, Share]) -> list[str]:
        faults = super()._check_shares(initial, shares)
        if self.config.max_rank < initial.rank:
            faults.append(
                f"aggregation.max_rank {self.config.max_rank} is below the adapter's rank {initial.rank}"
            )
        return faults

    def _start_layers(self, initial: Adapter) -> None:
        self._changes = {layer: initial_change(initial, layer) for layer in initial.layers()}
        self._down = {layer: self._components(layer, change) for layer, change in self._changes.items()}

    def _components(self, layer: str, change: Tensor) -> Components:
        # Trainable slots are paid for in any case, so they are filled beyond the asked energy.
        limits = Limits(self.config.max_rank, self.config.energy, least=self._started.rank)
        dtype = self._started.tensors[f"{layer}.lora_A"].dtype
        return strongest(change, limits, dtype, self.config.wire_dtype)

    def _trainable(self, layer: str, rank: int) -> dict[str, Tensor]:
        """Where ``G`` has fewer components than ``rank``, ``A`` keeps rows of the initial adapter."""
        return self._down[layer].trainable(rank, self._started.tensors[f"{layer}.lora_A"])

    def _factors(self, layer: str, share: Share) -> dict[str, Tensor]:
        if layer not in share.layers:
            return self._down[layer].folded()
        return self._trainable(layer, share.rank) | self._down[layer].folded(skip=share.rank)

    def _open_layers(self) -> None:
        self._sums = {layer: torch.zeros_like(change) for layer, change in self._changes.items()}
        # layer -> rank -> sum of weights: what was sent is alike for a rank, and is subtracted once.
        self._weights: dict[str, dict[int, float]] = {layer: {} for layer in self._changes}

    def _fold_layer(self, layer: str, a: Tensor, b: Tensor, weight: float) -> None:
        self._sums[layer].addmm_(b, a, alpha=weight)
        by_rank, rank = self._weights[layer], a.shape[0]
        by_rank[rank] = by_rank.get(rank, 0.0) + weight

    def _step(self, layer: str, total: float) -> Tensor:
        """The mean of what the sites changed: ``sum_k p_k (B'_k A'_k - B_k A_k)``, (out, in)."""
        step = self._sums[layer] / total
        for rank, weight in self._weights[layer].items():
            sent = self._trainable(layer, rank)
            step.addmm_(sent["lora_B"].double(), sent["lora_A"].double(), alpha=-weight / total)
        return step

    def _fold_step(self, name: str, step: Tensor, votes: float) -> None:
        self._sums[name].add_(step, alpha=votes)

    def _close_layers(self, total: float) -> tuple[float, float]:
        changes, downs = {}, {}
        error = norm = 0.0
        for layer in self._sums:
            step = self._step(layer, total)
            changes[layer] = self._changes[layer] + step
            downs[layer] = self._components(layer, changes[layer])
            # Every site, whatever its rank, started from the same sum of folded and trainable factors.
            mean = self._down[layer].change() + step
            error += float((downs[layer].change() - mean).square().sum())
            norm += float(mean.square().sum())
        self._changes, self._down, self._sums, self._weights = changes, downs, {}, {}
        return error, norm

    def _layer_state(self) -> dict[str, Tensor]:
        # The factors are kept beside G: another machine's decomposition may differ in the last bit.
        state = {f"{layer}.change": change for layer, change in self._changes.items()}
        for layer, down in self._down.items():
            state |= {f"{layer}.down_A": down.a, f"{layer}.down_B": down.b}
        return state

    def _layer_state_names(self, initial: Adapter) -> Iterable[str]:
        return [f"{layer}.{part}" for layer in initial.layers() for part in ("change", "down_A", "down_B")]

    def _restore_layers(self, layers: dict[str, Tensor]) -> None:
        names = self._started.layers()
        self._changes = {layer: layers[f"{layer}.change"] for layer in names}
        self._down = {
            layer: Components(layers[f"{layer}.down_A"], layers[f"{layer}.down_B"]) for layer in names
        }
