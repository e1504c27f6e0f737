"""The wire: what goes in comes out, costs little more than its values, and nothing malformed is believed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord
from hypothesis import given
from hypothesis import strategies as st

from common import wire
from common.adapter import Adapter, AdapterUpdate
from common.backbones import build_backbone
from common.errors import ArtefactError
from common.foundation.catalogue import CATALOGUE
from common.foundation.layouts import encoder_config
from common.guard_api import Metric, PlanAnswer, SiteCounts, SiteMetrics, StudentNote
from common.plan import Round, RunPlan, Stage
from common.precision import pack
from common.privacy.heads import MOST_HEADS, SignedHead
from common.recipe import DecoderTraining, TeacherConfig, WireDtype
from common.style import StyleGroup, StyleSummary
from common.teacher import Teacher
from common.tuning.placement import place
from common.tuning.presets import rank_of
from common.tuning.slots import AdapterSlots, SlotPlan
from common.wire import tensors
from common.wire.sizes import _content_bytes, message_bytes

BASE = "0f" * 32
ORDER = Round("ab" * 32, Stage.adapt, 2, 12.5, "nonce-1")


def adapter_of(layers: int, rank: int, width: int, out: int) -> Adapter:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(layers):
        name = f"encoder.vision_encoder.layers.{layer}.attn.qkv"
        tensors[f"{name}.lora_A"] = torch.randn(rank, width, generator=generator)
        tensors[f"{name}.lora_B"] = torch.randn(out, rank, generator=generator)
    return Adapter(tensors, BASE, rank, "base")


def there_and_back(content: wire.Content) -> wire.Content:
    return wire.unpack_content(wire.pack_content(content))


SMALL = adapter_of(2, 2, 6, 4)


@pytest.mark.parametrize(
    ("adapter", "elements"),
    [(adapter_of(30, 8, 128, 206), 80_160), (adapter_of(8, 8, 128, 262), 24_960)],
    ids=["80k elements in 60 tensors", "25k elements in 16 tensors"],
)
def test_framing_is_at_most_two_percent(adapter: Adapter, elements: int) -> None:
    """bytes_up is elements x 4 and at most 2 %, counted on the whole serialized message."""
    assert adapter.elements == elements
    update = AdapterUpdate(adapter, 12.0, adapter.digest, losses=(0.123456789, 0.0123456789))
    message = answer_to_order(wire.encode_update(ORDER, update))
    size = message_bytes(message)
    assert size == len(wire.pack_message(message))
    assert elements * 4 < size <= 1.02 * elements * 4


@pytest.mark.parametrize(("dtype", "percent"), [("bfloat16", 0.25), ("int8", 0.13)])
def test_an_update_of_sam_vit_b_is_a_quarter_of_a_percent_of_the_teacher(dtype: str, percent: float) -> None:
    """LoRA r = 8 on qkv and proj, as a whole serialized message beside the teacher in float32."""
    entry = CATALOGUE["sam-vit-b"]
    settings = TeacherConfig(adapter="fused", decoder=DecoderTraining.frozen)
    with torch.device("meta"):
        network = Teacher(build_backbone(entry.family, encoder_config(entry.family, entry.config)), classes=1)
        size = 4 * sum(parameter.numel() for parameter in network.parameters())
        places = place(network.encoder, network.decoder, settings)
        slots = AdapterSlots(network, SlotPlan(BASE, "fused", rank_of(settings), places.layers))
    assert len(places.layers) == 24
    step = {name: 1e-3 * torch.randn(tensor.shape) for name, tensor in slots.tensors().items()}
    packed = pack(Adapter(step, BASE, 8, "fused"), WireDtype(dtype))
    message = answer_to_order(wire.encode_update(ORDER, AdapterUpdate(packed, 12.0, packed.digest)))
    assert message_bytes(message) == len(wire.pack_message(message))
    assert 100 * message_bytes(message) / size <= percent


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.sampled_from([1, 60, 127, 128, 20_000]))
def test_a_message_is_as_large_as_it_says(shape: list[int], names: int) -> None:
    tensors = {"a" * min(names, 200): torch.ones(shape), "b": torch.ones(names, dtype=torch.bfloat16)}
    content = wire.encode_request(ORDER, Adapter(tensors, BASE, 1, "base"))
    assert _content_bytes(content) == len(wire.pack_content(content))


def test_a_large_adapter_travels_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "CHUNK_BYTES", 100)
    mixed = replace(SMALL, tensors={**SMALL.tensors, "dense": torch.arange(333).to(torch.bfloat16)})
    content = there_and_back(wire.encode_request(ORDER, mixed))
    sizes = {name: len(array.data) for name, array in content["adapter"].items()}  # type: ignore[union-attr]
    assert sizes == {"bfloat16.0": 100, "bfloat16.1": 100, "bfloat16.2": 100, "bfloat16.3": 100,
                     "bfloat16.4": 100, "bfloat16.5": 100, "bfloat16.6": 66, "float32.0": 100,
                     "float32.1": 60}  # fmt: skip
    assert wire.decode_adapter(content).digest == mixed.digest
    for name in sizes:
        spoilt = there_and_back(wire.encode_request(ORDER, mixed))
        del spoilt["adapter"][name]  # type: ignore[union-attr, arg-type]
        with pytest.raises(ArtefactError):
            wire.decode_adapter(spoilt)


def test_chunks_are_between_one_and_four_megabytes() -> None:
    assert 1 << 20 <= tensors.CHUNK_BYTES <= 4 << 20


def answer_to_order(content: wire.Content) -> wire.Message:
    """``content`` as the reply to a request, as Flower makes it at a site."""
    from simulations.loopback import task_identity

    with task_identity():
        request = wire.request_message(wire.encode_request(ORDER), 17, Stage.adapt, 60.0)
    request.metadata.__dict__["_message_id"] = "f" * 64
    return wire.Message(content, reply_to=request)


def test_an_update_comes_back_exactly() -> None:
    update = AdapterUpdate(SMALL, 3.0, "cd" * 32, "none", (0.5, 0.25))
    nonce, found = wire.decode_update(there_and_back(wire.encode_update(ORDER, update)))
    assert nonce == ORDER.nonce
    assert found.adapter.digest == SMALL.digest
    assert (found.weight, found.started_from, found.mechanism) == (3.0, "cd" * 32, "none")
    assert found.losses == (0.5, 0.25)


def test_a_loss_that_was_not_measured_travels_as_nothing() -> None:
    _, found = wire.decode_update(wire.encode_update(ORDER, AdapterUpdate(SMALL, 3.0, "cd" * 32)))
    assert all(math.isnan(loss) for loss in found.losses)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9_.]{0,12}", fullmatch=True),
        st.tuples(st.lists(st.integers(1, 4), max_size=3), st.sampled_from([torch.float32, torch.bfloat16])),
        min_size=1,
        max_size=6,
    )
)
def test_any_adapter_comes_back_exactly(specs: dict[str, tuple[list[int], torch.dtype]]) -> None:
    tensors = {
        name: torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape).to(dtype) / 3
        for name, (shape, dtype) in specs.items()
    }
    adapter = Adapter(tensors, BASE, 3, "wide")
    found = wire.decode_adapter(there_and_back(wire.encode_request(ORDER, adapter)))
    assert found.digest == adapter.digest
    assert (found.rank, found.preset) == (3, "wide")


def test_nothing_of_a_decoded_adapter_aliases_the_message() -> None:
    content = wire.encode_request(ORDER, SMALL)
    before, data = SMALL.digest, content["adapter"]["float32.0"].data  # type: ignore[index]
    sent = bytes(bytearray(data))
    for tensor in wire.decode_adapter(content).tensors.values():
        tensor.fill_(9.0)
    assert (SMALL.digest, data) == (before, sent)


def test_decoding_takes_the_arrays_out_of_the_message() -> None:
    """Or a large answer would be in memory twice. A refused one is left as it was."""
    content = wire.encode_request(ORDER, SMALL)
    wire.decode_adapter(content)
    assert not content["adapter"]
    spoilt = wire.encode_request(ORDER, SMALL)
    edit_array(spoilt, dtype="float64")
    with pytest.raises(ArtefactError):
        wire.decode_adapter(spoilt)
    assert spoilt["adapter"]


def test_requests_come_back_exactly(smoke_plan: RunPlan) -> None:
    proposal = there_and_back(wire.encode_proposal(ORDER, smoke_plan))
    assert wire.decode_order(proposal) == ORDER
    assert wire.decode_proposal(proposal) == smoke_plan
    style = StyleSummary([StyleGroup(0.5, [0.1, 0.2], [0.0, 0.3])])
    for generator in (None, SMALL):
        request = wire.StudentRequest(SMALL, {"a": style, "b": style}, generator)
        found = wire.decode_student_request(there_and_back(wire.encode_student_request(ORDER, request)))
        assert found.styles == request.styles
        assert found.adapter.digest == SMALL.digest
        assert (found.generator is None) == (generator is None)
        assert found.generator is None or found.generator.digest == SMALL.digest


def test_replies_come_back_exactly() -> None:
    answer = PlanAnswer("site-1", True, "ab" * 32, preset="lite", rank=4)
    assert wire.decode_answer(there_and_back(wire.encode_answer(answer))) == answer
    note = StudentNote("a", "unet-xs", 10, "ab", 1.0, 2.0, 3, 2, 1)
    assert wire.decode_note(there_and_back(wire.encode_numbers(note))) == note
    cells = [
        Metric("student", "dice", "x", 0.5, (0.25, 0.75), 9),
        Metric("student", "hd95", "x", None, None, 1, "few"),
    ]
    metrics = SiteMetrics("a", SiteCounts(1, 2, 3, 4, 5), cells)
    assert wire.decode_metrics(there_and_back(wire.encode_numbers(metrics))) == metrics
    style = StyleSummary([StyleGroup(0.5, [0.1], [0.2])])
    assert wire.decode_style(there_and_back(wire.encode_numbers(style))) == style


def test_a_refusal_carries_a_code_and_a_field_and_nothing_else() -> None:
    content = there_and_back(wire.encode_refusal("REFUSED_POLICY", "allow_style"))
    assert wire.decode_refusal(content) == wire.Refusal("REFUSED_POLICY", "allow_style")
    assert list(content) == ["refused"]
    strange = wire.encode_refusal("/data/patient 17 is missing", "Miller, J.")
    assert wire.decode_refusal(strange) == wire.Refusal("SITE_FAILED", "")
    assert wire.decode_refusal(wire.encode_request(ORDER)) is None


# ---- malformed ----------------------------------------------------------------------------------


def edit_layout(content: wire.Content, edit: Callable[[dict[str, list[int]]], object]) -> None:
    head = content["adapter.head"]
    assert isinstance(head, ConfigRecord)
    layout = json.loads(str(head["layout"]))
    edit(layout["float32"])
    head["layout"] = json.dumps(layout)


def edit_array(content: wire.Content, **changes: object) -> None:
    array = content["adapter"]["float32.0"]  # type: ignore[index]
    parts = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data}
    content["adapter"] = ArrayRecord({"float32.0": Array(**(parts | changes))})  # type: ignore[arg-type]


FIRST = "encoder.vision_encoder.layers.0.attn.qkv.lora_A"
MALFORMED: dict[str, Callable[[wire.Content], object]] = {
    "no arrays": lambda c: c.pop("adapter"),
    "no head": lambda c: c.pop("adapter.head"),
    "head is an array": lambda c: c.__setitem__("adapter.head", ArrayRecord()),
    "no layout": lambda c: c["adapter.head"].pop("layout"),
    "layout is a number": lambda c: c["adapter.head"].__setitem__("layout", 3),
    "layout is no JSON": lambda c: c["adapter.head"].__setitem__("layout", "{"),
    "layout is a list": lambda c: c["adapter.head"].__setitem__("layout", "[]"),
    "layout is deep": lambda c: c["adapter.head"].__setitem__("layout", "[" * 100_000),
    "layout is huge": lambda c: c["adapter.head"].__setitem__("layout", " " * (5 << 20)),
    "a repeated name": lambda c: c["adapter.head"].__setitem__("layout", '{"float32":{"a":[1],"a":[55]}}'),
    "another dtype": lambda c: c["adapter.head"].__setitem__("layout", '{"float64":{"a":[56]}}'),
    "no digest": lambda c: c["adapter.head"].__setitem__("base", "/etc/passwd"),
    "no rank": lambda c: c["adapter.head"].__setitem__("rank", -1),
    "a rank of text": lambda c: c["adapter.head"].__setitem__("rank", "2"),
    "no preset": lambda c: c["adapter.head"].pop("preset"),
    "a preset with a path": lambda c: c["adapter.head"].__setitem__("preset", "../lite"),
    "an array too many": lambda c: c["adapter"].__setitem__("float32.1", c["adapter"]["float32.0"]),
    "a longer layout": lambda c: edit_layout(c, lambda shapes: shapes.__setitem__(FIRST, [3, 6])),
    "a shorter layout": lambda c: edit_layout(c, lambda shapes: shapes.pop(FIRST)),
    "an absurd shape": lambda c: edit_layout(c, lambda shapes: shapes.__setitem__(FIRST, [2**30] * 8)),
    "a negative shape": lambda c: edit_layout(c, lambda shapes: shapes.__setitem__(FIRST, [-2, -6])),
    "an empty side": lambda c: edit_layout(c, lambda shapes: shapes.__setitem__("x", [0])),
    "a shape of text": lambda c: edit_layout(c, lambda shapes: shapes.__setitem__(FIRST, "12")),
    "a shape of booleans": lambda c: edit_layout(c, lambda shapes: shapes.__setitem__("x", [True])),
    "many dimensions": lambda c: edit_layout(c, lambda shapes: shapes.__setitem__(FIRST, [1] * 9 + [12])),
    "a strange name": lambda c: edit_layout(c, lambda s: s.__setitem__("/x y", s.pop(FIRST))),
    "many tensors": lambda c: edit_layout(c, lambda s: s.update({f"t{n}": [1] for n in range(5000)})),
    "a pickle": lambda c: edit_array(c, stype="numpy.ndarray"),
    "a lying dtype": lambda c: edit_array(c, dtype="float64"),
    "a lying shape": lambda c: edit_array(c, shape=(7, 8)),
    "missing bytes": lambda c: edit_array(c, data=b"\0" * 223),
    "bytes too many": lambda c: edit_array(c, data=b"\0" * 228),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_adapter_is_refused(fault: str) -> None:
    content = wire.encode_request(ORDER, SMALL)
    MALFORMED[fault](content)
    with pytest.raises(ArtefactError):
        wire.decode_adapter(content)


def test_a_malformed_adapter_is_refused_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_unflatten", lambda *_: pytest.fail("memory was to be taken"))
    for fault in MALFORMED:
        content = wire.encode_request(ORDER, SMALL)
        MALFORMED[fault](content)
        with pytest.raises(ArtefactError):
            wire.decode_adapter(content)


def update_body(**changes: object) -> wire.Content:
    content = wire.encode_update(ORDER, AdapterUpdate(SMALL, 3.0, "cd" * 32, losses=(1.0, 0.5)))
    body = json.loads(str(content["body"]["json"]))  # type: ignore[index]
    body = {key: value for key, value in (body | changes).items() if value is not ...}
    content["body"] = ConfigRecord({"json": json.dumps(body)})
    return content


@pytest.mark.parametrize(
    "changes",
    [
        {"weight": "3"}, {"weight": True}, {"weight": float("nan")}, {"weight": float("inf")},
        {"weight": ...}, {"losses": [1.0]}, {"losses": None}, {"losses": ["1", "2"]}, {"nonce": 7},
        {"started_from": None},
        {"mechanism": "has a space"}, {"mechanism": "x" * 300}, {"patient": "17"},
    ],
)  # fmt: skip
def test_malformed_numbers_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ArtefactError):
        wire.decode_update(update_body(**changes))


@pytest.mark.parametrize("text", ["", "[]", "7", '{"site":"a","site":"b"}', "[" * 100_000, '{"x": NaN}'])
def test_malformed_json_is_refused(text: str) -> None:
    content = wire.Content({"body": ConfigRecord({"json": text})})
    for decode in (wire.decode_answer, wire.decode_note, wire.decode_metrics, wire.decode_style):
        with pytest.raises(ArtefactError):
            decode(content)


def test_a_notice_has_a_limit() -> None:
    order = replace(ORDER, notice="n" * wire.MAX_NOTICE)
    assert wire.decode_order(wire.encode_request(order)) == order
    with pytest.raises(ArtefactError, match="notice"):
        wire.decode_order(wire.encode_request(replace(ORDER, notice=order.notice + "n")))


HEADED = SignedHead("east", 3, "a" * 64, "b" * 64, "c" * 128)


def test_ledger_heads_go_along_in_orders_and_in_every_answer() -> None:
    order = replace(ORDER, heads=[HEADED, replace(HEADED, site="west")])
    assert wire.decode_order(there_and_back(wire.encode_request(order))) == order
    update = AdapterUpdate(SMALL, 3.0, "cd" * 32, ledger_head=HEADED)
    assert wire.decode_update(there_and_back(wire.encode_update(ORDER, update)))[1].ledger_head == HEADED
    answer = PlanAnswer("east", True, "ab" * 32, preset="lite", rank=4, ledger_head=HEADED)
    assert wire.decode_answer(there_and_back(wire.encode_answer(answer))) == answer
    metrics = SiteMetrics("east", SiteCounts(1, 1, 1, 0, 0), ledger_head=HEADED)
    assert wire.decode_metrics(there_and_back(wire.encode_numbers(metrics))) == metrics


def test_without_a_ledger_head_a_message_says_nothing_of_one() -> None:
    update = AdapterUpdate(SMALL, 3.0, "cd" * 32)
    answer = PlanAnswer("east", True, "ab" * 32, preset="lite", rank=4)
    for content in (
        wire.encode_request(ORDER), wire.encode_update(ORDER, update), wire.encode_answer(answer),
        wire.encode_numbers(SiteMetrics("east", SiteCounts(1, 1, 1, 0, 0))),
    ):  # fmt: skip
        packed = wire.pack_content(content)
        assert b"ledger_head" not in packed
        assert b'"heads"' not in packed


def test_an_order_names_no_more_heads_than_a_site_can_check() -> None:
    order = replace(ORDER, heads=[HEADED] * (MOST_HEADS + 1))
    with pytest.raises(ArtefactError, match="ledger heads"):
        wire.decode_order(wire.encode_request(order))


def test_a_head_of_another_form_is_refused() -> None:
    content = wire.encode_request(replace(ORDER, heads=[replace(HEADED, seq=True)]))
    with pytest.raises(ArtefactError, match="wrong type"):
        wire.decode_order(content)


def test_a_refused_message_is_not_repeated_in_the_reason() -> None:
    content = update_body(patient_0017="Miller")
    edit_layout(content, lambda shapes: shapes.__setitem__("patient_0018", [1]))
    for decode in (wire.decode_update, wire.decode_adapter):
        with pytest.raises(ArtefactError) as caught:
            decode(content)
        assert "patient" not in str(caught.value)


def test_what_is_not_finite_is_not_sent() -> None:
    with pytest.raises(ArtefactError, match="not finite"):
        wire.encode_update(ORDER, AdapterUpdate(SMALL, math.inf, "cd" * 32))


def test_a_dtype_that_the_wire_does_not_carry_is_named() -> None:
    wide = replace(SMALL, tensors={"x": torch.zeros(2, dtype=torch.float64)})
    with pytest.raises(ArtefactError, match=r"x is torch\.float64"):
        wire.encode_request(ORDER, wide)


def test_a_strange_site_name_is_refused() -> None:
    for name in ("../a", "a b", "", "x" * 300):
        with pytest.raises(ArtefactError):
            wire.decode_answer(wire.encode_answer(PlanAnswer(name, True, "ab", preset="lite", rank=4)))


def test_a_site_that_agrees_says_what_it_trains() -> None:
    for preset in ("", "a b", "x" * 300):
        with pytest.raises(ArtefactError, match="train"):
            wire.decode_answer(wire.encode_answer(PlanAnswer("a", True, "ab", preset=preset, rank=4)))


def test_an_adapter_without_factors_has_rank_0() -> None:
    dense = Adapter({"encoder.norm.bias": torch.ones(3)}, BASE, 0, "norm")
    found = wire.decode_adapter(there_and_back(wire.encode_request(ORDER, dense)))
    assert (found.digest, found.rank) == (dense.digest, 0)
