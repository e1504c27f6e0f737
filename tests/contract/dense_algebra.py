"""Small adapters for the tests of aggregation, and the dense algebra that says what must come out.

The oracle keeps full weight matrices, adds to each site's matrix what the site trained, and averages them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from common.adapter import Adapter, AdapterUpdate
from common.recipe import WireDtype
from common.tuning.halves import BOTH, Halves
from server.aggregation import Share
from server.aggregation.base import AggregationRule

EQUAL = {"a": 4, "b": 4, "c": 4, "d": 4}  # site -> rank
WEIGHTS = [1.0, 5.0, 2.0, 3.0]
LAYERS = {"encoder.0.qkv": (12, 10), "encoder.0.proj": (9, 14)}
BASE = "ab" * 32
EVERYTHING_GOES_DOWN = {"energy": 1.0, "max_rank": 64, "wire_dtype": WireDtype.float32}


def initial_adapter(rank: int, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "head.weight": torch.randn(3, 5, generator=generator),
        "head.bias": torch.randn(3, generator=generator),
    }
    for layer, (out, width) in LAYERS.items():
        tensors[f"{layer}.lora_A"] = torch.randn(rank, width, generator=generator) / width**0.5
        tensors[f"{layer}.lora_B"] = torch.zeros(out, rank)
    return Adapter(tensors, BASE, rank, "base")


def begun_adapter(rank: int) -> Adapter:
    """One that an earlier run left: B is not zero, and every layer has three folded components."""
    generator = torch.Generator().manual_seed(7)
    tensors = dict(initial_adapter(rank).tensors)
    for layer, (out, width) in LAYERS.items():
        tensors[f"{layer}.lora_B"] = torch.randn(out, rank, generator=generator)
        tensors[f"{layer}.folded_A"] = torch.randn(3, width, generator=generator)
        tensors[f"{layer}.folded_B"] = torch.randn(out, 3, generator=generator)
    return Adapter(tensors, BASE, rank, "base")


def doubled(adapter: Adapter) -> Adapter:
    """The same in float64."""
    return replace(adapter, tensors={name: tensor.double() for name, tensor in adapter.tensors.items()})


def shares_of(
    ranks: Mapping[str, int], layers: Mapping[str, tuple[str, ...]] | None = None
) -> dict[str, Share]:
    """Every layer at every site, unless ``layers`` says otherwise for it."""
    every = tuple(sorted(LAYERS))
    return {site: Share("base", rank, (layers or {}).get(site, every)) for site, rank in ranks.items()}


def train(
    adapter: Adapter, seed: int, weight: float = 1.0, scale: float = 0.3, halves: Halves = BOTH
) -> AdapterUpdate:
    """What a site sends back: everything it was sent as trainable in this round, moved at random."""
    generator = torch.Generator().manual_seed(seed)
    moved = {
        name: tensor + scale * torch.randn(tensor.shape, generator=generator)
        for name, tensor in sorted(adapter.trained(halves).tensors.items())
    }
    return AdapterUpdate(replace(adapter, tensors=moved), weight, adapter.digest)


def site_weights(sent: Adapter, update: AdapterUpdate) -> dict[str, Tensor]:
    """The site's whole weight change after training: what it folded into its base, and what it trained."""
    # Whatever the site did not send up (folded factors, a fixed A) is what it was sent.
    return changes(replace(sent, tensors={**sent.tensors, **update.adapter.tensors}))


def dense_mean(parts: Sequence[tuple[float, dict[str, Tensor]]]) -> dict[str, Tensor]:
    total = sum(weight for weight, _ in parts)
    return {name: sum(weight * part[name] for weight, part in parts) / total for name in parts[0][1]}


def changes(adapter: Adapter) -> dict[str, Tensor]:
    """Layer -> its whole change in float64; zero where the adapter has no factor of it."""
    exact = doubled(adapter)
    present = {*adapter.layers(), *adapter.folded_layers()}
    return {
        layer: exact.change(layer) if layer in present else torch.zeros(shape, dtype=torch.float64)
        for layer, shape in LAYERS.items()
    }


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def frobenius(parts: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in parts.values()))


def play(rule: AggregationRule, updates: dict[str, AdapterUpdate]) -> float:
    rule.open_round()
    for site, update in updates.items():
        rule.fold(site, update)
    return rule.close_round()


def same_tensors(left: Adapter, right: Adapter) -> bool:
    return left.tensors.keys() == right.tensors.keys() and all(
        torch.equal(tensor, right.tensors[name]) for name, tensor in left.tensors.items()
    )


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]
