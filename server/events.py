"""``events.jsonl``: one line per message, round and phase, with the reason of every drop or refusal.

Reasons are the server's own words or a site's border code: no text that a site wrote is ever logged.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.canonical import canonical_json
from common.durable import append_line


def _now() -> datetime:
    return datetime.now(UTC)


class EventLog:
    """Appends to ``path``; a resumed run goes on in the same file."""

    def __init__(self, path: Path, clock: Callable[[], datetime] = _now) -> None:
        self.path = path
        self.clock = clock

    def write(self, event: str, **facts: Any) -> None:
        """One line. Raises ``ArtefactError`` if the disk is full."""
        append_line(self.path, canonical_json({"ts": self.clock().isoformat(), "event": event, **facts}))
