"""Receipts of what left, as `client.egress` writes them, held against the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from common.canonical import canonical_json, sha256_of
from common.errors import ArtefactError, VerificationFailed
from common.privacy.entries import Entry
from common.strict_json import read_strictly

NO_MECHANISM = "none"
SYNTHETIC = "synthetic"  # in place of a stage: images that the release gate let out
PUBLIC = "public"  # made of public values alone: no mechanism, and nothing to pay for


@dataclass(frozen=True)
class ReceiptLine:
    """One outgoing payload; the fields of `client.egress.Receipt`."""

    site: str
    stage: str
    round: int
    name: str
    bytes: int
    sha256: str
    mechanism: str
    epsilon_after: float | None = None


def read_receipts(data: bytes) -> list[ReceiptLine]:
    """Raises ``VerificationFailed`` unless each line is a receipt in its canonical spelling."""
    try:
        lines = data.decode("utf-8").split("\n")
        if lines.pop():
            raise ValueError("a torn line")
        found = [read_strictly(line, ReceiptLine, "receipt") for line in lines]
        if [canonical_json(asdict(receipt)) for receipt in found] != lines:
            raise ValueError("another spelling")
    except (ValueError, ArtefactError) as error:
        raise VerificationFailed("the receipts are damaged or were changed") from error
    return found


def receipt_faults(entries: Sequence[Entry], data: bytes, receipts: Sequence[ReceiptLine]) -> list[str]:
    """What does not agree: each payload of the ledger has its receipt, each noised receipt its entry.

    The ledger also names length and digest of the receipts as they were at each entry, so that none of them
    can be changed or taken away afterwards.
    """
    faults = []
    for entry in entries:
        anchor = entry.detail.get("receipts")
        if anchor is not None and sha256_of(data[: anchor["bytes"]]) != anchor["sha256"]:
            faults.append(f"entry {entry.seq}: the receipts are not those of its time")
    anchors = [entry.detail["receipts"]["bytes"] for entry in entries if "receipts" in entry.detail]
    if len(data) > max(anchors, default=0):
        faults.append("receipts were written after the ledger's last entry: make a checkpoint, then verify")
    booked = {(entry.stage, p.name, p.sha256, p.bytes) for entry in entries for p in entry.payload}
    given = {(r.stage, r.name, r.sha256, r.bytes): r for r in receipts}
    if booked - set(given):
        faults.append(f"{len(booked - set(given))} payloads of the ledger have no receipt")
    noised = {key for key, receipt in given.items() if receipt.mechanism not in (NO_MECHANISM, PUBLIC)}
    if noised - booked:
        faults.append(
            f"{len(noised - booked)} receipts name a mechanism, and no entry of the ledger pays for it"
        )
    return faults
