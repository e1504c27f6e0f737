"""Bottleneck adapters: two small networks a block, beside a frozen encoder.

After Houlsby et al. 2019 and, for SAM, Wu et al. 2023 (Medical SAM Adapter): down, GELU, up. One follows the
attention's output layer; one stands beside the MLP and sees what the MLP sees. ``up`` starts at zero, so that
the network computes as before until it is trained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.backbones.base import Backbone
from common.seeding import derive_seed

SHARE = 4  # the bottleneck has a quarter of the layer's channels (Med-SA)


class Bottleneck(nn.Module):
    """(..., channels) -> (..., channels), zero at the start; ``name`` decides ``down``'s first weights."""

    def __init__(self, channels: int, name: str) -> None:
        super().__init__()
        width = max(1, channels // SHARE)
        generator = torch.Generator().manual_seed(derive_seed(0, "bottleneck", name))
        bound = channels**-0.5
        # Drawn on the processor whatever the default device is, so that a seed is one start everywhere.
        first = torch.rand((width, channels), generator=generator, device="cpu") * 2 - 1
        self.down = nn.Linear(channels, width)
        self.up = nn.Linear(width, channels)
        with torch.no_grad():
            self.down.weight.copy_(first * bound)
            for parameter in (self.down.bias, self.up.weight, self.up.bias):
                parameter.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.up(F.gelu(self.down(hidden)))
        return result


class AfterLayer(nn.Module):
    """``inner``, and a bottleneck that adds to what it gives."""

    def __init__(self, inner: nn.Module, channels: int, name: str) -> None:
        super().__init__()
        self.inner = inner
        self.bottleneck = Bottleneck(channels, name)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.inner(hidden)
        result: Tensor = inner + self.bottleneck(inner)
        return result


class BesideLayer(nn.Module):
    """``inner``, and a bottleneck beside it that sees the same and adds to the result."""

    def __init__(self, inner: nn.Module, channels: int, name: str) -> None:
        super().__init__()
        self.inner = inner
        self.bottleneck = Bottleneck(channels, name)

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.inner(hidden) + self.bottleneck(hidden)
        return result


def insert_bottlenecks(encoder: Backbone) -> list[str]:
    """Put two bottlenecks into every block; the names of their parameters below ``encoder``.

    Only blocks whose MLP keeps its channels can take the one beside it; all families' do.
    """
    for name in encoder.layers(["out"]):
        layer = encoder.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        _replace(encoder, name, AfterLayer(layer, layer.out_features, name))
    for name, channels in _mlps(encoder).items():
        _replace(encoder, name, BesideLayer(encoder.get_submodule(name), channels, name))
    return [name for name, _ in encoder.named_parameters() if ".bottleneck." in name]


def _mlps(encoder: Backbone) -> dict[str, int]:
    """The MLP of each block -> channels that it takes; its layers are those of the role ``mlp``."""
    found: dict[str, int] = {}
    for name in encoder.layers(["mlp"]):
        layer = encoder.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        found.setdefault(name.rpartition(".")[0], layer.in_features)  # its first layer says what comes in
    return found


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
