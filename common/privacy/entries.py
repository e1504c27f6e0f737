"""The ledger's lines: canonical JSON, each with the hash of the one before and a signature.

The hash covers the entry without ``hash`` and ``sig``; the signature is Ed25519 over that same text. A line
is accepted only in its one canonical spelling, so no byte of it can change unnoticed. A chain cannot show
that its last entries are missing: for that a head hash must be kept elsewhere, by a witness.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from enum import StrEnum
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.canonical import canonical_json, sha256_of
from common.errors import VerificationFailed
from common.plan import rebuild
from common.privacy.events import Event, Mechanism
from common.privacy.keys import sign, signature_holds
from common.strict_json import conforms

NO_ENTRY = "0" * 64  # what the first entry names as the one before


class LedgerBroken(VerificationFailed):
    """The ledger does not hold: changed, cut, rolled back, or its keys are others."""

    border_code = "REFUSED_LEDGER"


class EntryType(StrEnum):
    genesis = "GENESIS"
    policy = "POLICY"
    plan = "PLAN"
    reserve = "RESERVE"  # spends
    commit = "COMMIT"
    void_counted = "VOID_COUNTED"
    refuse = "REFUSE"
    metric = "METRIC"  # spends, by the Laplace mechanism
    audit = "AUDIT"  # detail.kind: rehearsal (of the mechanism, before a run) or artefact (of what left)
    merge = "MERGE"
    export = "EXPORT"  # spends: a release outside any mechanism
    keyroll = "KEYROLL"
    checkpoint = "CHECKPOINT"


SPENDING = (EntryType.reserve, EntryType.metric, EntryType.export)


@dataclass(frozen=True)
class Context:
    """Which run, plan, policy and code an entry belongs to; empty where it belongs to none."""

    run_id: str = ""
    plan_sha256: str = ""
    policy_sha256: str = ""
    code_sha256: str = ""


@dataclass(frozen=True)
class Payload:
    """One thing that left: its name, the digest on its receipt, its size in bytes."""

    name: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Cohort:
    """Which classes of patients an entry is about. A class is patients of one and the same history.

    Attributes:
        classes: class -> its patients, after the entry; in a spending entry each of them is charged.
        parents: a new class -> those it came from, whose history it has (a merged patient: the sum of both).
        members: SHA-256 of the line in the site's own member file that says who moved; empty if nobody did.
    """

    classes: dict[str, int] = field(default_factory=dict)
    parents: dict[str, list[str]] = field(default_factory=dict)
    members: str = ""


@dataclass(frozen=True)
class Entry:
    """One line of the ledger.

    ``events`` are triples of noise_multiplier, sample_rate, count: what a spending entry charges, and what
    ran in a COMMIT. ``epsilon_after`` is of the patients who have spent most; None is no guarantee.
    """

    seq: int
    prev: str
    ts: str
    type: EntryType
    run_id: str
    plan_sha256: str
    policy_sha256: str
    code_sha256: str
    cohort: Cohort
    events: list[list[Any]]
    stage: str
    payload: list[Payload]
    epsilon_after: dict[str, float | None]
    detail: dict[str, Any]
    hash: str = ""
    sig: str = ""

    def text(self) -> str:
        """What is hashed and signed."""
        body = asdict(self)
        del body["hash"], body["sig"]
        return canonical_json(body)

    def line(self) -> str:
        return canonical_json(asdict(self))

    def spent(self) -> list[Event]:
        """What the entry charges to each patient of its cohort."""
        return self.listed() if self.type in SPENDING else []

    def listed(self) -> list[Event]:
        """Its triples as events. Raises ``ConfigError`` if one is none."""
        mechanism = Mechanism.laplace if self.type is EntryType.metric else Mechanism.gaussian
        return [Event(noise, rate, count, mechanism) for noise, rate, count in self.events]

    @property
    def time(self) -> datetime:
        return datetime.fromisoformat(self.ts)


def sealed(entry: Entry, signer: Ed25519PrivateKey) -> Entry:
    """``entry`` with its hash and signature."""
    text = entry.text()
    return Entry(**{**_shallow(entry), "hash": sha256_of(text.encode()), "sig": sign(signer, text)})


def _shallow(entry: Entry) -> dict[str, Any]:
    return {item.name: getattr(entry, item.name) for item in fields(entry)}


def read_entry(line: str, number: int) -> Entry:
    """Raises ``LedgerBroken`` unless ``line`` is exactly one entry in its canonical spelling."""
    try:
        entry = rebuild(Entry, json.loads(line))
        numbers = all(conforms(tuple[float, float, int], tuple(event)) for event in entry.events)
        if not conforms(Entry, _plain(entry)) or not numbers or entry.line() != line:
            raise ValueError("another spelling")
        if entry.time.tzinfo is None:
            raise ValueError("a time without its zone")
        entry.listed()
    except Exception as error:  # whatever a changed byte leads to, it is one and the same finding
        raise LedgerBroken(f"line {number} of the ledger is damaged or was changed") from error
    assert isinstance(entry, Entry)
    return entry


def _plain(entry: Entry) -> Entry:
    """The entry without the fields that hold values of several types."""
    return Entry(**{**_shallow(entry), "detail": {}, "events": []})


def chain_faults(entries: Sequence[Entry], after: Sequence[Entry] = ()) -> list[str]:
    """What does not hold of ``entries``, which follow on ``after`` (already checked)."""
    faults: list[str] = []
    key = chain_key(after)
    before = after[-1] if after else None
    for number, entry in enumerate(entries, start=len(after)):
        if number == 0:
            key = str(entry.detail.get("public_key", ""))
        if (number == 0) != (entry.type is EntryType.genesis):
            faults.append(f"entry {number}: GENESIS comes first and once")
        if entry.seq != number or entry.prev != (before.hash if before else NO_ENTRY):
            faults.append(f"entry {number}: does not follow the one before it")
        if before is not None and entry.time < before.time:
            faults.append(f"entry {number}: earlier than the one before it")
        if entry.hash != sha256_of(entry.text().encode()):
            faults.append(f"entry {number}: its hash is of another text")
        if not signature_holds(key, entry.text(), entry.sig):
            faults.append(f"entry {number}: not signed by this ledger's key")
        if entry.type is EntryType.keyroll:
            key = str(entry.detail.get("public_key", ""))
            if not signature_holds(key, entry.prev, str(entry.detail.get("proof", ""))):
                faults.append(f"entry {number}: the new key did not sign its own arrival")
        before = entry
    return faults


def chain_key(entries: Sequence[Entry]) -> str:
    """The public key that signs the next entry."""
    rolls = [entry for entry in entries if entry.type in (EntryType.genesis, EntryType.keyroll)]
    return str(rolls[-1].detail.get("public_key", "")) if rolls else ""
