"""Who is at the other end: the key of a hospital's node, and the fingerprint by which it is known.

A name can be taken twice and a node id changes with the coordinator's database; a key cannot be had without
its private half. Flower 1.41 signs a node's requests with an elliptic-curve key of NIST's; ours is P-384.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from common.errors import ArtefactError
from common.privacy.keys import write_secret

CURVE = ec.SECP384R1
HEX_DIGITS = 64
_GROUP = 8
_ECDSA = ec.ECDSA(hashes.SHA384())


def fingerprint_of(key: PublicKeyTypes) -> str:
    """SHA-256 (64 hex digits) of a public key, as X.509 writes it down."""
    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


def fingerprint_of_pem(pem: bytes) -> str:
    """`fingerprint_of` the public key in ``pem``, as Flower shows it; "" for what is no key."""
    try:
        return fingerprint_of(serialization.load_pem_public_key(pem))
    except (ValueError, UnsupportedAlgorithm):
        return ""


def spoken(fingerprint: str) -> str:
    """A fingerprint in groups of eight digits, to be read aloud."""
    return " ".join(fingerprint[start : start + _GROUP] for start in range(0, len(fingerprint), _GROUP))


def plain_fingerprint(text: str) -> str:
    """A fingerprint as somebody typed it: its 64 digits, or "" if it has not that many."""
    digits = re.sub(r"[\s:-]", "", text).lower()
    return digits if re.fullmatch(rf"[0-9a-f]{{{HEX_DIGITS}}}", digits) else ""


def create_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A new node key in ``path``, which only its owner can read. Raises ``ArtefactError`` if one is there."""
    if path.exists():
        raise ArtefactError(f"{path} exists: a key is never replaced, move it away first")
    key = ec.generate_private_key(CURVE())
    text = key.private_bytes(  # Flower reads no other format
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    write_secret(path, text)
    return key


def read_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Raises ``ArtefactError`` if ``path`` holds no P-384 key in OpenSSH's format without a passphrase."""
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read ({error.strerror}): run wardround site init") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ArtefactError(
            f"{path} is no OpenSSH key without a passphrase: run wardround site init"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, CURVE):
        raise ArtefactError(f"{path} is no P-384 key: move it away and run wardround site init")
    return key


def public_line(key: ec.EllipticCurvePublicKey) -> str:
    """A node's public key in OpenSSH's one line, without a comment."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def read_public_line(line: str) -> ec.EllipticCurvePublicKey | None:
    """The P-384 key that ``line`` spells as `public_line` does, or None."""
    try:
        key = serialization.load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm):
        return None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, CURVE):
        return None
    return key if public_line(key) == line else None


def public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """The same key as Flower keeps it."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def sign_as_node(key: ec.EllipticCurvePrivateKey, text: str) -> str:
    """ECDSA with SHA-384 over ``text``, in hex."""
    return key.sign(text.encode(), _ECDSA).hex()


def node_signature_holds(key: ec.EllipticCurvePublicKey, text: str, signature: str) -> bool:
    if not re.fullmatch(r"(?:[0-9a-f]{2}){1,110}", signature):
        return False
    try:
        key.verify(bytes.fromhex(signature), text.encode(), _ECDSA)
    except InvalidSignature:
        return False
    return True
