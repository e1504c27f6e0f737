"""The officer's word that a ledger had a certain head: kept elsewhere, it shows a later cut or rollback."""

from __future__ import annotations

import json
from dataclasses import asdict

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.canonical import canonical_json
from common.errors import VerificationFailed
from common.privacy.journal import Head
from common.privacy.keys import public_key, sign, signature_holds


def signed_checkpoint(site: str, head: Head, officer_key: Ed25519PrivateKey) -> str:
    """One line of JSON: site, head, the officer's public key and signature."""
    body = {"site": site, **asdict(head), "officer": public_key(officer_key)}
    return canonical_json({**body, "signature": sign(officer_key, canonical_json(body))})


def read_checkpoint(text: str, officer_public: str) -> Head:
    """The head that the officer saw. Raises ``VerificationFailed`` unless this officer signed just this."""
    try:
        body = json.loads(text)
        signature = body.pop("signature")
        whole = canonical_json({**body, "signature": signature}) == text
        if not whole or body["officer"] != officer_public:
            raise ValueError("another spelling or key")
        if not signature_holds(officer_public, canonical_json(body), str(signature)):
            raise ValueError("not signed")
        return Head(int(body["seq"]), str(body["hash"]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise VerificationFailed("the checkpoint is damaged, or not signed by this officer") from error
