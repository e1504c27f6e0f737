"""Adapters: the small named tensors that hospitals train and exchange instead of images.

Naming of tensors, which aggregation, screening and egress rely on:

``<layer>.lora_A`` (r, in) and ``<layer>.lora_B`` (out, r)
    the factors of a layer that a site trains; its weight changes by ``lora_B @ lora_A`` (no further
    scaling). A preset may keep ``lora_A`` fixed: then it is sent down, and never up.
``<layer>.folded_A`` (f, in) and ``<layer>.folded_B`` (out, f)
    factors that a site adds to its frozen base before training, on any layer; sent down, never up.
anything else
    a dense tensor that is trained and averaged as it is (the decoder, a head, a bottleneck).

A convolution's factors are those of its weight flattened to (out, in * kernel * kernel).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from common.errors import ArtefactError
from common.privacy.heads import SignedHead
from common.tuning.halves import B_ALONE, BOTH, Halves, without
from common.tuning.presets import sends_a

FACTOR_SUFFIXES = ("lora_A", "lora_B", "folded_A", "folded_B")


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and raw values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Adapter:
    """Frozen, named tensors for one base model.

    Attributes:
        tensors: name -> tensor, named as the module says. Never aliases of live parameters.
        base_sha256: digest of the base checkpoint that the tensors belong to.
        rank: of the factors; 0 where there are none.
        preset: which of the network's layers they belong to (`common.tuning.presets`).
    """

    tensors: Mapping[str, Tensor]
    base_sha256: str
    rank: int
    preset: str

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the base's digest, the preset, the rank and every tensor."""
        text = f"{self.base_sha256}|{self.preset}|{self.rank}|{tensors_digest(self.tensors)}"
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def folded_digest(self) -> str:
        """SHA-256 (hex) of the folded factors."""
        return tensors_digest({name: t for name, t in self.tensors.items() if ".folded_" in name})

    @property
    def elements(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def a_sha256(self) -> str:
        """SHA-256 (hex) of the factors A as float32, names and shapes among it; empty where there are none.

        The same for every dtype that the values travel in, as long as that changes none of them.
        """
        factors = {name: t.float() for name, t in self.tensors.items() if name.endswith(".lora_A")}
        return tensors_digest(factors) if factors else ""

    def layers(self) -> list[str]:
        """The layers that carry factors which a site trains, in order."""
        return sorted(name.removesuffix(".lora_B") for name in self.tensors if name.endswith(".lora_B"))

    def folded_layers(self) -> list[str]:
        """The layers that carry folded factors, in order."""
        return sorted({name.rpartition(".")[0] for name in self.tensors if ".folded_" in name})

    def trained(self, halves: Halves = BOTH) -> Adapter:
        """What a site trains and sends up: no folded factor, and no A where the preset keeps it fixed.

        ``halves``: of the factors, those whose turn it is (`common.tuning.halves`).
        """
        left = (".folded_A", ".folded_B", *without(halves if sends_a(self.preset) else halves & B_ALONE))
        return replace(self, tensors={k: v for k, v in self.tensors.items() if not k.endswith(left)})

    def step_from(self, start: Adapter) -> Adapter:
        """How far each of this adapter's tensors lies from that of ``start``, which may hold more."""
        return replace(self, tensors={k: v - start.tensors[k] for k, v in self.tensors.items()})

    def advanced(self, step: Adapter) -> Adapter:
        """What a site trained that was sent this and answered ``step``; of the tensors that moved."""
        return replace(step, tensors={k: self.tensors[k] + v for k, v in step.tensors.items()})

    def change(self, layer: str) -> Tensor:
        """The whole change of ``layer``'s weight (out, in): trained and folded factors together."""
        parts = [
            self.tensors[f"{layer}.{kind}_B"] @ self.tensors[f"{layer}.{kind}_A"]
            for kind in ("lora", "folded")
            if f"{layer}.{kind}_A" in self.tensors
        ]
        return torch.stack(parts).sum(0)

    def to_bytes(self) -> bytes:
        """The adapter as a safetensors file, which `load` reads."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        about = {"base_sha256": self.base_sha256, "rank": str(self.rank), "preset": self.preset}
        return save(tensors, metadata=about)

    def save(self, path: Path) -> None:
        path.write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> Adapter:
        """Raises ``ArtefactError`` if ``path`` is no adapter of ours."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return cls(tensors, metadata["base_sha256"], int(metadata["rank"]), metadata["preset"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ArtefactError(f"{path} is not a Wardround adapter: {error}") from error


@dataclass(frozen=True)
class AdapterUpdate:
    """What leaves a site after training: how far its trained tensors moved, and how to weigh them.

    Attributes:
        adapter: the step from what it was sent to what it trained (`Adapter.step_from`), packed as the
            plan says (`common.precision`). The server makes `Adapter.trained` of it again.
        weight: declared patient count, capped by the site's policy.
        started_from: digest of the adapter that the site was sent.
        mechanism: the differential-privacy event behind it, or "none".
        losses: mean training loss of the first and of the last tenth of the steps.
        ledger_head: of the site's ledger in a private run, with this update's reservation in it.
    """

    adapter: Adapter
    weight: float
    started_from: str
    mechanism: str = "none"
    losses: tuple[float, float] = (float("nan"), float("nan"))
    ledger_head: SignedHead | None = None
