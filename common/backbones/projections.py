"""A fused query-key-value layer taken apart, so that an adapter can sit at the query and the value alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import ConfigError

# Roles (`Backbone.LAYERS`) of an attention with one fused layer, before and after `split_fused`.
FUSED_ROLES = {
    "qkv": ("attn.qkv",),
    "q": ("attn.qkv.q",),
    "k": ("attn.qkv.k",),
    "v": ("attn.qkv.v",),
    "out": ("attn.proj",),
}


class SplitQkv(nn.Module):
    """Three linear layers ``q``, ``k`` and ``v`` whose outputs, side by side, are the fused layer's.

    Guarantee: with the fused layer's weights the output is equal within rounding.
    """

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        width = fused.out_features // 3
        for index, name in enumerate(("q", "k", "v")):
            rows = slice(index * width, (index + 1) * width)
            part = nn.Linear(fused.in_features, width, bias=fused.bias is not None, device="meta")
            part.weight = _cut(fused.weight, rows)
            if fused.bias is not None:
                part.bias = _cut(fused.bias, rows)
            self.add_module(name, part)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., 3 C)."""
        return torch.cat([part(hidden) for part in self.children()], -1)


def _cut(whole: Tensor, rows: slice) -> nn.Parameter:
    return nn.Parameter(whole.detach()[rows].clone(), requires_grad=whole.requires_grad)


def split_fused(attentions: Iterable[Any]) -> None:
    """Replace each module's ``qkv`` by three layers; what is split already stays.

    Raises ``ConfigError`` where something else sits at ``qkv``, an adapter for instance.
    """
    attentions = [module for module in attentions if not isinstance(module.qkv, SplitQkv)]
    if strange := sorted({type(module.qkv).__name__ for module in attentions} - {"Linear"}):
        raise ConfigError(f"qkv is a {', '.join(strange)}: split the layers before adapters are put in")
    for module in attentions:
        module.qkv = SplitQkv(module.qkv)
