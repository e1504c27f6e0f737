"""A reply that its site signed: whatever is changed in it, or in what it answers, is seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common import wire
from common.adapter import Adapter, AdapterUpdate
from common.errors import ArtefactError
from common.plan import Round, Stage
from common.privacy.keys import PATIENT_KEY, SIGNING_KEY, SiteKeys, create_key, public_key
from common.privacy.ledger import Caps, Ledger
from common.wire.signed import SIGNATURE, claimed_site, content_sha256, sign_reply, signer_of

ORDER = Round("ab" * 32, Stage.adapt, 2, 60.0, "nonce-1")
KEYS = {site: Ed25519PrivateKey.generate() for site in ("east", "west")}
PUBLIC = {site: public_key(key) for site, key in KEYS.items()}


def update() -> RecordDict:
    tensors = {"layer.A": torch.arange(6.0).reshape(2, 3), "layer.B": torch.ones(3, 2)}
    adapter = Adapter(tensors, "cd" * 32, 2, "attention")
    return wire.encode_update(ORDER, AdapterUpdate(adapter, 3.0, "ef" * 32, losses=(1.0, 0.5)))


def signed() -> RecordDict:
    return sign_reply(update(), "east", ORDER, KEYS["east"])


def test_a_signed_reply_names_its_site_after_the_network_too() -> None:
    received = wire.unpack_content(wire.pack_content(signed()))
    assert claimed_site(received) == "east"
    assert signer_of(received, ORDER, PUBLIC) == "east"
    nonce, _ = wire.decode_update(received)  # what is signed is still the update
    assert nonce == ORDER.nonce


def test_the_order_of_records_does_not_matter() -> None:
    content = signed()
    turned = RecordDict(dict(reversed(list(content.items()))))
    assert signer_of(turned, ORDER, PUBLIC) == "east"


def one_bit(content: RecordDict) -> None:
    record = content["adapter"]
    assert isinstance(record, ArrayRecord)
    array = record["float32.0"]
    data = bytearray(array.data)
    data[5] ^= 1
    record["float32.0"] = Array(array.dtype, array.shape, array.stype, bytes(data))


def another_shape(content: RecordDict) -> None:
    record = content["adapter"]
    assert isinstance(record, ArrayRecord)
    array = record["float32.0"]
    record["float32.0"] = Array(array.dtype, (3, 4), array.stype, array.data)


def another_head(content: RecordDict) -> None:
    head = content["adapter.head"]
    assert isinstance(head, ConfigRecord)
    head["rank"] = 3


def another_weight(content: RecordDict) -> None:
    body = content["body"]
    assert isinstance(body, ConfigRecord)
    body["json"] = str(body["json"]).replace("3.0", "9.0")


def more(content: RecordDict) -> None:
    content["more"] = ConfigRecord({"x": 1})


def less(content: RecordDict) -> None:
    del content["adapter"]


def in_another_name(content: RecordDict) -> None:
    record = content[SIGNATURE]
    assert isinstance(record, ConfigRecord)
    record["site"] = "west"


def a_refusal_instead(content: RecordDict) -> None:
    for key in set(content) - {SIGNATURE}:
        del content[key]
    content["refused"] = ConfigRecord({"code": "REFUSED_BUDGET", "field": ""})


CHANGES = [
    one_bit, another_shape, another_head, another_weight, more, less, in_another_name, a_refusal_instead
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_not_one_bit_may_change_on_the_way(change: Callable[[RecordDict], None]) -> None:
    content = signed()
    change(content)
    with pytest.raises(ArtefactError, match="did not sign"):
        signer_of(content, ORDER, PUBLIC)


@pytest.mark.parametrize(
    "other",
    [
        {"nonce": "nonce-2"},
        {"index": 3},
        {"stage": Stage.generator},
        {"plan_sha256": "ac" * 32},
    ],
)
def test_a_reply_answers_one_order_and_no_other(other: dict[str, object]) -> None:
    with pytest.raises(ArtefactError, match="another order"):
        signer_of(signed(), replace(ORDER, **other), PUBLIC)  # type: ignore[arg-type]


def test_another_sites_key_signs_nothing_for_this_one() -> None:
    forged = sign_reply(update(), "east", ORDER, KEYS["west"])
    with pytest.raises(ArtefactError, match="did not sign"):
        signer_of(forged, ORDER, PUBLIC)
    with pytest.raises(ArtefactError, match="not known"):
        signer_of(signed(), ORDER, {"west": PUBLIC["west"]})


@pytest.mark.parametrize(
    "record",
    [
        None,
        ConfigRecord({}),
        ConfigRecord({"site": "east"}),
        ConfigRecord({"site": "east", "signature": 1}),
        ConfigRecord({"site": "east", "signature": "00", "more": "x"}),
        ConfigRecord({"site": "../east", "signature": "00"}),
        MetricRecord({"site": 1}),
    ],
)
def test_what_is_no_signature_is_nobodys_word(record: ConfigRecord | MetricRecord | None) -> None:
    content = update()
    if record is not None:
        content[SIGNATURE] = record
    with pytest.raises(ArtefactError):
        signer_of(content, ORDER, PUBLIC)


def test_a_record_that_no_reply_has_is_not_signed() -> None:
    for record in (
        MetricRecord({"dice": 0.5}),
        ConfigRecord({"raw": b"x"}),
        ConfigRecord({"x": float("nan")}),
    ):
        with pytest.raises(ArtefactError):
            content_sha256(RecordDict({"body": record}))


def test_a_site_without_keys_gets_its_own_and_its_ledger_takes_them(tmp_path: Path) -> None:
    first = SiteKeys.open_or_create(tmp_path)
    assert SiteKeys.open_or_create(tmp_path).public == first.public
    Ledger.create(tmp_path, "east", Caps(1e-5))
    assert Ledger.open(tmp_path, Caps(1e-5)).entries[0].detail["public_key"] == first.public


@pytest.mark.parametrize("lost", [SIGNING_KEY, PATIENT_KEY])
def test_of_one_lost_key_nothing_is_made_up(tmp_path: Path, lost: str) -> None:
    SiteKeys.open_or_create(tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(ArtefactError):
        SiteKeys.open_or_create(tmp_path)
    assert not (tmp_path / lost).exists()


def test_a_lone_signing_key_is_no_set_of_keys(tmp_path: Path) -> None:
    create_key(tmp_path / SIGNING_KEY)
    with pytest.raises(ArtefactError, match="backup"):
        SiteKeys.open_or_create(tmp_path)
