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
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from common.adapter import Adapter
from common.errors import ConfigError
from common.recipe import AggregationConfig
from server.aggregation.base import AggregationRule, Share


@dataclass(frozen=True)
class Down:
    """The components of one layer that go down, strongest first: ``b`` (out, n), ``a`` (n, in)."""

    a: Tensor
    b: Tensor

    def change(self) -> Tensor:
        """Their product (out, in), float64, of the very values that the sites receive."""
        return self.b.double() @ self.a.double()


class ExactSplit(AggregationRule):
    name: ClassVar[str] = "exact_split"

    def __init__(self, config: AggregationConfig) -> None:
        super().__init__(config)
        faults = []
        if not 0 < config.energy <= 1:
            faults.append(f"aggregation.energy: {config.energy}, must be above 0 and at most 1")
        if config.max_rank < 1:
            faults.append(f"aggregation.max_rank: {config.max_rank}, must be at least 1")
        if faults:
            raise ConfigError("exact_split has a setting out of its range", faults)

    def _check_shares(self, initial: Adapter, shares: Mapping[str, Share]) -> list[str]:
        known = initial.layers()
        faults = [
            f"site {site!r} has rank {share.rank}; it must lie in 1 to {initial.rank}, the highest of the run"
            for site, share in sorted(shares.items())
            if share.layers and not 1 <= share.rank <= initial.rank
        ]
        for site, share in sorted(shares.items()):
            if strange := sorted(set(share.layers) - set(known)):
                faults.append(f"site {site!r} trains layers that the run does not have: {strange}")
            # Its weight would count twice: inside the fused layer, and as the part that was cut from it.
            if cut := [name for name in share.layers if any(name.startswith(f"{other}.") for other in known)]:
                faults.append(f"site {site!r} trains parts of layers that others train whole: {cut}")
        if self.config.max_rank < initial.rank:
            faults.append(
                f"aggregation.max_rank {self.config.max_rank} is below the adapter's rank {initial.rank}"
            )
        return faults

    def _start_layers(self, initial: Adapter) -> None:
        self._changes: dict[str, Tensor] = {}
        for layer in initial.layers():
            tensors = initial.tensors
            change = tensors[f"{layer}.lora_B"].double() @ tensors[f"{layer}.lora_A"].double()
            if f"{layer}.folded_A" in tensors:
                change += tensors[f"{layer}.folded_B"].double() @ tensors[f"{layer}.folded_A"].double()
            self._changes[layer] = change
        self._down = {layer: self._decompose(layer, change) for layer, change in self._changes.items()}

    def _decompose(self, layer: str, change: Tensor) -> Down:
        """The components of ``change`` to send, balanced: ``b = U sqrt(S)``, ``a = sqrt(S) V^T``."""
        u, s, vt = torch.linalg.svd(change, full_matrices=False)
        # A component weaker than the strongest one's float32 rounding would be noise on arrival.
        present = int((s > torch.finfo(torch.float32).eps * s[0]).sum())
        energy = s.square().cumsum(0)
        enough = int((energy < self.config.energy * energy[-1]).sum()) + 1
        # Trainable slots are paid for in any case, so they are filled beyond the asked energy.
        count = min(present, max(self._started.rank, min(enough, self.config.max_rank)))
        u, s, vt = u[:, :count], s[:count], vt[:count]
        # The sign of a singular pair is free: fix it, so that the factors do not depend on the LAPACK.
        largest = u.abs().argmax(dim=0, keepdim=True)
        sign = u.gather(0, largest).squeeze(0).sign()
        root = s.sqrt() * sign
        dtype = self._started.tensors[f"{layer}.lora_A"].dtype
        return Down(a=(root[:, None] * vt).to(dtype).contiguous(), b=(u * root).to(dtype).contiguous())

    def _trainable(self, layer: str, rank: int) -> tuple[Tensor, Tensor]:
        """``A`` (rank, in) and ``B`` (out, rank) for a site of ``rank``.

        Where ``G`` has fewer components, ``A`` keeps rows of the initial adapter and ``B`` is zero: the
        product is not touched, and training has a direction to use.
        """
        down = self._down[layer]
        have = min(rank, down.a.shape[0])
        spare = self._started.tensors[f"{layer}.lora_A"][have:rank]
        a = torch.cat([down.a[:have], spare])
        b = torch.cat([down.b[:, :have], down.b.new_zeros(down.b.shape[0], rank - have)], dim=1)
        return a, b

    def _factors(self, layer: str, share: Share) -> dict[str, Tensor]:
        factors, first_folded = {}, 0
        if layer in share.layers:
            first_folded = share.rank
            factors["lora_A"], factors["lora_B"] = self._trainable(layer, share.rank)
        down = self._down[layer]
        if down.a.shape[0] > first_folded:
            folded_a, folded_b = down.a[first_folded:].clone(), down.b[:, first_folded:].clone()
            factors |= {"folded_A": folded_a, "folded_B": folded_b}
        return factors

    def _open_layers(self) -> None:
        self._sums = {layer: torch.zeros_like(change) for layer, change in self._changes.items()}

    def _fold_layer(self, layer: str, a: Tensor, b: Tensor, weight: float) -> None:
        sent_a, sent_b = self._trainable(layer, a.shape[0])
        self._sums[layer].addmm_(b, a, alpha=weight)
        self._sums[layer].addmm_(sent_b.double(), sent_a.double(), alpha=-weight)

    def _close_layers(self, total: float) -> tuple[float, float]:
        changes, downs = {}, {}
        error = norm = 0.0
        for layer, part in self._sums.items():
            step = part / total
            changes[layer] = self._changes[layer] + step
            downs[layer] = self._decompose(layer, changes[layer])
            # Every site, whatever its rank, started from the same sum of folded and trainable factors.
            mean = self._down[layer].change() + step
            error += float((downs[layer].change() - mean).square().sum())
            norm += float(mean.square().sum())
        self._changes, self._down, self._sums = changes, downs, {}
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
        self._down = {layer: Down(layers[f"{layer}.down_A"], layers[f"{layer}.down_B"]) for layer in names}
