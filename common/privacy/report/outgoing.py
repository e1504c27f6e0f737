"""What left the building: every payload of the run, and the same grouped by stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.pages.wording import size
from common.privacy.entries import EntryType
from common.privacy.receipts import NO_MECHANISM, PUBLIC, ReceiptLine
from common.privacy.report.record import SiteRecord, bare_of
from common.privacy.report.rounding import upper

TO_SERVER = "the server"
TO_ALL = "the server; in its mean, every other site"
WORDS = {
    NO_MECHANISM: "none: NO GUARANTEE",
    PUBLIC: "public values, nothing of a patient",
    "dp_sgd": "noised steps (DP-SGD)",
    "laplace": "Laplace noise",
    "gaussian": "Gaussian noise on one sum over all patients",
}


def outgoing(record: SiteRecord) -> dict[str, Any]:
    """Totals, one row a kind of payload, and one a payload, in the order in which they left."""
    receipts = record.receipts
    return {
        "payloads": len(receipts),
        "bytes": sum(receipt.bytes for receipt in receipts),
        "size": size(sum(receipt.bytes for receipt in receipts)),
        "noised": _total([r for r in receipts if r.mechanism not in (NO_MECHANISM, PUBLIC)]),
        "public": _total([r for r in receipts if r.mechanism == PUBLIC]),
        "without_mechanism": bare_of(receipts),
        "without_mechanism_elsewhere": bare_of(record.others),
        "booked_without_noise": record.number_of(EntryType.export),
        "groups": _groups(receipts),
        "list": [_row(receipt) for receipt in receipts],
        "told_apart": bool(record.own) or not record.others,
    }


def mechanism_in_words(mechanism: str) -> str:
    return WORDS.get(mechanism, mechanism)


def _total(receipts: Sequence[ReceiptLine]) -> dict[str, Any]:
    return {"payloads": len(receipts), "size": size(sum(receipt.bytes for receipt in receipts))}


def _groups(receipts: Sequence[ReceiptLine]) -> list[dict[str, Any]]:
    kinds: dict[tuple[str, str, str], list[ReceiptLine]] = {}
    for receipt in receipts:
        kinds.setdefault((receipt.stage, receipt.name, receipt.mechanism), []).append(receipt)
    return [
        {
            "stage": stage,
            "name": name,
            "to": _to(name),
            "payloads": len(group),
            "bytes": sum(receipt.bytes for receipt in group),
            "size": size(sum(receipt.bytes for receipt in group)),
            "mechanism": mechanism_in_words(mechanism),
            "protected": mechanism != NO_MECHANISM,
            "epsilon_after": _last(group),
        }
        for (stage, name, mechanism), group in kinds.items()
    ]


def _row(receipt: ReceiptLine) -> dict[str, Any]:
    return {
        "stage": receipt.stage,
        "round": receipt.round,
        "name": receipt.name,
        "to": _to(receipt.name),
        "bytes": receipt.bytes,
        "sha256": receipt.sha256,
        "mechanism": mechanism_in_words(receipt.mechanism),
        "epsilon_after": None if receipt.epsilon_after is None else upper(receipt.epsilon_after),
    }


def _to(name: str) -> str:
    """Adapters and styles go on to the other sites, the rest stays with the server."""
    return TO_ALL if name.endswith(".adapter") or name == "style" else TO_SERVER


def _last(group: Sequence[ReceiptLine]) -> float | None:
    booked = [receipt.epsilon_after for receipt in group if receipt.epsilon_after is not None]
    return upper(booked[-1]) if booked else None
