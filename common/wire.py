"""The wire: typed messages to and from Flower's records, and nothing else.

A message is a `RecordDict` of

``order``   a ConfigRecord ``{"json": ...}``: the `Round` that a request asks for.
``body``    a ConfigRecord ``{"json": ...}``: plain numbers, canonical JSON.
an adapter  an ArrayRecord with **one flat array a dtype** and, under the same key with ``.head``, a
            ConfigRecord with the layout ``{dtype: {name: shape}}``, the base digest, the preset and the
            rank. One array a tensor would cost more in Flower's framing than a small factor's values.
``refused`` a ConfigRecord ``{"code", "field"}``: all that a failing site may say.

Decoding checks every length and shape against the bytes that did arrive before it allocates anything, and
raises `ArtefactError` in words that repeat nothing of the message: what a site sent may hold anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto, recorddict_from_proto, recorddict_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from torch import Tensor

from common.adapter import Adapter, AdapterUpdate
from common.canonical import canonical_json
from common.errors import ArtefactError
from common.guard_api import PlanAnswer, SiteMetrics, StudentNote
from common.plan import Round, RunPlan, Stage
from common.strict_json import parse_strictly, read_strictly
from common.style import StyleSummary

Content: TypeAlias = RecordDict

ACTIONS: dict[Stage, str] = {
    Stage.propose: "query.propose",
    Stage.adapt: "train.adapter",
    Stage.style: "query.style",
    Stage.generator: "train.generator",
    Stage.student: "train.student",
    Stage.evaluate: "evaluate.site",
}

FLAT = "wardround.flat"  # Array.stype: raw little-endian values; a .npy header would be trusted for its shape
# name: dtype in torch, dtype carried, numpy's name of that
DTYPES: dict[str, tuple[torch.dtype, torch.dtype, str]] = {
    "float32": (torch.float32, torch.float32, "<f4"),
    "bfloat16": (torch.bfloat16, torch.uint16, "<u2"),
}
MAX_TENSORS = 4096
MAX_DIMENSIONS = 8
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,200}")
_CODE = re.compile(r"[A-Z][A-Z_]{0,39}")
_FIELD = re.compile(r"[a-z][a-z0-9_.]{0,59}")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Refusal:
    """A site's no: its border code, and for a policy's refusal the rule's field."""

    code: str
    field: str = ""


@dataclass(frozen=True)
class StudentRequest:
    """What ``train.student`` carries beside its order. ``generator`` only in the federated scope."""

    adapter: Adapter
    styles: dict[str, StyleSummary]
    generator: Adapter | None


# ---- requests: the server writes, the courier reads ---------------------------------------------


def encode_proposal(order: Round, plan: RunPlan) -> Content:
    return RecordDict({"order": _write(asdict(order)), "body": _write(asdict(plan))})


def decode_proposal(content: Content) -> RunPlan:
    return _read(content, "body", RunPlan)


def encode_request(order: Round, adapter: Adapter | None = None) -> Content:
    """An order, with the adapter to work from unless the stage needs none (``query.style``)."""
    content = RecordDict({"order": _write(asdict(order))})
    if adapter is not None:
        _put_adapter(content, "adapter", adapter)
    return content


def decode_order(content: Content) -> Round:
    return _read(content, "order", Round)


def decode_adapter(content: Content, key: str = "adapter") -> Adapter:
    """Raises ``ArtefactError`` before it allocates anything if layout and bytes do not agree."""
    head, arrays = content.get(f"{key}.head"), content.get(key)
    if not isinstance(head, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise ArtefactError(f"the message carries no {key}")
    base, rank, preset = head.get("base"), head.get("rank"), head.get("preset")
    if not isinstance(base, str) or not re.fullmatch(r"[0-9a-f]{1,64}", base):
        raise ArtefactError("an adapter's base digest is no digest")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank < 1 << 16:
        raise ArtefactError("an adapter's rank is no rank")
    if not isinstance(preset, str) or not _NAME.fullmatch(preset):
        raise ArtefactError("an adapter's preset is no name")
    layout = _layout(head)
    if set(arrays) != set(layout):
        raise ArtefactError("an adapter's arrays are not those of its layout")
    for dtype, shapes in layout.items():
        _check_array(arrays[dtype], dtype, shapes)
    tensors: dict[str, Tensor] = {}
    for dtype, shapes in layout.items():
        tensors |= _unflatten(arrays[dtype].data, dtype, shapes)
    return Adapter(dict(sorted(tensors.items())), base, rank, preset)


def encode_student_request(order: Round, request: StudentRequest) -> Content:
    content = encode_request(order, request.adapter)
    content["body"] = _write({site: asdict(style) for site, style in request.styles.items()})
    if request.generator is not None:
        _put_adapter(content, "generator", request.generator)
    return content


def decode_student_request(content: Content) -> StudentRequest:
    styles = _read(content, "body", dict[str, StyleSummary])
    generator = decode_adapter(content, "generator") if "generator" in content else None
    return StudentRequest(decode_adapter(content), styles, generator)


# ---- replies: the courier writes, the server reads ----------------------------------------------


def encode_update(order: Round, update: AdapterUpdate) -> Content:
    losses = [None if math.isnan(loss) else loss for loss in update.losses]
    body = {
        "nonce": order.nonce, "weight": update.weight, "started_from": update.started_from,
        "mechanism": update.mechanism, "losses": losses,
    }  # fmt: skip
    content = RecordDict({"body": _write(body)})
    _put_adapter(content, "adapter", update.adapter)
    return content


@dataclass(frozen=True)
class _UpdateBody:
    nonce: str
    weight: float
    started_from: str
    mechanism: str
    losses: list[float | None]


def decode_update(content: Content) -> tuple[str, AdapterUpdate]:
    """The nonce that the answer carries back, and the update."""
    body = _read(content, "body", _UpdateBody)
    if len(body.losses) != 2 or not _NAME.fullmatch(body.mechanism):
        raise ArtefactError("an update's numbers are malformed")
    first, last = (math.nan if loss is None else loss for loss in body.losses)
    adapter = decode_adapter(content)
    return body.nonce, AdapterUpdate(adapter, body.weight, body.started_from, body.mechanism, (first, last))


def encode_answer(answer: PlanAnswer) -> Content:
    return RecordDict({"body": _write(asdict(answer))})


def decode_answer(content: Content) -> PlanAnswer:
    answer = _read(content, "body", PlanAnswer)
    if not _NAME.fullmatch(answer.site):
        raise ArtefactError("a site's name must be letters, digits, '.', '_' and '-'")
    if answer.agrees:
        if not _NAME.fullmatch(answer.preset):
            raise ArtefactError("a site agrees to a plan and does not say what it will train")
        return PlanAnswer(answer.site, True, answer.plan_sha256, preset=answer.preset, rank=answer.rank)
    kept = _safe_refusal(answer.code, answer.field)
    return PlanAnswer(answer.site, False, answer.plan_sha256, kept.code, kept.field)


def encode_numbers(numbers: StyleSummary | StudentNote | SiteMetrics) -> Content:
    return RecordDict({"body": _write(asdict(numbers))})


def decode_style(content: Content) -> StyleSummary:
    return _read(content, "body", StyleSummary)


def decode_note(content: Content) -> StudentNote:
    return _read(content, "body", StudentNote)


def decode_metrics(content: Content) -> SiteMetrics:
    return _read(content, "body", SiteMetrics)


def encode_refusal(code: str, field: str = "") -> Content:
    """A reply that holds the border code and the policy's field, and nothing else."""
    refusal = _safe_refusal(code, field)
    return RecordDict({"refused": ConfigRecord({"code": refusal.code, "field": refusal.field})})


def decode_refusal(content: Content) -> Refusal | None:
    """The refusal that ``content`` is, or None. Codes of a strange form are replaced, not repeated."""
    record = content.get("refused")
    if record is None:
        return None
    entries = dict(record) if isinstance(record, ConfigRecord) else {}
    return _safe_refusal(entries.get("code"), entries.get("field"))


# ---- whole messages -----------------------------------------------------------------------------


def request_message(content: Content, node_id: int, stage: Stage, ttl_s: float) -> Message:
    return Message(content, node_id, ACTIONS[stage], ttl=ttl_s)


def reply_message(content: Content, request: Message) -> Message:
    return Message(content, reply_to=request)


def message_bytes(message: Message) -> int:
    """Size of the serialized message, bytes."""
    size: int = message_to_proto(message).ByteSize()
    return size


def pack_message(message: Message) -> bytes:
    packed: bytes = message_to_proto(message).SerializeToString()
    return packed


def unpack_message(packed: bytes) -> Message:
    return message_from_proto(ProtoMessage.FromString(packed))


def pack_content(content: Content) -> bytes:
    packed: bytes = recorddict_to_proto(content).SerializeToString()
    return packed


def unpack_content(packed: bytes) -> Content:
    return recorddict_from_proto(ProtoRecordDict.FromString(packed))


# ---- numbers ------------------------------------------------------------------------------------


def _write(value: Mapping[str, Any]) -> ConfigRecord:
    try:
        return ConfigRecord({"json": canonical_json(value)})
    except ValueError as error:
        raise ArtefactError("a number to be sent is not finite") from error


def _text(content: Content, key: str) -> object:
    record = content.get(key)
    return record.get("json") if isinstance(record, ConfigRecord) else None


def _read(content: Content, key: str, kind: type[_T]) -> _T:
    return read_strictly(_text(content, key), kind, key)


def _safe_refusal(code: Any, field: Any) -> Refusal:
    good_code = isinstance(code, str) and _CODE.fullmatch(code)
    good_field = isinstance(field, str) and _FIELD.fullmatch(field)
    return Refusal(code if good_code else "SITE_FAILED", field if good_field else "")


# ---- tensors ------------------------------------------------------------------------------------


def _put_adapter(content: Content, key: str, adapter: Adapter) -> None:
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
    content[key] = ArrayRecord({dtype: _flatten(dtype, tensors) for dtype, tensors in parts.items()})
    about = {"base": adapter.base_sha256, "rank": adapter.rank, "preset": adapter.preset}
    content[f"{key}.head"] = ConfigRecord({"layout": canonical_json(layout), **about})


def _flatten(dtype: str, parts: list[Tensor]) -> Array:
    _, carried, numpy_name = DTYPES[dtype]
    flat = torch.cat(parts).view(carried).numpy().astype(numpy_name, copy=False)
    return Array(dtype=dtype, shape=(flat.size,), stype=FLAT, data=flat.tobytes())


def _layout(head: ConfigRecord) -> dict[str, dict[str, tuple[int, ...]]]:
    parsed = parse_strictly(head.get("layout"), "layout")
    if not isinstance(parsed, dict) or not set(parsed) <= set(DTYPES):
        raise ArtefactError(f"an adapter's layout has other dtypes than {', '.join(DTYPES)}")
    layout: dict[str, dict[str, tuple[int, ...]]] = {}
    seen: set[str] = set()
    for dtype, shapes in parsed.items():
        if not isinstance(shapes, dict) or not all(map(_is_shape, shapes.values())):
            raise ArtefactError("an adapter's layout has a shape that is none")
        if not all(_NAME.fullmatch(name) for name in shapes) or seen & set(shapes):
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


def _check_array(array: Array, dtype: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    elements = sum(math.prod(shape) for shape in shapes.values())
    if array.stype != FLAT or array.dtype != dtype:
        raise ArtefactError("an adapter's array is of another kind or dtype than its layout says")
    if array.shape != (elements,) or len(array.data) != elements * np.dtype(DTYPES[dtype][2]).itemsize:
        raise ArtefactError("an adapter's array has another length than its layout says")


def _unflatten(data: bytes, dtype: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Views into one fresh tensor; nothing aliases the message."""
    torch_type, _, numpy_name = DTYPES[dtype]
    values = np.frombuffer(data, dtype=numpy_name)
    flat = torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=True)).view(torch_type)
    sizes = [math.prod(shape) for shape in shapes.values()]
    parts = torch.split(flat, sizes)
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
