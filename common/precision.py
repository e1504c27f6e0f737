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
PART = 1 << 18  # values looked at together


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
    scales = _scales(adapter)
    tensors: dict[str, Tensor] = {}
    for name, tensor in adapter.tensors.items():
        if name in scales:
            tensors[name] = _from_int8(tensor, scales[name])
        elif name.removesuffix(SCALE) not in scales:
            tensors[name] = tensor.to(torch.float32)
    return replace(adapter, tensors=tensors)


def carried(adapter: Adapter) -> set[str]:
    """The names of the tensors that `unpack` gives.

    Raises what `unpack` raises.
    """
    scales = _scales(adapter)
    return {name for name in adapter.tensors if name in scales or name.removesuffix(SCALE) not in scales}


def norm(adapter: Adapter) -> float:
    """The Euclidean norm of what ``adapter`` carries, not unpacked for it; not finite if any of it is not.

    Raises what `unpack` raises.
    """
    scales = _scales(adapter)
    squares = 0.0
    for name, tensor in adapter.tensors.items():
        if name in scales:
            squares += _norm_of_int8(tensor, scales[name])
        elif name.removesuffix(SCALE) not in scales:
            squares += sum(float(part.double().square().sum()) for part in in_parts(tensor))
    return math.sqrt(squares)


def in_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """``tensor`` in flat parts, so that looking at it costs the memory of one of them."""
    return torch.split(tensor.flatten(), PART)


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


def _scales(adapter: Adapter) -> dict[str, Tensor]:
    """Name of each int8 tensor -> its scales."""
    packed = [name for name, tensor in adapter.tensors.items() if tensor.dtype == torch.int8]
    scales = {name: adapter.tensors.get(f"{name}{SCALE}") for name in packed}
    for name, scale in scales.items():
        if scale is None:
            raise ArtefactError("an int8 tensor comes without its scales")
        blocks = math.ceil(adapter.tensors[name].numel() / BLOCK)
        if scale.dtype != torch.float32 or scale.shape != (blocks,):
            raise ArtefactError("an int8 tensor's scales are of another shape or dtype")
    return {name: scale for name, scale in scales.items() if scale is not None}


def _norm_of_int8(values: Tensor, scale: Tensor) -> float:
    """The squared norm."""
    parts = zip(in_parts(values), torch.split(scale.double(), PART // BLOCK), strict=True)
    return sum(float(_blocks(part.double()).square().sum(1) @ by.square()) for part, by in parts)


def _from_int8(values: Tensor, scale: Tensor) -> Tensor:
    blocks = _blocks(values.to(torch.float32)) * scale[:, None]
    return blocks.flatten()[: values.numel()].view(values.shape)


def _blocks(tensor: Tensor) -> Tensor:
    """The flattened tensor as rows of ``BLOCK`` values; the last one filled up with zeros."""
    flat = tensor.flatten()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
