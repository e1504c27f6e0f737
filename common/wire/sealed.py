"""Sealing: an answer that only the coordinator can read, whoever carries or stores it.

Flower keeps every object of a run where each registered node can fetch it by its digest, and the courier's
code comes with the run. So a site's guard seals what it answers to the X25519 key that the approved plan
names: HPKE in its base mode (RFC 9180: X25519, HKDF-SHA256, ChaCha20-Poly1305), with a fresh ephemeral key
a message. What is bound to it, without travelling again: the order that the answer is to.

It says nothing of who sealed it: anybody can, who has the plan. What goes down to the sites, the global
adapter and the styles of all, is not sealed: every member may read it.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from common import wire
from common.canonical import canonical_json
from common.errors import ArtefactError
from common.plan import Round
from common.privacy.keys import write_secret
from common.strict_json import read_strictly
from common.wire.tensors import CHUNK_BYTES, FLAT

SEALED = "sealed"
HEAD = f"{SEALED}.head"
SCHEMA = 1
KEY_BYTES = 32
_SUITE = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305)


@dataclass(frozen=True)
class _Head:
    schema: int
    bytes: int


def sealed_most(max_bytes: int) -> int:
    """The most bytes that a message of ``max_bytes`` can take when it is sealed: key, tag and framing."""
    return max_bytes + max_bytes // 256 + 4096


def create_sealing_key(path: Path) -> str:
    """A new key in ``path``, which only its owner can read; its public half, 64 hex digits."""
    key = X25519PrivateKey.generate()
    write_secret(path, key.private_bytes_raw().hex().encode())
    return key.public_key().public_bytes_raw().hex()


def read_sealing_key(path: Path) -> X25519PrivateKey:
    """Raises ``ArtefactError`` if ``path`` holds no such key."""
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{path} cannot be read: restore it, or submit the run anew") from error
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ArtefactError(f"{path} is no sealing key: restore it, or submit the run anew")
    return X25519PrivateKey.from_private_bytes(bytes.fromhex(text))


def seal(content: RecordDict, order: Round, coordinator_key: str) -> RecordDict:
    """``content``, for the owner of ``coordinator_key`` (64 hex digits) alone, in answer to ``order``.

    Raises ``ArtefactError`` if that is no key.
    """
    try:
        key = X25519PublicKey.from_public_bytes(bytes.fromhex(coordinator_key))
        box = _SUITE.encrypt(wire.pack_content(content), key, _context(order))
    except ValueError as error:
        raise ArtefactError("the plan's coordinator_key is no X25519 key") from error
    chunks = [box[start : start + CHUNK_BYTES] for start in range(0, len(box), CHUNK_BYTES)]
    arrays = {
        f"uint8.{index}": Array(dtype="uint8", shape=(len(chunk),), stype=FLAT, data=chunk)
        for index, chunk in enumerate(chunks)
    }
    head = canonical_json(asdict(_Head(SCHEMA, len(box))))
    return RecordDict({SEALED: ArrayRecord(arrays), HEAD: ConfigRecord({"json": head})})


def unseal(content: RecordDict, order: Round, key: X25519PrivateKey) -> RecordDict:
    """What was sealed.

    Guarantee: not one bit of it, and nothing of the order, is another than whoever sealed it had.

    Raises ``ArtefactError``: it is not sealed, not to ``key``, or not in answer to ``order``, or changed.
    """
    try:
        plain = _SUITE.decrypt(_box(content), key, _context(order))
        return wire.unpack_content(plain)
    except (InvalidTag, ValueError) as error:
        raise ArtefactError("sealed to another key or for another order, or changed on its way") from error
    except ArtefactError:
        raise
    except Exception as error:  # of protobuf's, for bytes that are no message
        raise ArtefactError("what was sealed is no message") from error


def _context(order: Round) -> bytes:
    """What the sealing binds: HPKE's ``info``."""
    about = {
        "plan_sha256": order.plan_sha256, "stage": str(order.stage), "index": order.index,
        "nonce": order.nonce,
    }  # fmt: skip
    return canonical_json({"wardround sealed answer": about}).encode()


def _box(content: RecordDict) -> bytes:
    arrays, about = content.get(SEALED), content.get(HEAD)
    if not isinstance(arrays, ArrayRecord) or not isinstance(about, ConfigRecord):
        raise ArtefactError("an answer that is not sealed")
    head = read_strictly(about.get("json"), _Head, "seal")
    names = [f"uint8.{index}" for index in range(len(arrays))]
    if head.schema != SCHEMA or -(-head.bytes // CHUNK_BYTES) != len(names) or set(arrays) != set(names):
        raise ArtefactError("a sealed answer is not as its head says")
    box = b"".join(arrays.pop(name).data for name in names)
    if len(box) != head.bytes:
        raise ArtefactError("a sealed answer is not as its head says")
    return box
