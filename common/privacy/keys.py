"""Ed25519 keys: the guard's, which signs the ledger, and the officer's, which signs policies and checkpoints.

A public key is written as 64 hex digits, its id as the first 16 of their SHA-256. Private keys are PEM files
that only their owner can read.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.durable import write_atomic
from common.errors import ArtefactError

SIGNING_KEY = "ledger.key"
NEXT_KEY = "ledger.key.next"  # while a key is being rolled
PATIENT_KEY = "patients.key"
_RAW, _PUBLIC_RAW = serialization.Encoding.Raw, serialization.PublicFormat.Raw


def create_key(path: Path) -> Ed25519PrivateKey:
    """A new private key in ``path``. Raises ``ArtefactError`` rather than replace one."""
    if path.exists():
        raise ArtefactError(f"{path} exists: a key is never replaced, choose another file")
    key = Ed25519PrivateKey.generate()
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_secret(path, text)
    return key


def write_secret(path: Path, data: bytes) -> None:
    """``data`` in a file that only its owner can read, from its first byte on."""
    mask = os.umask(0o077)
    try:
        write_atomic(path, data)
    finally:
        os.umask(mask)


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """Raises ``ArtefactError`` if ``path`` holds no Ed25519 private key."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ArtefactError(f"{path} is no private key ({type(error).__name__}): make one first") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ArtefactError(f"{path} is not an Ed25519 key")
    return key


def read_public_key(path: Path) -> str:
    """The public key (hex) in ``path``: 64 hex digits or PEM. Raises ``ArtefactError``."""
    try:
        text = path.read_text(encoding="ascii").strip()
        if re.fullmatch(r"[0-9a-f]{64}", text):
            return text
        key = serialization.load_pem_public_key(text.encode())
    except OSError as error:
        raise ArtefactError(
            f"{path} cannot be read ({error.strerror}): name a public key (KEY.pub)"
        ) from error
    except ValueError as error:
        raise ArtefactError(f"{path} is no public key: 64 hex digits, or PEM; name KEY.pub") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ArtefactError(f"{path} is not an Ed25519 key")
    return key.public_bytes(_RAW, _PUBLIC_RAW).hex()


def public_key(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes(_RAW, _PUBLIC_RAW).hex()


def key_id(public: str) -> str:
    return hashlib.sha256(bytes.fromhex(public)).hexdigest()[:16]


def sign(key: Ed25519PrivateKey, text: str) -> str:
    return key.sign(text.encode()).hex()


def signature_holds(public: str, text: str, signature: str) -> bool:
    """Whether ``signature`` (hex, in its one spelling) is ``public``'s over ``text``."""
    if not re.fullmatch(r"[0-9a-f]{128}", signature) or not re.fullmatch(r"[0-9a-f]{64}", public):
        return False
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(
            bytes.fromhex(signature), text.encode()
        )
    except (InvalidSignature, ValueError):
        return False
    return True


@dataclass(frozen=True)
class SiteKeys:
    """What the guard holds: the ledger's signing key and the secret behind patients' pseudonyms.

    The secret never changes: the budget of a patient is found again by it, across runs and projects.
    """

    folder: Path
    signer: Ed25519PrivateKey
    secret: bytes

    @classmethod
    def create(cls, folder: Path) -> SiteKeys:
        signer = create_key(folder / SIGNING_KEY)
        secret = os.urandom(32)
        write_secret(folder / PATIENT_KEY, secret)
        return cls(folder, signer, secret)

    @classmethod
    def open_or_create(cls, folder: Path) -> SiteKeys:
        """The keys in ``folder``, or new ones where there are none; of one alone nothing is made up.

        Raises ``ArtefactError`` if one of them is missing or damaged.
        """
        there = [(folder / name).exists() for name in (SIGNING_KEY, PATIENT_KEY)]
        return cls.open(folder) if any(there) else cls.create(folder)

    @classmethod
    def open(cls, folder: Path) -> SiteKeys:
        """Raises ``ArtefactError`` if a key is missing or damaged."""
        signer = read_private_key(folder / SIGNING_KEY)
        try:
            secret = (folder / PATIENT_KEY).read_bytes()
        except OSError as error:
            raise ArtefactError(
                f"{folder / PATIENT_KEY} cannot be read: restore it from its backup"
            ) from error
        if len(secret) != 32:
            raise ArtefactError(f"{folder / PATIENT_KEY} is damaged: restore it from its backup")
        return cls(folder, signer, secret)

    @property
    def public(self) -> str:
        return public_key(self.signer)
