"""A ledger's head, signed by the site: what a witness keeps, and can show to an auditor.

A chain alone does not tell that its last entries are gone, or that the whole of it was put back to an older
state together with its head file. Whoever has a later signed head can: the site itself wrote that it had
that entry. A head proves itself, so it does not matter through whose hands it came.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.canonical import canonical_json
from common.privacy.keys import public_key, sign, signature_holds

MOST_HEADS = 4096  # in one order
HEAD = "ledger_head"  # its name beside other numbers
HEAD_NUMBERS = ("site", "seq", "hash", "public_key", "signature")
HEAD_BYTES = 600  # of a head as it travels, at most: a site's name has 63 letters
_SITE = re.compile(r"[A-Za-z0-9_.\-]{1,200}")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class SignedHead:
    """The newest entry of ``site``'s ledger at some time.

    Attributes:
        seq, hash: of the entry, `common.privacy.entries.Entry`.
        public_key: the ledger's, 64 hex digits.
        signature: Ed25519, 128 hex digits, over `text`.
    """

    site: str
    seq: int
    hash: str
    public_key: str
    signature: str

    @classmethod
    def sign(cls, site: str, entry: tuple[int, str], signer: Ed25519PrivateKey) -> SignedHead:
        """``entry``: seq and hash."""
        bare = cls(site, *entry, public_key(signer), "")
        return cls(site, *entry, bare.public_key, sign(signer, bare.text()))

    def text(self) -> str:
        """What is signed; no entry of a ledger has such a text."""
        body = asdict(self)
        del body["signature"]
        return canonical_json({"ledger_head": body})

    @property
    def holds(self) -> bool:
        """Whether the owner of `public_key` signed just this, and it may be a head at all."""
        plain = _SITE.fullmatch(self.site) and _HASH.fullmatch(self.hash) and self.seq >= 0
        return bool(plain) and signature_holds(self.public_key, self.text(), self.signature)

    def before(self, other: SignedHead) -> bool:
        """Whether this contradicts ``other``, of the same key, as what came later: less, or another entry."""
        return self.seq < other.seq or (self.seq == other.seq and self.hash != other.hash)


def without_empty_head(numbers: dict[str, Any]) -> dict[str, Any]:
    """``numbers`` as they travel: where no ledger is, none is named, and the message stays as it was."""
    if numbers.get(HEAD, "") is not None:
        return numbers
    return {name: value for name, value in numbers.items() if name != HEAD}


def newest(heads: Iterable[SignedHead]) -> list[SignedHead]:
    """Of each site and key the highest, sorted."""
    found: dict[tuple[str, str], SignedHead] = {}
    for head in heads:
        known = found.get((head.site, head.public_key))
        if known is None or known.seq < head.seq:
            found[head.site, head.public_key] = head
    return [found[key] for key in sorted(found)]
