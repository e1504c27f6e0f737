"""Adapters to and from records: the flattened tensors of each dtype in chunks, and their layout.

Decoding checks every length and shape against the bytes that did arrive before it allocates anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from common.adapter import Adapter
from common.canonical import canonical_json
from common.errors import ArtefactError
from common.strict_json import parse_strictly

FLAT = "wardround.flat"  # Array.stype: raw little-endian values; a .npy header would be trusted for its shape
# name: dtype in torch, dtype carried, numpy's name of that
DTYPES: dict[str, tuple[torch.dtype, torch.dtype, str]] = {
    "float32": (torch.float32, torch.float32, "<f4"),
    "bfloat16": (torch.bfloat16, torch.uint16, "<u2"),
    "int8": (torch.int8, torch.int8, "|i1"),
}
CHUNK_BYTES = 2 << 20
MAX_TENSORS = 4096
MAX_DIMENSIONS = 8
NAME = re.compile(r"[A-Za-z0-9_.\-]{1,200}")


def put_adapter(content: RecordDict, key: str, adapter: Adapter) -> None:
    names = {torch_type: name for name, (torch_type, _, _) in DTYPES.items()}
    layout: dict[str, dict[str, list[int]]] = {}
    parts: dict[str, list[Tensor]] = {}
    for name in sorted(adapter.tensors):
        tensor = adapter.tensors[name].detach().cpu()
        if tensor.dtype not in names:
            raise ArtefactError(f"{name} is {tensor.dtype}; the wire carries {', '.join(DTYPES)}")
        dtype = names[tensor.dtype]
        layout.setdefault(dtype, {})[name] = list(tensor.shape)
        parts.setdefault(dtype, []).append(tensor.reshape(-1))
    content[key] = ArrayRecord(
        {name: array for dtype, tensors in parts.items() for name, array in _flatten(dtype, tensors)}
    )
    about = {"base": adapter.base_sha256, "rank": adapter.rank, "preset": adapter.preset}
    content[f"{key}.head"] = ConfigRecord({"layout": canonical_json(layout), **about})


def decode_adapter(content: RecordDict, key: str = "adapter") -> Adapter:
    """The adapter under ``key``. Its arrays leave ``content`` one by one, so that it is never there twice.

    Raises ``ArtefactError``, before it allocates anything and with ``content`` whole, if layout and bytes do
    not agree.
    """
    head, arrays = content.get(f"{key}.head"), content.get(key)
    if not isinstance(head, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise ArtefactError(f"the message carries no {key}")
    base, rank, preset = head.get("base"), head.get("rank"), head.get("preset")
    if not isinstance(base, str) or not re.fullmatch(r"[0-9a-f]{1,64}", base):
        raise ArtefactError("an adapter's base digest is no digest")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank < 1 << 16:
        raise ArtefactError("an adapter's rank is no rank")
    if not isinstance(preset, str) or not NAME.fullmatch(preset):
        raise ArtefactError("an adapter's preset is no name")
    layout = _layout(head)
    elements = {dtype: sum(map(math.prod, shapes.values())) for dtype, shapes in layout.items()}
    if sum(-(-count // _most(dtype)) for dtype, count in elements.items()) != len(arrays):
        raise ArtefactError("an adapter's arrays are not as many as its layout says")
    chunks = {dtype: list(_cut(dtype, count)) for dtype, count in elements.items()}
    wanted = {name: length for parts in chunks.values() for name, length in parts}
    if set(arrays) != set(wanted):
        raise ArtefactError("an adapter's arrays are not those of its layout")
    for name, length in wanted.items():
        _check_array(arrays[name], name.partition(".")[0], length)
    tensors: dict[str, Tensor] = {}
    for dtype, shapes in layout.items():
        tensors |= _unflatten((arrays.pop(name).data for name, _ in chunks[dtype]), dtype, shapes)
    return Adapter(dict(sorted(tensors.items())), base, rank, preset)


def _flatten(dtype: str, parts: list[Tensor]) -> Iterator[tuple[str, Array]]:
    _, carried, numpy_name = DTYPES[dtype]
    flat = torch.cat(parts).view(carried).numpy().astype(numpy_name, copy=False)
    start = 0
    for name, length in _cut(dtype, flat.size):
        data = flat[start : start + length].tobytes()
        yield name, Array(dtype=dtype, shape=(length,), stype=FLAT, data=data)
        start += length


def _cut(dtype: str, elements: int) -> Iterator[tuple[str, int]]:
    """Name and number of values of each chunk of ``elements`` values."""
    most = _most(dtype)
    for index, start in enumerate(range(0, elements, most)):
        yield f"{dtype}.{index}", min(most, elements - start)


def _most(dtype: str) -> int:
    """Values a chunk."""
    return CHUNK_BYTES // np.dtype(DTYPES[dtype][2]).itemsize


def _layout(head: ConfigRecord) -> dict[str, dict[str, tuple[int, ...]]]:
    parsed = parse_strictly(head.get("layout"), "layout")
    if not isinstance(parsed, dict) or not set(parsed) <= set(DTYPES):
        raise ArtefactError(f"an adapter's layout has other dtypes than {', '.join(DTYPES)}")
    layout: dict[str, dict[str, tuple[int, ...]]] = {}
    seen: set[str] = set()
    for dtype, shapes in parsed.items():
        if not isinstance(shapes, dict) or not all(map(_is_shape, shapes.values())):
            raise ArtefactError("an adapter's layout has a shape that is none")
        if not all(NAME.fullmatch(name) for name in shapes) or seen & set(shapes):
            raise ArtefactError("an adapter's layout has a repeated or malformed name")
        seen |= set(shapes)
        layout[dtype] = {name: tuple(shape) for name, shape in shapes.items()}
    if len(seen) > MAX_TENSORS:
        raise ArtefactError(f"an adapter's layout names more than {MAX_TENSORS} tensors")
    return layout


def _is_shape(shape: Any) -> bool:
    return (
        isinstance(shape, list)
        and len(shape) <= MAX_DIMENSIONS
        and all(isinstance(side, int) and not isinstance(side, bool) and 0 < side < 1 << 31 for side in shape)
    )


def _check_array(array: Array, dtype: str, elements: int) -> None:
    if array.stype != FLAT or array.dtype != dtype:
        raise ArtefactError("an adapter's array is of another kind or dtype than its layout says")
    if array.shape != (elements,) or len(array.data) != elements * np.dtype(DTYPES[dtype][2]).itemsize:
        raise ArtefactError("an adapter's array has another length than its layout says")


def _unflatten(
    chunks: Iterator[bytes], dtype: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Views into one fresh tensor; nothing aliases the message."""
    torch_type, _, numpy_name = DTYPES[dtype]
    sizes = [math.prod(shape) for shape in shapes.values()]
    values = np.empty(sum(sizes), dtype=np.dtype(numpy_name).newbyteorder("="))
    start = 0
    for chunk in chunks:
        part = np.frombuffer(chunk, dtype=numpy_name)
        values[start : start + part.size] = part
        start += part.size
    parts = torch.split(torch.from_numpy(values).view(torch_type), sizes)
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
