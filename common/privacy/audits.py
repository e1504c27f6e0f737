"""What a site keeps of its audits: files in ``audits/``, and AUDIT entries of the ledger that name them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from common.canonical import sha256_of
from common.durable import write_atomic
from common.privacy.entries import Entry, EntryType
from common.privacy.policy import AuditRules, Policy

AUDITS = "audits"  # below the site's folder; stays there
REHEARSAL, ARTEFACT = "rehearsal", "artefact"  # kinds, as ``detail.kind`` says


def save_audit(folder: Path, name: str, document: dict[str, Any]) -> dict[str, str]:
    """Write ``audits/NAME.json`` below the site's ``folder``; returns its name and digest for the ledger.

    Raises ``DiskFault`` if the disk does not take it.
    """
    data = (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()
    path = folder / AUDITS / f"{name}.json"
    write_atomic(path, data)
    return {"file": f"{AUDITS}/{path.name}", "sha256": sha256_of(data)}


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
