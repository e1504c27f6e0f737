"""The bundles whose code a site lets run: a list of the site's own, read anew for every task."""

from __future__ import annotations

import re
import stat
import zipfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from common.canonical import sha256_of_file
from common.durable import write_atomic
from common.errors import ConfigError, UsageError

APPROVED = "approved-bundles.txt"
_HEAD = (
    "# Bundles that may run here, one a line: SHA-256, when it was approved, a note.\n"
    "# wardround site bundle approve | revoke | list\n"
)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_WRITABLE_BY_OTHERS = 0o022


@dataclass(frozen=True)
class Approval:
    """``sha256`` of a bundle's file, ``since`` when (ISO 8601, UTC), and the site's own ``note`` on it."""

    sha256: str
    since: str
    note: str


class ApprovedBundles:
    """``approved-bundles.txt`` in a site's folder.

    Guarantee: nothing is kept in memory, so what was approved or revoked holds from the next task on; a
    list that cannot be trusted approves nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / APPROVED

    def read(self) -> list[Approval]:
        """In the order of their approval; none where there is no list.

        Raises ``ConfigError`` listing every fault: a line that is no approval, or a file that others than
        its owner can write.
        """
        if not self.path.exists():
            return []
        faults, found = [], []
        text = self.path.read_text(encoding="utf-8", errors="replace")
        if stat.S_IMODE(self.path.stat().st_mode) & _WRITABLE_BY_OTHERS:
            faults.append(f"others than its owner can write it: chmod go-w {self.path}")
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip() and not line.startswith("#"):
                sha256, since, note = (*line.split(maxsplit=2), "", "")[:3]
                if _SHA256.fullmatch(sha256):
                    found.append(Approval(sha256, since, note))
                else:
                    faults.append(f"line {number} begins with no SHA-256 of 64 hex digits: delete it")
        if faults:
            raise ConfigError(f"{self.path} approves nothing as it is", faults)
        return found

    def allow(self, sha256: str | None) -> bool:
        """Whether the bundle of this digest may run. Raises as `read` does."""
        return any(approval.sha256 == sha256 for approval in self.read())

    def approve(self, sha256: str, note: str = "") -> bool:
        """Whether this is news. Raises as `read` does."""
        approvals = self.read()
        if any(approval.sha256 == sha256 for approval in approvals):
            return False
        since = datetime.now(UTC).isoformat(timespec="seconds")
        self._write([*approvals, Approval(sha256, since, " ".join(note.split()))])
        return True

    def revoke(self, sha256: str) -> bool:
        """Whether it was approved. Raises as `read` does."""
        approvals = self.read()
        kept = [approval for approval in approvals if approval.sha256 != sha256]
        if len(kept) == len(approvals):
            return False
        self._write(kept)
        return True

    def _write(self, approvals: list[Approval]) -> None:
        lines = [f"{one.sha256} {one.since} {one.note}".rstrip() + "\n" for one in approvals]
        mode = stat.S_IMODE(self.path.stat().st_mode) if self.path.exists() else 0o644
        write_atomic(self.path, (_HEAD + "".join(lines)).encode())
        self.path.chmod(mode & ~_WRITABLE_BY_OTHERS)


def bundle_sha256(named: str) -> str:
    """The SHA-256 of the bundle that ``named`` is: 64 hex digits, or a file ``.fab``.

    Raises ``UsageError`` if it is neither.
    """
    if _SHA256.fullmatch(named.lower()):
        return named.lower()
    path = Path(named)
    if not path.is_file() or not zipfile.is_zipfile(path):
        raise UsageError(f"{named!r} is no bundle: name its SHA-256 (64 hex digits), or its file (.fab)")
    return sha256_of_file(path)
