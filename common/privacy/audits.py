"""What a site keeps of its audits: files in ``audits/``, and AUDIT entries of the ledger that name them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from common.canonical import sha256_of
from common.durable import write_atomic
from common.privacy.entries import Entry, EntryType
from common.privacy.policy import AuditRules, Need, Policy

AUDITS = "audits"  # below the site's folder; stays there
REHEARSAL, ARTEFACT = "rehearsal", "artefact"  # kinds, as ``detail.kind`` says
ADAPTER = "adapter"  # ``detail.artefact`` of an audit of what leaves


def save_audit(folder: Path, name: str, document: dict[str, Any]) -> dict[str, str]:
    """Write ``audits/NAME.json`` below the site's ``folder``; returns its name and digest for the ledger.

    Raises ``DiskFault`` if the disk does not take it.
    """
    data = (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()
    path = folder / AUDITS / f"{name}.json"
    write_atomic(path, data)
    return {"file": f"{AUDITS}/{path.name}", "sha256": sha256_of(data)}


def owed_audits(entries: Sequence[Entry], policy: Policy) -> tuple[list[str], list[str]]:
    """Runs under ``policy`` without the artefact audit that it requires: ended ones, and others; in words.

    A run owes one if something of it has left: of the adapter, which is what leaves, and after the last of
    it. It has ended with its last planned step; before that there is no finished teacher to audit.
    """
    if policy.audit.artefact_mia is not Need.required:
        return [], []
    planned: Counter[str] = Counter()
    ran: Counter[str] = Counter()
    waiting: dict[str, bool] = {}
    for entry in entries:
        if entry.type is EntryType.plan:
            planned[entry.run_id] = sum(int(plan["steps"]) for plan in entry.detail["plans"].values())
        elif entry.type is EntryType.commit and entry.payload and entry.policy_sha256 == policy.digest:
            ran[entry.run_id] += sum(event.count for event in entry.listed())
            waiting[entry.run_id] = True
        elif entry.type is EntryType.audit and _of_adapter(entry.detail):
            waiting[entry.run_id] = False
    owing = [run for run, waits in waiting.items() if waits]
    ended = [run for run in owing if ran[run] >= planned[run]]
    return [_owed(run) for run in ended], [_owed(run) for run in owing if run not in ended]


def _of_adapter(detail: dict[str, Any]) -> bool:
    return detail["kind"] == ARTEFACT and detail.get("artefact") == ADAPTER


def _owed(run: str) -> str:
    return (
        f"run {run}: the policy requires an audit of the adapter (audit.artefact_mia), and none is booked "
        "after the last of it left: run `wardround privacy audit SITE_FOLDER` at the hospital"
    )


def lately_rehearsed(entries: Sequence[Entry], code: str, now: datetime, policy: Policy | None) -> bool:
    """Whether the last rehearsal of ``code`` in the ledger passed, and is no older than ``policy`` allows.

    Without one its age is held against the default of `AuditRules`.
    """
    rules = AuditRules() if policy is None else policy.audit
    audits = (entry for entry in reversed(entries) if entry.type is EntryType.audit)
    last = next((entry for entry in audits if _of_code(entry.detail, code)), None)
    if last is None or last.detail["passed"] is not True:
        return False
    return now - last.time < timedelta(days=rules.rehearsal_max_age_days)


def _of_code(detail: dict[str, Any], code: str) -> bool:
    return detail["kind"] == REHEARSAL and detail.get("code_sha256") == code
