"""Sealing: what only the coordinator reads, and only in answer to the order that it gave."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from common import wire
from common.adapter import Adapter, AdapterUpdate
from common.errors import ArtefactError
from common.plan import Round, Stage
from common.wire import sealed
from common.wire.sealed import create_sealing_key, read_sealing_key, seal, sealed_most, unseal
from common.wire.sizes import is_larger
from common.wire.tensors import FLAT

KEY = X25519PrivateKey.generate()
PUBLIC = KEY.public_key().public_bytes_raw().hex()
ORDER = Round("ab" * 32, Stage.adapt, 1, 60.0, "nonce-1")
PLANTED = "weights-of-another-hospital"


def update() -> AdapterUpdate:
    tensors = {"layer.lora_B": torch.arange(12.0).reshape(4, 3), "head": torch.ones(2)}
    return AdapterUpdate(Adapter(tensors, "ab" * 32, 3, "base"), 4.0, "cd" * 32, mechanism=PLANTED)


def said() -> RecordDict:
    return wire.encode_update(ORDER, update())


def test_what_is_sealed_comes_out_as_it_went_in() -> None:
    nonce, found = wire.decode_update(unseal(seal(said(), ORDER, PUBLIC), ORDER, KEY))
    assert nonce == ORDER.nonce
    assert (found.adapter.digest, found.weight) == (update().adapter.digest, 4.0)


@given(st.binary(max_size=900), st.integers(49, 300))
def test_any_length_comes_out_whole_whatever_the_chunks(data: bytes, chunk: int) -> None:
    content = RecordDict({"body": ConfigRecord({"bytes": data})})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sealed, "CHUNK_BYTES", chunk)
        box = seal(content, ORDER, PUBLIC)
        assert all(len(array.data) <= chunk for array in box[sealed.SEALED].values())
        assert unseal(box, ORDER, KEY) == content


def test_nothing_of_what_is_sealed_can_be_read_on_its_way() -> None:
    assert PLANTED.encode() in wire.pack_content(said())
    box = seal(said(), ORDER, PUBLIC)
    assert set(box) == {sealed.SEALED, sealed.HEAD}
    assert PLANTED.encode() not in wire.pack_content(box)
    assert wire.pack_content(box) != wire.pack_content(seal(said(), ORDER, PUBLIC))  # a key a message


def _flip(position: int) -> Callable[[RecordDict], None]:
    def change(box: RecordDict) -> None:
        array = box[sealed.SEALED]["uint8.0"]
        data = bytearray(array.data)
        data[position] ^= 1
        box[sealed.SEALED]["uint8.0"] = Array(array.dtype, array.shape, FLAT, bytes(data))

    return change


def _cut(box: RecordDict) -> None:
    data = box[sealed.SEALED]["uint8.0"].data[:-1]
    box[sealed.SEALED]["uint8.0"] = Array("uint8", (len(data),), FLAT, data)
    box[sealed.HEAD]["json"] = f'{{"bytes":{len(data)},"schema":1}}'


def _wrong_head(box: RecordDict) -> None:
    box[sealed.HEAD]["json"] = '{"bytes":7,"schema":1}'


def _later_schema(box: RecordDict) -> None:
    box[sealed.HEAD]["json"] = box[sealed.HEAD]["json"].replace('"schema":1', '"schema":2')


def _second_array(box: RecordDict) -> None:
    box[sealed.SEALED]["uint8.1"] = Array("uint8", (1,), FLAT, b"x")


def _huge(box: RecordDict) -> None:
    box[sealed.HEAD]["json"] = f'{{"bytes":{1 << 60},"schema":1}}'


def _no_head(box: RecordDict) -> None:
    del box[sealed.HEAD]


def _numbers(box: RecordDict) -> None:
    box[sealed.SEALED] = ConfigRecord({"a": 1})


@pytest.mark.parametrize(
    "change",
    [
        *map(_flip, (0, 31, 32, 100, -1)),
        _cut, _wrong_head, _later_schema, _second_array, _huge, _no_head, _numbers,
    ],
)  # fmt: skip
def test_a_changed_box_is_rejected(change: Callable[[RecordDict], None]) -> None:
    box = seal(said(), ORDER, PUBLIC)
    change(box)
    with pytest.raises(ArtefactError):
        unseal(box, ORDER, KEY)


@pytest.mark.parametrize(
    "other",
    [
        replace(ORDER, nonce="nonce-2"),
        replace(ORDER, stage=Stage.generator),
        replace(ORDER, index=2),
        replace(ORDER, plan_sha256="cd" * 32),
    ],
)
def test_an_answer_to_another_order_is_rejected(other: Round) -> None:
    with pytest.raises(ArtefactError, match="another order"):
        unseal(seal(said(), ORDER, PUBLIC), other, KEY)


def test_another_key_opens_nothing() -> None:
    with pytest.raises(ArtefactError, match="another key"):
        unseal(seal(said(), ORDER, PUBLIC), ORDER, X25519PrivateKey.generate())


def test_what_is_not_sealed_is_rejected() -> None:
    with pytest.raises(ArtefactError, match="not sealed"):
        unseal(said(), ORDER, KEY)


def test_a_box_of_something_that_is_no_message_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "pack_content", lambda _: b"\xff\xff no protobuf")
    box = seal(said(), ORDER, PUBLIC)
    with pytest.raises(ArtefactError, match="no message"):
        unseal(box, ORDER, KEY)


@pytest.mark.parametrize("key", ["", "zz" * 32, "ab" * 31, "00" * 32])
def test_a_plan_with_a_malformed_key_gets_no_answer(key: str) -> None:
    with pytest.raises(ArtefactError, match="coordinator_key"):
        seal(said(), ORDER, key)


@pytest.mark.parametrize("size", [0, 1000, 5 << 20])
def test_a_sealed_message_is_at_most_as_large_as_its_allowance(size: int) -> None:
    content = RecordDict({"a": ArrayRecord({"x": Array("uint8", (size,), FLAT, bytes(size))})})
    assert not is_larger(seal(content, ORDER, PUBLIC), sealed_most(size))


def test_a_key_is_its_owners_alone_and_comes_back(tmp_path: Path) -> None:
    public = create_sealing_key(tmp_path / "sealing.key")
    assert (tmp_path / "sealing.key").stat().st_mode & 0o077 == 0
    assert read_sealing_key(tmp_path / "sealing.key").public_key().public_bytes_raw().hex() == public
    (tmp_path / "sealing.key").write_text("no key")
    for name in ("sealing.key", "missing.key"):
        with pytest.raises(ArtefactError, match="submit the run anew"):
            read_sealing_key(tmp_path / name)


# ---- an oracle: RFC 9180 read once more, in plain steps -----------------------------------------


def _extract(salt: bytes, data: bytes) -> bytes:
    return hmac.new(salt or bytes(32), data, hashlib.sha256).digest()


def _expand(key: bytes, info: bytes, length: int) -> bytes:
    return hmac.new(key, info + b"\x01", hashlib.sha256).digest()[:length]


def _labelled_extract(suite: bytes, salt: bytes, label: bytes, data: bytes) -> bytes:
    return _extract(salt, b"HPKE-v1" + suite + label + data)


def _labelled_expand(suite: bytes, key: bytes, label: bytes, info: bytes, length: int) -> bytes:
    return _expand(key, length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info, length)


def test_the_box_is_hpke_of_rfc_9180() -> None:
    box = seal(said(), ORDER, PUBLIC)[sealed.SEALED]["uint8.0"].data
    enc, ciphertext = box[:32], box[32:]
    kem, suite = b"KEM\x00\x20", b"HPKE\x00\x20\x00\x01\x00\x03"
    shared = KEY.exchange(X25519PublicKey.from_public_bytes(enc))
    secret = _labelled_extract(kem, b"", b"eae_prk", shared)
    secret = _labelled_expand(kem, secret, b"shared_secret", enc + bytes.fromhex(PUBLIC), 32)
    psk, info = _labelled_extract(suite, b"", b"psk_id_hash", b""), sealed._context(ORDER)
    context = b"\x00" + psk + _labelled_extract(suite, b"", b"info_hash", info)
    secret = _labelled_extract(suite, secret, b"secret", b"")
    key = _labelled_expand(suite, secret, b"key", context, 32)
    nonce = _labelled_expand(suite, secret, b"base_nonce", context, 12)
    plain = ChaCha20Poly1305(key).decrypt(nonce, ciphertext, b"")
    assert wire.decode_update(wire.unpack_content(plain))[1].mechanism == PLANTED
