"""The ledger as a file: locked, read with every check, appended to so that a crash loses nothing.

An entry is on the disk before the head file names it. So a torn last line, with the head naming the line
before, is what a crash left and is cut off; anything else that is missing was taken away.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from common.canonical import canonical_json
from common.durable import disk_fault, write_atomic
from common.errors import DeadlinePassed
from common.privacy.entries import Entry, LedgerBroken, chain_faults, chain_key, read_entry
from common.privacy.keys import NEXT_KEY, SIGNING_KEY, SiteKeys, public_key, read_private_key

LEDGER = "ledger.jsonl"
HEAD = "ledger.head"
LOCK = "ledger.lock"
LOCK_TIMEOUT_S = 60.0

entries_checked = 0  # of this process, when read: tests assert that it does not grow with what is known

_LOCK_POLL_S = 0.02


@dataclass(frozen=True)
class Head:
    """The last entry: what a witness keeps."""

    seq: int
    hash: str


class Journal:
    """The entries on the disk. Use it inside ``with journal.locked():`` only.

    Args:
        replay: is called once with each entry, in order, when it is read or appended.
    """

    def __init__(self, folder: Path, keys: SiteKeys, replay: Callable[[Entry], None]) -> None:
        self.folder, self.keys, self._replay = folder, keys, replay
        self.entries: list[Entry] = []
        self._bytes = b""

    @property
    def head(self) -> Head:
        return head_of(self.entries)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone with the file. Raises ``DeadlinePassed`` if another process keeps it for a minute."""
        with (self.folder / LOCK).open("a") as file:
            deadline = time.monotonic() + LOCK_TIMEOUT_S
            while not _try_lock(file.fileno()):
                if time.monotonic() > deadline:
                    raise DeadlinePassed(
                        f"another process has held {self.folder / LOCK} for {LOCK_TIMEOUT_S:.0f} s: end it"
                    )
                time.sleep(_LOCK_POLL_S)
            yield  # closing the file unlocks it

    def load(self) -> None:
        """Read what was appended since the last time. Raises ``LedgerBroken``."""
        global entries_checked
        data = (self.folder / LEDGER).read_bytes()
        if not data.startswith(self._bytes):
            raise LedgerBroken("the ledger was changed behind its end while it was in use")
        known = self._head_file()
        end = data.rfind(b"\n") + 1
        if end < len(data):  # a torn line: of a crash only if the head never knew of it
            if known is None or known.seq != data[:end].count(b"\n") - 1:
                raise LedgerBroken("the last line of the ledger is not whole, and it once was")
            os.truncate(self.folder / LEDGER, end)
        added = read_lines(data[len(self._bytes) : end], len(self.entries))
        entries_checked += len(added)
        faults = chain_faults(added, self.entries)
        if faults:
            raise LedgerBroken("the ledger does not hold", faults)
        after = [*self.entries, *added]
        check_head(after, known)
        for entry in added:
            self._replay(entry)
        self.entries, self._bytes = after, data[:end]
        if known != self.head:
            self._write_head()
        self._check_key()

    def append(self, entry: Entry) -> None:
        """On the disk when this returns. Raises ``ArtefactError`` if the disk does not take it."""
        line = entry.line().encode() + b"\n"
        path = self.folder / LEDGER
        try:
            with path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            os.truncate(path, len(self._bytes))
            raise disk_fault(self.folder, error, len(line)) from error
        self._bytes += line
        self.entries.append(entry)
        self._write_head()
        self._replay(entry)

    def take_next_key(self) -> None:
        """The key that a KEYROLL has announced replaces the old one."""
        (self.folder / NEXT_KEY).replace(self.folder / SIGNING_KEY)
        signer = read_private_key(self.folder / SIGNING_KEY)
        self.keys = SiteKeys(self.folder, signer, self.keys.secret)

    def _check_key(self) -> None:
        expected = chain_key(self.entries)
        following = self.folder / NEXT_KEY
        # A crash in the middle of a key roll leaves the announced key beside the old one.
        if following.exists() and public_key(read_private_key(following)) == expected:
            self.take_next_key()
        if self.keys.public != expected:  # another process may have rolled it
            self.keys = SiteKeys.open(self.folder)
        if self.keys.public != expected:
            raise LedgerBroken(f"{self.folder / SIGNING_KEY} is not the key that signs this ledger")

    def _head_file(self) -> Head | None:
        return read_head((self.folder / HEAD).read_bytes()) if (self.folder / HEAD).exists() else None

    def _write_head(self) -> None:
        write_atomic(self.folder / HEAD, canonical_json(asdict(self.head)).encode())


def head_of(entries: list[Entry]) -> Head:
    return Head(entries[-1].seq, entries[-1].hash) if entries else Head(-1, "")


def read_lines(data: bytes, first: int = 0) -> list[Entry]:
    """The entries in ``data``, which must end with a newline. Raises ``LedgerBroken``."""
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise LedgerBroken("the ledger is damaged: it is not UTF-8 text") from error
    if lines.pop():
        raise LedgerBroken("the last line of the ledger is not whole")
    return [read_entry(line, number) for number, line in enumerate(lines, start=first)]


def read_head(data: bytes) -> Head:
    """Raises ``LedgerBroken`` unless ``data`` is a head in its one spelling."""
    try:
        head = Head(**json.loads(data))
        if canonical_json(asdict(head)).encode() != data:
            raise ValueError("another spelling")
    except (ValueError, TypeError) as error:
        raise LedgerBroken(f"{HEAD} is damaged or was changed") from error
    return head


def check_head(entries: list[Entry], head: Head | None) -> None:
    """``entries`` are at least those that ``head`` knows, and at most one more. Raises ``LedgerBroken``."""
    if head is None:
        if len(entries) > 1:
            raise LedgerBroken(f"{HEAD} is missing beside a ledger of {len(entries)} entries")
        return
    if not 0 <= head.seq < len(entries) or entries[head.seq].hash != head.hash:
        raise LedgerBroken("entries that the head file knows are missing: the ledger was cut or rolled back")
    if head.seq < len(entries) - 2:
        raise LedgerBroken("the head file is older than the ledger: it was rolled back")


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
