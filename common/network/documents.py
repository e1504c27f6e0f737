"""The two papers of joining: the request that a hospital sends, and the kit that it gets back.

Both are canonical JSON with a schema number and are read strictly, with every fault at once. Neither holds
a secret, and neither says anything about another member.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.canonical import canonical_json
from common.durable import write_atomic
from common.errors import ArtefactError, VerificationFailed
from common.network.certificates import authority_faults
from common.network.identity import (
    fingerprint_of,
    node_signature_holds,
    public_line,
    read_public_line,
    sign_as_node,
)
from common.privacy.keys import public_key, sign, signature_holds
from common.recipe_rules import SITE_NAME
from common.schema_check import Fault, read_section
from common.strict_json import parse_strictly

SCHEMA = 1
LONGEST = 64 << 10  # bytes of a file
HOST = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
DIGEST = re.compile(r"[0-9a-f]{64}")
_PURPOSE = "wardround join request"
_AGAIN = "ask for the file again"


@dataclass(frozen=True)
class JoinRequest:
    """A hospital's public keys under its own name, signed by both.

    Guarantee: whoever signed holds both private keys, so nobody can hand in another's.
    ``node_key``: OpenSSH's line. ``ledger_key``: 64 hex digits. The signatures are in hex.
    """

    schema: int = 0
    name: str = ""
    node_key: str = ""
    ledger_key: str = ""
    node_signature: str = ""
    ledger_signature: str = ""

    @classmethod
    def make(cls, name: str, node: ec.EllipticCurvePrivateKey, ledger: Ed25519PrivateKey) -> JoinRequest:
        line, public = public_line(node.public_key()), public_key(ledger)
        unsigned = cls(SCHEMA, name, line, public)
        text = unsigned.signed_text
        return cls(SCHEMA, name, line, public, sign_as_node(node, text), sign(ledger, text))

    @property
    def signed_text(self) -> str:
        said = {"name": self.name, "node_key": self.node_key, "ledger_key": self.ledger_key}
        return canonical_json({"purpose": _PURPOSE, "schema": self.schema, **said})

    @property
    def node(self) -> ec.EllipticCurvePublicKey:
        key = read_public_line(self.node_key)
        assert key is not None, "an unread request"
        return key

    @property
    def fingerprint(self) -> str:
        """By which the consortium knows the site. The node's key has signed the ledger's, so one will do."""
        return fingerprint_of(self.node)

    def faults(self) -> Iterator[Fault]:
        if not SITE_NAME.fullmatch(self.name):
            yield Fault("name", f"{self.name!r} cannot name a site", "use lower-case letters, digits and '-'")
        if read_public_line(self.node_key) is None:
            yield Fault("node_key", "is no P-384 key in OpenSSH's line", "make it with: wardround site init")
        if not DIGEST.fullmatch(self.ledger_key):
            yield Fault("ledger_key", "is no public key", "make it with: wardround site init")

    def check_signatures(self) -> None:
        """Raises ``VerificationFailed`` unless both keys signed this very request."""
        wrong = []
        if not node_signature_holds(self.node, self.signed_text, self.node_signature):
            wrong.append("node_signature: is not the node key's")
        if not signature_holds(self.ledger_key, self.signed_text, self.ledger_signature):
            wrong.append("ledger_signature: is not the ledger key's")
        if wrong:
            raise VerificationFailed("the join request was changed, or its keys are not its sender's", wrong)


@dataclass(frozen=True)
class Kit:
    """What a member needs to find the coordinator and to know it, and nothing secret.

    ``consortium``: the fingerprint of the authority's key, which stays when its certificate is renewed.
    ``release``: digest of the code that the consortium runs (`common.code_digest`). ``node``: the
    fingerprint of the key that the kit was made for.
    """

    schema: int = 0
    consortium: str = ""
    host: str = ""
    port: int = 0
    ca_certificate: str = ""
    release: str = ""
    site: str = ""
    node: str = ""

    @property
    def authority(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.ca_certificate.encode())

    @property
    def address(self) -> str:
        return f"{bracketed(self.host)}:{self.port}"

    def faults(self) -> Iterator[Fault]:
        if not is_host(self.host):
            yield Fault("host", f"{self.host!r} is no host name or address", _AGAIN)
        if not 0 < self.port < 1 << 16:
            yield Fault("port", f"{self.port} is no port", _AGAIN)
        for key in ("consortium", "release", "node"):
            if not DIGEST.fullmatch(getattr(self, key)):
                yield Fault(key, "is no digest of 64 hex digits", _AGAIN)
        if not SITE_NAME.fullmatch(self.site):
            yield Fault("site", f"{self.site!r} cannot name a site", _AGAIN)
        for what in authority_faults(self.ca_certificate, self.consortium):
            yield Fault("ca_certificate", what, _AGAIN)


_T = TypeVar("_T", JoinRequest, Kit)


def write_document(path: Path, document: JoinRequest | Kit) -> None:
    """Guarantee: the same document is the same bytes."""
    write_atomic(path, (canonical_json(asdict(document)) + "\n").encode())


def read_request(path: Path) -> JoinRequest:
    """Raises ``ArtefactError`` listing every fault, ``VerificationFailed`` if a signature does not hold."""
    request = _read(path, JoinRequest, "join request")
    request.check_signatures()
    return request


def read_kit(path: Path) -> Kit:
    """Raises ``ArtefactError`` listing every fault."""
    return _read(path, Kit, "kit")


def is_host(text: str) -> bool:
    """Whether ``text`` is a lower-case host name, or an address as `ipaddress` spells it."""
    try:
        return str(ipaddress.ip_address(text)) == text
    except ValueError:
        # Only digits and dots, and no address: a mistyped one.
        return HOST.fullmatch(text) is not None and re.fullmatch(r"[0-9.]+", text) is None


def bracketed(host: str) -> str:
    """``host`` as it stands before a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def _read(path: Path, kind: type[_T], what: str) -> _T:
    plain = _plain(path, what)
    document, faults = read_section(kind, plain)
    assert isinstance(document, kind)
    missing = [item.name for item in fields(kind) if isinstance(plain, dict) and item.name not in plain]
    faults += [Fault(name, "is missing", _AGAIN) for name in missing]
    if document.schema != SCHEMA:
        faults.append(
            Fault("schema", f"{document.schema} is not {SCHEMA}", "use the same release at both ends")
        )
    told = {fault.key for fault in faults}
    faults += [fault for fault in document.faults() if fault.key not in told]
    if faults:
        raise ArtefactError(f"{path} is no {what} that can be used", [str(fault) for fault in faults])
    return document


def _plain(path: Path, what: str) -> Any:
    try:
        with path.open("rb") as file:
            data = file.read(LONGEST + 1)
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read ({error.strerror}): name the {what}'s file") from error
    try:
        if len(data) > LONGEST:
            raise ArtefactError("too long")
        return parse_strictly(data.decode("utf-8"), what)
    except (UnicodeDecodeError, ArtefactError) as error:
        raise ArtefactError(f"{path} is no {what}: not plain JSON, or longer than {LONGEST} bytes") from error
