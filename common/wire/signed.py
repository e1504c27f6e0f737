"""A reply signed by the site whose guard gave it, so that nobody on its way can change it or give another.

The courier, the SuperNode and the SuperLink pass a reply on; none of them has the site's key. What is signed
names the order that the reply answers, so that it answers no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from common.canonical import canonical_json
from common.errors import ArtefactError
from common.plan import Round
from common.privacy.keys import sign, signature_holds
from common.wire.tensors import NAME

SIGNATURE = "signature"  # the record's key; it is no part of what is signed


def sign_reply(content: RecordDict, site: str, order: Round, key: Ed25519PrivateKey) -> RecordDict:
    """``content`` with a record that says: ``site`` gave exactly this in answer to ``order``.

    Raises ``ArtefactError`` for a record of a kind that no reply has.
    """
    record = {"site": site, "signature": sign(key, _statement(content, site, order))}
    content[SIGNATURE] = ConfigRecord(record)
    return content


def claimed_site(content: RecordDict) -> str:
    """The site that says it signed ``content``. Raises ``ArtefactError`` if none says so."""
    site, _ = _record(content)
    return site


def signer_of(content: RecordDict, order: Round, keys: Mapping[str, str]) -> str:
    """The site that signed ``content`` in answer to ``order``.

    Args:
        keys: site -> its public key, 64 hex digits.

    Guarantee: not one bit of the content, of the order's nonce, stage, index or plan, or of the site's name
    is another than the owner of that site's key signed.

    Raises ``ArtefactError``: nobody signed it, none of ``keys`` is that site's, or the signature is not its.
    """
    site, signature = _record(content)
    if site not in keys:
        raise ArtefactError("a reply signed by a site whose key is not known here")
    if not signature_holds(keys[site], _statement(content, site, order), signature):
        raise ArtefactError(
            "a reply that its site did not sign, or that was changed or answers another order"
        )
    return site


def _record(content: RecordDict) -> tuple[str, str]:
    record = content.get(SIGNATURE)
    entries = dict(record) if isinstance(record, ConfigRecord) else {}
    site, signature = entries.get("site"), entries.get("signature")
    if set(entries) != {"site", "signature"} or not isinstance(site, str) or not isinstance(signature, str):
        raise ArtefactError("a reply that nobody signed")
    if not NAME.fullmatch(site):
        raise ArtefactError("a reply is signed in the name of no site")
    return site, signature


def _statement(content: RecordDict, site: str, order: Round) -> str:
    """What is signed: no entry and no head of a ledger, which the same key signs, has such a text."""
    said = {
        "site": site, "nonce": order.nonce, "plan_sha256": order.plan_sha256, "stage": str(order.stage),
        "index": order.index, "content_sha256": content_sha256(content),
    }  # fmt: skip
    return canonical_json({"reply": said})


def content_sha256(content: RecordDict) -> str:
    """SHA-256 (hex) of every record but the signature, whatever their order; each part with its length."""
    digest = hashlib.sha256()
    for key in sorted(set(content) - {SIGNATURE}):
        for part in (key.encode(), *_parts(content[key])):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
    return digest.hexdigest()


def _parts(record: object) -> Iterable[bytes]:
    if isinstance(record, ArrayRecord):
        yield from (b"arrays", str(len(record)).encode())
        for name in sorted(record):
            array = record[name]
            yield from (
                name.encode(), array.dtype.encode(), canonical_json(list(array.shape)).encode(),
                array.stype.encode(), array.data,
            )  # fmt: skip
    elif isinstance(record, ConfigRecord):
        try:
            yield from (b"config", canonical_json(dict(record)).encode())
        except (TypeError, ValueError) as error:  # bytes, or a number that is not finite
            raise ArtefactError("a reply holds a value that no reply has") from error
    else:
        raise ArtefactError("a reply holds a record of a kind that no reply has")
