"""Which patient belongs to which class of the ledger: the site's own secret, in a file that never leaves.

Patients stand in it as HMAC-SHA256 of their id under the site's secret, and each line is sealed with
ChaCha20-Poly1305. A line is written before the ledger entry that names its digest; a line that no entry
names was left by a crash and means nothing.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.canonical import canonical_json
from common.durable import disk_fault
from common.errors import DataError
from common.privacy.entries import Cohort, LedgerBroken

MEMBERS = "members.jsonl"
_NONCE_BYTES = 12


@dataclass(frozen=True)
class Moves:
    """Who goes where: pseudonym -> its new class, and pseudonyms that turned out to be another's person."""

    to: dict[str, str]
    same: dict[str, str]


class Members:
    """The patients of one site, as far as the ledger's entries have named them."""

    def __init__(self, folder: Path, secret: bytes) -> None:
        self.path = folder / MEMBERS
        self._patients = _derived(secret, b"wardround patients")
        self._sealing = ChaCha20Poly1305(_derived(secret, b"wardround members"))
        self._classes: dict[str, str] = {}
        self._same: dict[str, str] = {}
        self._lines: dict[str, str] = {}

    def persons(self, patients: Iterable[str]) -> list[str]:
        """Pseudonyms, one a person. Raises ``DataError`` if two of the ids are one person, or equal."""
        found = [self._person(patient) for patient in patients]
        twice = len(found) - len(set(found))
        if twice:
            raise DataError(
                f"{twice} of the cohort's patient ids belong to a person who is already in it: "
                "give a person's images one id, or leave the other out"
            )
        return sorted(found)

    def class_of(self, patient: str) -> str:
        """The class that ``patient`` is in; empty: the ledger has not named the patient."""
        return self._classes.get(self._person(patient), "")

    def split(self, persons: Sequence[str], sizes: dict[str, int]) -> tuple[Cohort, Moves]:
        """The classes that exactly ``persons`` make up, new ones where an old class is only partly in.

        Args:
            sizes: of the classes before.
        """
        inside = Counter(self._classes.get(person, "") for person in persons)
        cohort, number = Cohort(), len(sizes)
        to: dict[str, str] = {}
        for name, count in sorted(inside.items()):
            target = name
            if name == "" or count < sizes[name]:
                target, number = f"c{number}", number + 1
                cohort.parents[target] = [name] if name else []
                to |= {person: target for person in persons if self._classes.get(person, "") == name}
            cohort.classes[target] = count
        return cohort, Moves(to, {})

    def join(self, kept: str, other: str, sizes: dict[str, int]) -> tuple[Cohort, Moves]:
        """Patient ids ``kept`` and ``other`` are one person, who has spent what both had.

        Raises ``DataError`` if the ledger knows neither, or has joined them before.
        """
        one, two = self._person(kept), self._person(other)
        if one == two:
            raise DataError("these two patient ids are already one person in the ledger")
        parents = [self._classes[person] for person in (one, two) if person in self._classes]
        if not parents:
            raise DataError("the ledger knows neither of these patient ids: check their spelling")
        target = f"c{len(sizes)}"
        if len(parents) == 2:
            return Cohort({target: 1}, {target: parents}), Moves({one: target}, {two: one})
        known, new = (one, two) if one in self._classes else (two, one)
        return Cohort(), Moves({}, {new: known})

    def write(self, moves: Moves) -> str:
        """Seal ``moves`` in a line on the disk, not yet in force; returns its digest, "" if nobody moves."""
        if not moves.to and not moves.same:
            return ""
        nonce = os.urandom(_NONCE_BYTES)
        plain = canonical_json({"to": moves.to, "same": moves.same}).encode()
        line = base64.b64encode(nonce + self._sealing.encrypt(nonce, plain, None)).decode()
        try:
            with self.path.open("a", encoding="ascii") as file:
                file.write(f"\n{line}\n")  # a torn line before stays a line of its own
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_fault(self.path.parent, error, len(line)) from error
        digest = hashlib.sha256(line.encode()).hexdigest()
        self._lines[digest] = line
        return digest

    def follow(self, digest: str) -> None:
        """Put the line of that digest in force. Raises ``LedgerBroken`` if it is missing or damaged."""
        if not digest:
            return
        if digest not in self._lines:
            text = self.path.read_text(encoding="ascii", errors="replace") if self.path.exists() else ""
            self._lines = {hashlib.sha256(line.encode()).hexdigest(): line for line in text.split("\n")}
        try:
            raw = base64.b64decode(self._lines[digest], validate=True)
            plain = self._sealing.decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], None)
        except (KeyError, ValueError, InvalidTag) as error:
            raise LedgerBroken(
                f"{self.path} lacks a line that the ledger names, or was sealed with another key: "
                "restore it and patients.key from the same backup as the ledger"
            ) from error
        moves = json.loads(plain)
        self._same |= moves["same"]
        self._classes |= moves["to"]

    def _person(self, patient: str) -> str:
        pseudonym = hmac.new(self._patients, patient.encode(), hashlib.sha256).hexdigest()[:32]
        while pseudonym in self._same:
            pseudonym = self._same[pseudonym]
        return pseudonym


def _derived(secret: bytes, purpose: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=purpose).derive(secret)
