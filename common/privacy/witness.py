"""Heads of ledgers that others keep: the file they lie in, and what they say of a ledger.

The server keeps one file for its run, each site one for all runs (`client.witnesses`). In both a line is a
signed head in its canonical spelling, of each site and key the latest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from common.canonical import canonical_json
from common.durable import write_atomic
from common.errors import ArtefactError
from common.privacy.entries import Entry, EntryType
from common.privacy.heads import SignedHead, newest
from common.strict_json import read_strictly

ROLLED_BACK = "the ledger lacks an entry that a witness has seen: it was cut or rolled back"
EXCHANGED = "a witness has seen this site sign with a key that the ledger does not know: it was exchanged"


def read_heads(path: Path) -> list[SignedHead]:
    """Raises ``ArtefactError`` unless each line of ``path`` is a head that its own signature proves."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        heads = [read_strictly(line, SignedHead, "head") for line in lines]
    except (OSError, UnicodeDecodeError, ArtefactError) as error:
        raise ArtefactError(
            f"{path} is no file of witnessed ledger heads, or is damaged: ask the witness for it again, or "
            "where it is your own, move it away"
        ) from error
    if unsigned := sum(not head.holds for head in heads):
        raise ArtefactError(f"{path}: {unsigned} of {len(heads)} heads are not signed by the key they name")
    return heads


def write_heads(path: Path, heads: Iterable[SignedHead], lasting: bool = True) -> None:
    """Of each site and key the latest. Raises ``DiskFault`` if the disk does not take it.

    ``lasting``: as `common.durable.write_atomic` has it.
    """
    lines = [canonical_json(asdict(head)) + "\n" for head in newest(heads)]
    write_atomic(path, "".join(lines).encode(), lasting)


def heads_of(site: str, keys: Iterable[str], heads: Iterable[SignedHead]) -> list[SignedHead]:
    """Those of ``heads`` that are about ``site``'s ledger: by its keys, or by its name under another key."""
    own = set(keys)
    return [head for head in heads if head.public_key in own or head.site == site]


def chain_keys(entries: Sequence[Entry]) -> list[str]:
    """Every public key that has signed, or signs, entries of this chain."""
    rolls = (entry for entry in entries if entry.type in (EntryType.genesis, EntryType.keyroll))
    return [str(entry.detail.get("public_key", "")) for entry in rolls]


def witness_faults(entries: Sequence[Entry], heads: Iterable[SignedHead]) -> list[str]:
    """What ``heads`` of this ledger (`heads_of`), whose signatures hold, say against ``entries``."""
    keys = set(chain_keys(entries))
    faults: dict[str, None] = {}
    for head in heads:
        if head.public_key not in keys:
            faults[EXCHANGED] = None
        elif head.seq >= len(entries) or entries[head.seq].hash != head.hash:
            faults[ROLLED_BACK] = None
    return list(faults)
