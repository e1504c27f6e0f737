"""What a failing site says outside, and where it keeps the rest.

Outside goes one border code (`common.errors`); the text, the traceback and every name in it stay in the
site's own folder, for the site's own people.
"""

from __future__ import annotations

import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path

from common.canonical import canonical_json
from common.errors import PolicyRefusal, WardroundError
from common.plan import Round

FAULT_LOG = "faults.log"
NOTICES = "notices.jsonl"


def border_answer(error: BaseException) -> tuple[str, str]:
    """(code, field): all of ``error`` that may cross the site's border."""
    code = error.border_code if isinstance(error, WardroundError) else WardroundError.border_code
    return code, error.field if isinstance(error, PolicyRefusal) else ""


def keep_notice(folder: Path, order: Round) -> None:
    """Append the coordinator's notice to ``notices.jsonl`` in the site's folder, as quoted text."""
    entry = {"ts": datetime.now(UTC).isoformat(), "stage": order.stage, "round": order.index}
    with (folder / NOTICES).open("a", encoding="utf-8") as log:
        log.write(canonical_json(entry | {"notice": order.notice}) + "\n")


def keep_refusal(folder: Path, stage: str, refusal: WardroundError) -> None:
    """Append why this site said no to ``faults.log``: the server hears a code and a field alone."""
    with (folder / FAULT_LOG).open("a", encoding="utf-8") as log:
        log.write(f"--- {datetime.now(UTC).isoformat()} {stage} refused, {refusal.border_code}\n{refusal}\n")


def keep_fault(address: str, action: str, error: BaseException) -> None:
    """Append the full text to ``faults.log`` in the site's folder, or to stderr where there is none.

    A guard in its own process keeps its own log; a courier that cannot reach one has only its stderr,
    which is on the site's machine too. Never raises: the answer must still go out.
    """
    entry = f"--- {datetime.now(UTC).isoformat()} {action}\n{''.join(traceback.format_exception(error))}"
    kind, _, folder = address.partition(":")
    try:
        if kind != "in-process" or not Path(folder).is_dir():
            raise FileNotFoundError(folder)
        with (Path(folder) / FAULT_LOG).open("a", encoding="utf-8") as log:
            log.write(entry)
    except OSError:
        sys.stderr.write(entry)
