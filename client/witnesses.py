"""A site as a witness: it keeps the last signed head of every other site's ledger that it was shown.

The file lies in the site's folder over all runs and federations. An auditor of another site may ask for it:
`wardround privacy verify --witness witnessed.jsonl`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.privacy.heads import SignedHead
from common.privacy.witness import read_heads, write_heads

WITNESSED = "witnessed.jsonl"
MOST_WITNESSED = 8192  # lines; beyond them no new key is taken on, and none is given up


def witness(folder: Path, site: str, heads: Sequence[SignedHead]) -> list[str]:
    """Keep what is new in ``heads``, whose signatures hold, of sites other than ``site``.

    Guarantee: what was kept of a ledger is only ever replaced by a later head of it.

    Returns:
        What does not agree with what was kept, in words for the site's people.

    Raises:
        ArtefactError: the file is damaged, or cannot be written.
    """
    path = folder / WITNESSED
    kept = {(head.site, head.public_key): head for head in (read_heads(path) if path.exists() else [])}
    before, notices = dict(kept), []
    for head in heads:
        key = (head.site, head.public_key)
        if head.site == site:
            continue
        if key in kept and head.before(kept[key]):
            notices.append(
                f"the ledger of {head.site} went back: entry {kept[key].seq} was shown before, now "
                f"{head.seq}. It was cut or rolled back, or the server shows an old head"
            )
        elif key in kept or len(kept) < MOST_WITNESSED:
            if key not in kept and any(other == head.site for other, _ in kept):
                notices.append(f"the ledger of {head.site} is signed by a key that was not seen before")
            kept[key] = head
    if kept != before:
        write_heads(path, kept.values(), lasting=False)  # the next order brings them again
    return notices
