"""Singular components of a layer's change, as factors that can be sent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.adapter import Adapter
from common.errors import ConfigError
from common.precision import sendable
from common.recipe import AggregationConfig, WireDtype


@dataclass(frozen=True)
class Components:
    """Some rank-1 parts of one layer's change: ``b`` (out, n), ``a`` (n, in); the strongest first, if any."""

    a: Tensor
    b: Tensor

    @property
    def count(self) -> int:
        return self.a.shape[0]

    def change(self) -> Tensor:
        """Their sum (out, in), float64, of the very values that the sites receive."""
        return self.b.double() @ self.a.double()

    def first(self, count: int) -> Components:
        return Components(self.a[:count], self.b[:, :count])

    def trainable(self, rank: int, spare: Tensor) -> dict[str, Tensor]:
        """The first ``rank`` as factors ``lora_A`` (rank, in) and ``lora_B`` (out, rank).

        Where there are fewer, ``A`` takes rows of ``spare`` (at least rank, in) and ``B`` is zero: the
        product is not touched, and training has a direction to use.
        """
        have = min(rank, self.count)
        a = torch.cat([self.a[:have], spare[have:rank]])
        b = torch.cat([self.b[:, :have], self.b.new_zeros(self.b.shape[0], rank - have)], dim=1)
        return {"lora_A": a, "lora_B": b}

    def folded(self, skip: int = 0) -> dict[str, Tensor]:
        """All but the first ``skip`` as factors to fold; empty if there are no more. Never an alias."""
        if self.count <= skip:
            return {}
        return {"folded_A": self.a[skip:].clone(), "folded_B": self.b[:, skip:].clone()}


@dataclass(frozen=True)
class Limits:
    """How many components are kept.

    Attributes:
        most: unless ``least`` is higher.
        energy: as many as hold this share of the squared Frobenius norm.
        least: that many in any case, as far as there are so many.
        beside: strength of what they are added to; one that is lost in its rounding is none.
    """

    most: int
    energy: float = 1.0
    least: int = 0
    beside: float = 0.0


def strongest(change: Tensor, limits: Limits, dtype: torch.dtype, wire: WireDtype) -> Components:
    """The strongest components of ``change`` (out, in), balanced: ``b = U sqrt(S)``, ``a = sqrt(S) V^T``.

    Of type ``dtype``, with the values that arrive when they are sent as ``wire``.
    """
    u, s, vt = torch.linalg.svd(change, full_matrices=False)
    # A component weaker than the float32 rounding of the strongest one would be noise on arrival.
    present = int((s > torch.finfo(torch.float32).eps * max(float(s[0]), limits.beside)).sum())
    energy = s.square().cumsum(0)
    enough = int((energy < limits.energy * energy[-1]).sum()) + 1
    count = min(present, max(limits.least, min(enough, limits.most)))
    u, s, vt = u[:, :count], s[:count], vt[:count]
    sign, root = signs(u), s.sqrt()
    a, b = ((root * sign)[:, None] * vt).to(dtype), (u * (root * sign)).to(dtype)
    return Components(sendable(a, wire).contiguous(), sendable(b, wire).contiguous())


def signs(u: Tensor) -> Tensor:
    """Factors (n,) of 1 or -1 for the singular vectors ``u`` (out, n) and their partners.

    The sign of a singular pair is free. Fixed like this, factors do not depend on the LAPACK.
    """
    largest = u.abs().argmax(dim=0, keepdim=True)
    return u.gather(0, largest).squeeze(0).sign()


def initial_fold(initial: Adapter, layer: str) -> Components:
    """What ``initial`` folds into ``layer``: none, or the fixed part of a run that goes on from another."""
    tensors = initial.tensors
    if f"{layer}.folded_A" in tensors:
        return Components(tensors[f"{layer}.folded_A"], tensors[f"{layer}.folded_B"])
    a, b = tensors[f"{layer}.lora_A"], tensors[f"{layer}.lora_B"]
    return Components(a.new_zeros(0, a.shape[1]), b.new_zeros(b.shape[0], 0))


def initial_change(initial: Adapter, layer: str) -> Tensor:
    """The whole change (out, in) that ``initial`` makes to ``layer``, float64."""
    a, b = initial.tensors[f"{layer}.lora_A"], initial.tensors[f"{layer}.lora_B"]
    return Components(a, b).change() + initial_fold(initial, layer).change()


def check_caps(rule: str, config: AggregationConfig) -> None:
    """Raises ``ConfigError`` if ``energy`` or ``max_rank``, which bound what goes down, is out of range."""
    faults = []
    if not 0 < config.energy <= 1:
        faults.append(f"aggregation.energy: {config.energy}, must be above 0 and at most 1")
    if config.max_rank < 1:
        faults.append(f"aggregation.max_rank: {config.max_rank}, must be at least 1")
    if faults:
        raise ConfigError(f"{rule} has a setting out of its range", faults)
