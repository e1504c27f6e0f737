"""The precision of the wire: what adapters are computed with, and the fewer bits that they travel with.

========  ============================  =========================================================
recipe    up: a step (trained - sent)   down: the adapter itself
========  ============================  =========================================================
float32   float32                       float32
bfloat16  bfloat16                      bfloat16
int8      int8, blocks of 256 values    bfloat16, for what is sent down is no small difference
========  ============================  =========================================================

A step is rounded relative to itself, not to the weights that it changes, so that a small one is not lost.
Noise, where there is any, is in the step before it is packed: rounding is post-processing and costs no
privacy. A packed tensor is a tensor of its own dtype, under its own name, and is listed as such in the plan;
of int8, ``NAME.scale`` (float32, one a block of the flattened tensor) stands beside ``NAME``::

    scale = max |x| / 127        q = round(x / scale)        x ~ q * scale
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from common.adapter import Adapter
from common.errors import ArtefactError
from common.recipe import WireDtype

BLOCK = 256  # values that share one scale
SCALE = ".scale"
LEVELS = 127


def pack(adapter: Adapter, dtype: WireDtype) -> Adapter:
    """``adapter`` as it goes up; its tensors are float32. Values that are not finite stay so."""
    return replace(adapter, tensors=_packed(adapter.tensors, dtype))


def pack_down(adapter: Adapter, dtype: WireDtype) -> Adapter:
    """``adapter`` as it goes down. Of values that `sendable` gave, nothing is lost."""
    return pack(adapter, _downwards(dtype))


def unpack(adapter: Adapter) -> Adapter:
    """The float32 values that ``adapter`` carries, whichever way it was packed.

    Raises ``ArtefactError`` if the scales of an int8 tensor are missing or of another shape.
    """
    scales = {f"{name}{SCALE}" for name, tensor in adapter.tensors.items() if tensor.dtype == torch.int8}
    if not scales <= adapter.tensors.keys():
        raise ArtefactError("an int8 tensor comes without its scales")
    tensors: dict[str, Tensor] = {}
    for name, tensor in adapter.tensors.items():
        if tensor.dtype == torch.int8:
            tensors[name] = _from_int8(tensor, adapter.tensors[f"{name}{SCALE}"])
        elif name not in scales:
            tensors[name] = tensor.to(torch.float32)
    return replace(adapter, tensors=tensors)


def sendable(tensor: Tensor, dtype: WireDtype) -> Tensor:
    """``tensor`` with the values that arrive when it is sent down; of its own dtype, and itself if exact."""
    if _downwards(dtype) is WireDtype.float32:
        return tensor
    return tensor.to(torch.bfloat16).to(tensor.dtype)


def _downwards(dtype: WireDtype) -> WireDtype:
    return WireDtype.bfloat16 if dtype is WireDtype.int8 else dtype


def _packed(tensors: Mapping[str, Tensor], dtype: WireDtype) -> dict[str, Tensor]:
    if dtype is WireDtype.float32:
        return dict(tensors)
    if dtype is WireDtype.bfloat16:
        return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        packed[name], packed[f"{name}{SCALE}"] = _to_int8(tensor)
    return packed


def _to_int8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    blocks = _blocks(tensor.to(torch.float32))
    scale = blocks.abs().amax(1) / LEVELS
    values = (blocks / scale.clamp(min=torch.finfo(scale.dtype).tiny)[:, None]).round().clamp(-LEVELS, LEVELS)
    return values.to(torch.int8).flatten()[: tensor.numel()].view(tensor.shape), scale


def _from_int8(values: Tensor, scale: Tensor) -> Tensor:
    if scale.dtype != torch.float32 or scale.shape != (math.ceil(values.numel() / BLOCK),):
        raise ArtefactError("an int8 tensor's scales are of another shape or dtype")
    blocks = _blocks(values.to(torch.float32)) * scale[:, None]
    return blocks.flatten()[: values.numel()].view(values.shape)


def _blocks(tensor: Tensor) -> Tensor:
    """The flattened tensor as rows of ``BLOCK`` values; the last one filled up with zeros."""
    flat = tensor.flatten()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
