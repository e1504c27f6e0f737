"""The wire: typed messages to and from Flower's records, and nothing else.

A message is a `RecordDict` of

``order``   a ConfigRecord ``{"json": ...}``: the `Round` that a request asks for.
``body``    a ConfigRecord ``{"json": ...}``: plain numbers, canonical JSON.
an adapter  an ArrayRecord with the flattened tensors of each dtype in **chunks** ``DTYPE.0, DTYPE.1, ..`` of
            2 MiB, the last one shorter, and, under the same key with ``.head``, a ConfigRecord with the
            layout ``{dtype: {name: shape}}``, the base digest, the preset and the rank. One array a tensor
            would cost more in Flower's framing than a small factor's values; one array for all would pass
            the limits of proxies, and a link that breaks would lose it whole.
``refused`` a ConfigRecord ``{"code", "field"}``: all that a failing site may say.

Decoding checks every length and shape against the bytes that did arrive before it allocates anything, and
raises `ArtefactError` in words that repeat nothing of the message: what a site sent may hold anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias, TypeVar

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto, recorddict_from_proto, recorddict_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from common.adapter import Adapter, AdapterUpdate
from common.canonical import canonical_json
from common.errors import ArtefactError
from common.guard_api import PlanAnswer, SiteMetrics, StudentNote
from common.plan import Round, RunPlan, Stage
from common.privacy.heads import MOST_HEADS, SignedHead, without_empty_head
from common.strict_json import read_strictly
from common.style import StyleSummary
from common.wire.tensors import NAME, decode_adapter, put_adapter

Content: TypeAlias = RecordDict

ACTIONS: dict[Stage, str] = {
    Stage.propose: "query.propose",
    Stage.adapt: "train.adapter",
    Stage.style: "query.style",
    Stage.generator: "train.generator",
    Stage.shared_student: "train.shared_student",
    Stage.student: "train.student",
    Stage.evaluate: "evaluate.site",
}

MAX_NOTICE = 500  # characters
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
    """What ``train.student`` carries beside its order.

    ``generator`` and ``student``, the weights to go on from, each only where its scope is federated.
    """

    adapter: Adapter
    styles: dict[str, StyleSummary]
    generator: Adapter | None
    student: Adapter | None = None


# ---- requests: the server writes, the courier reads ---------------------------------------------


def encode_proposal(order: Round, plan: RunPlan) -> Content:
    return RecordDict({"order": _order(order), "body": _write(asdict(plan))})


def decode_proposal(content: Content) -> RunPlan:
    return _read(content, "body", RunPlan)


def encode_request(order: Round, adapter: Adapter | None = None) -> Content:
    """An order, with the adapter to work from unless the stage needs none (``query.style``)."""
    content = RecordDict({"order": _order(order)})
    if adapter is not None:
        put_adapter(content, "adapter", adapter)
    return content


def decode_order(content: Content) -> Round:
    order = _read(content, "order", Round)
    if len(order.notice) > MAX_NOTICE:
        raise ArtefactError(f"an order's notice has more than {MAX_NOTICE} characters")
    if len(order.heads) > MOST_HEADS:
        raise ArtefactError(f"an order names more than {MOST_HEADS} ledger heads")
    return order


def encode_student_request(order: Round, request: StudentRequest) -> Content:
    content = encode_request(order, request.adapter)
    content["body"] = _write({site: asdict(style) for site, style in request.styles.items()})
    if request.generator is not None:
        put_adapter(content, "generator", request.generator)
    if request.student is not None:
        put_adapter(content, "student", request.student)
    return content


def decode_student_request(content: Content) -> StudentRequest:
    styles = _read(content, "body", dict[str, StyleSummary])
    generator, student = (
        decode_adapter(content, part) if part in content else None for part in ("generator", "student")
    )
    return StudentRequest(decode_adapter(content), styles, generator, student)


# ---- replies: the courier writes, the server reads ----------------------------------------------


def encode_update(order: Round, update: AdapterUpdate) -> Content:
    losses = [None if math.isnan(loss) else loss for loss in update.losses]
    body = {
        "nonce": order.nonce, "weight": update.weight, "started_from": update.started_from,
        "mechanism": update.mechanism, "losses": losses,
        "ledger_head": None if update.ledger_head is None else asdict(update.ledger_head),
    }  # fmt: skip
    content = RecordDict({"body": _write(without_empty_head(body))})
    put_adapter(content, "adapter", update.adapter)
    return content


@dataclass(frozen=True)
class _UpdateBody:
    nonce: str
    weight: float
    started_from: str
    mechanism: str
    losses: list[float | None]
    ledger_head: SignedHead | None = None


def decode_update(content: Content) -> tuple[str, AdapterUpdate]:
    """The nonce that the answer carries back, and the update."""
    body = _read(content, "body", _UpdateBody)
    if len(body.losses) != 2 or not NAME.fullmatch(body.mechanism):
        raise ArtefactError("an update's numbers are malformed")
    first, last = (math.nan if loss is None else loss for loss in body.losses)
    update = AdapterUpdate(
        adapter=decode_adapter(content),
        weight=body.weight,
        started_from=body.started_from,
        mechanism=body.mechanism,
        losses=(first, last),
        ledger_head=body.ledger_head,
    )
    return body.nonce, update


def encode_answer(answer: PlanAnswer) -> Content:
    return RecordDict({"body": _write(without_empty_head(asdict(answer)))})


def decode_answer(content: Content) -> PlanAnswer:
    answer = _read(content, "body", PlanAnswer)
    if not NAME.fullmatch(answer.site):
        raise ArtefactError("a site's name must be letters, digits, '.', '_' and '-'")
    if answer.agrees:
        if not NAME.fullmatch(answer.preset):
            raise ArtefactError("a site agrees to a plan and does not say what it will train")
        return replace(answer, code="", field="")
    kept = _safe_refusal(answer.code, answer.field)
    words = (answer.site, False, answer.plan_sha256, kept.code, kept.field)
    return PlanAnswer(*words, approval=answer.approval)


def encode_numbers(numbers: StyleSummary | StudentNote | SiteMetrics) -> Content:
    return RecordDict({"body": _write(without_empty_head(asdict(numbers)))})


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


def _order(order: Round) -> ConfigRecord:
    """Without its heads where there are none: a run without privacy knows nothing of them."""
    body = asdict(order)
    return _write(body if order.heads else {name: value for name, value in body.items() if name != "heads"})


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
