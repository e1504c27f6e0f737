"""Five hundred malformed updates: none admitted, none crashes the server, none takes much of its memory."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord

from common import wire
from common.adapter import Adapter, AdapterUpdate
from common.errors import ArtefactError
from common.plan import PayloadSpec, Round, Stage, TensorSpec
from common.precision import pack
from common.recipe import WireDtype
from common.wire.sizes import is_larger
from server.rounds import FRAME_BYTES
from server.screening import Sent, admit

CASES = 500
BASE = "ab" * 32
ORDER = Round("cd" * 32, Stage.adapt, 0, 60.0, "the nonce of this message")
ROWS = 1 << 13
SENT = Adapter(
    {"l.lora_A": torch.ones(4, 64), "l.lora_B": torch.ones(ROWS, 4), "head": torch.ones(ROWS, 512)},
    BASE, 4, "base",
)  # fmt: skip
STEP = pack(replace(SENT, tensors={name: 0.1 * t for name, t in SENT.tensors.items()}), WireDtype.bfloat16)
SIZE = sum(tensor.nbytes for tensor in STEP.tensors.values())
SPEC = PayloadSpec(
    Stage.adapt,
    [TensorSpec(name, list(tensor.shape), "bfloat16") for name, tensor in STEP.tensors.items()],
    [], int(1.02 * SIZE) + 1024,
)  # fmt: skip
LIMIT = SPEC.max_bytes + FRAME_BYTES
ASKED = Sent.of(SENT, ORDER.nonce)
GOOD = AdapterUpdate(STEP, 10.0, SENT.digest, losses=(1.0, 0.5))
Rng = random.Random


class Server:
    """What stands between the network and the round: the size, the decoder and the screening."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.answered = False

    def receive(self, content: wire.Content) -> str:
        """ "" for what was admitted, else why it was not."""
        if is_larger(content, LIMIT):
            return "TOO_LARGE"
        try:
            nonce, update = wire.decode_update(content)
            admit(update, nonce, ASKED, SPEC, 1000, self.seen)
        except ArtefactError as error:
            return "; ".join(error.faults) or error.message
        return ""


def encoded(update: AdapterUpdate = GOOD, order: Round = ORDER) -> wire.Content:
    return wire.encode_update(order, update)


def spoil_value(rng: Rng, value: float) -> wire.Content:
    name = rng.choice(list(STEP.tensors))
    tensor = STEP.tensors[name].clone()
    tensor.view(-1)[rng.randrange(tensor.numel())] = value
    return encoded(replace(GOOD, adapter=replace(STEP, tensors={**STEP.tensors, name: tensor})))


def with_tensor(rng: Rng, change: Callable[[torch.Tensor], torch.Tensor]) -> wire.Content:
    name = rng.choice(list(STEP.tensors))
    tensors = {**STEP.tensors, name: change(STEP.tensors[name])}
    return encoded(replace(GOOD, adapter=replace(STEP, tensors=tensors)))


def renamed(rng: Rng) -> wire.Content:
    tensors = dict(STEP.tensors)
    name = rng.choice(list(tensors))
    tensors[rng.choice(["patient_0017", "l.lora_A.1", "..", "l.lora_C", name + "."])] = tensors.pop(name)
    return encoded(replace(GOOD, adapter=replace(STEP, tensors=tensors)))


def layout(rng: Rng, edit: Callable[[dict[str, dict[str, object]]], object]) -> wire.Content:
    content = encoded()
    head = content["adapter.head"]
    shapes = json.loads(str(head["layout"]))
    edit(shapes)
    head["layout"] = json.dumps(shapes)  # type: ignore[index, call-overload]
    return content


def huge_header(rng: Rng) -> wire.Content:
    kind = rng.randrange(4)
    if kind == 0:
        return layout(rng, lambda s: s["bfloat16"].update(head=[2**30, 2**30]))
    if kind == 1:
        return layout(rng, lambda s: s["bfloat16"].update({f"t{n}": [1] for n in range(5000)}))
    if kind == 2:
        content = encoded()
        content["adapter.head"]["layout"] = "[" * (2 * LIMIT)  # type: ignore[index, call-overload]
        return content
    return layout(rng, lambda s: s["bfloat16"].update(head=[2**31 - 1] * 8))


def arrays(rng: Rng) -> wire.Content:
    """Another kind, dtype, length or number of arrays than the layout says; a pickle among them."""
    content = encoded()
    record = content["adapter"]
    name = rng.choice(list(record))
    old = record[name]
    parts = {"dtype": old.dtype, "shape": old.shape, "stype": old.stype, "data": old.data}
    pickle = b"\x80\x04\x95cos\nsystem\n(S'true'\ntR." + b"0" * 64
    changes: list[dict[str, object]] = [
        {"stype": "numpy.ndarray"}, {"stype": "pickle", "data": pickle}, {"data": pickle},
        {"dtype": "float64"}, {"dtype": "object"}, {"shape": (2, 2)}, {"data": old.data[:-2]},
        {"data": old.data + b"\0\0"}, {"data": b""},
    ]  # fmt: skip
    arrays = {key: record[key] for key in record}
    arrays[name] = Array(**(parts | rng.choice(changes)))  # type: ignore[arg-type]
    if rng.random() < 0.3:
        arrays.pop(rng.choice(list(arrays)))
    elif rng.random() < 0.2:
        arrays["bfloat16.7"] = old
    content["adapter"] = ArrayRecord(arrays)
    return content


def body(rng: Rng) -> wire.Content:
    content = encoded()
    good = json.loads(str(content["body"]["json"]))
    wrong: list[tuple[str, object]] = [
        ("weight", "3"), ("weight", True), ("weight", None), ("weight", 1e400), ("losses", [1.0] * 3),
        ("losses", "1"), ("nonce", 7), ("mechanism", "a b"), ("patient", "MRN-1"), ("started_from", ["x"]),
    ]  # fmt: skip
    key, value = rng.choice(wrong)
    text = json.dumps(good | {key: value})
    texts = [text, text[: rng.randrange(len(text))], "[" * rng.randrange(1, 100_000), "", "null", "\0"]
    content["body"] = ConfigRecord({"json": rng.choice(texts)})
    return content


def records(rng: Rng) -> wire.Content:
    content = encoded()
    name = rng.choice(["body", "adapter", "adapter.head"])
    kind = rng.randrange(3)
    if kind == 0:
        del content[name]
    elif kind == 1:
        content[name] = MetricRecord({"json": 1.0})
    else:
        content[name] = ArrayRecord() if name != "adapter" else ConfigRecord({"json": "{}"})
    return content


def too_large(rng: Rng) -> wire.Content:
    content = encoded()
    content["more"] = ConfigRecord({"bytes": b"\0" * (2 << 20), "list": [0.0] * rng.randrange(1, 9)})
    return content


KINDS: dict[str, Callable[[Rng], wire.Content]] = {
    "NaN": lambda rng: spoil_value(rng, float("nan")),
    "infinite": lambda rng: spoil_value(rng, rng.choice([1, -1]) * float("inf")),
    "absurd": lambda rng: spoil_value(rng, 10.0 ** rng.randrange(9, 38)),
    "shape": lambda rng: with_tensor(rng, lambda t: t[:-1] if rng.random() < 0.5 else t.T),
    "dtype": lambda rng: with_tensor(rng, lambda t: t[: len(t) // 2].to(torch.float32)),
    "names": renamed,
    "huge header": huge_header,
    "arrays": arrays,
    "numbers": body,
    "records": records,
    "too large": too_large,
    "another base": lambda rng: encoded(replace(GOOD, adapter=replace(STEP, base_sha256="ef" * 32))),
    "another preset": lambda rng: encoded(replace(GOOD, adapter=replace(STEP, preset="wide"))),
    "another rank": lambda rng: encoded(replace(GOOD, adapter=replace(STEP, rank=rng.randrange(5, 99)))),
    "old digest": lambda rng: encoded(replace(GOOD, started_from=f"{rng.getrandbits(256):064x}")),
    "weight": lambda rng: encoded(replace(GOOD, weight=rng.choice([0.0, -1.0, 1000.5, 1e300]))),
    "replay": lambda rng: encoded(order=replace(ORDER, nonce=f"{rng.getrandbits(128):032x}")),
    "duplicate": lambda rng: encoded(),
}


def memory(key: str) -> int:
    """``VmRSS`` or ``VmHWM`` (its peak) of this process, bytes."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


def test_of_500_malformed_updates_none_is_admitted_and_none_takes_twice_the_limit() -> None:
    rng = random.Random(20261120)
    server = Server()
    assert server.receive(encoded()) == "", "the untouched one is admitted, and every later one a replay"
    kinds = list(KINDS)
    reasons: Counter[str] = Counter()
    most = 0
    for case in range(CASES):
        kind = kinds[case % len(kinds)]
        content = KINDS[kind](rng)
        size = LIMIT if kind == "too large" else SIZE
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = memory("VmRSS")
        reason = server.receive(content)
        most = max(most, memory("VmHWM") - before + size)
        assert reason, f"case {case} ({kind}) was admitted"
        assert "patient" not in reason
        assert "MRN" not in reason
        reasons[reason] += 1
    assert len(reasons) >= 12, "they are rejected for what is wrong with them"
    assert most < 2 * LIMIT, f"{most / LIMIT:.2f} times the limit"


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_rejected_for_its_own_fault(kind: str) -> None:
    """Alone, too: not because an earlier answer had used up the nonce."""
    server = Server()
    if kind == "duplicate":
        assert server.receive(encoded()) == ""
    assert server.receive(KINDS[kind](random.Random(1))) != ""
