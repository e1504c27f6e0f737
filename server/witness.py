"""The server as a witness: the last head of each site's ledger, as the site itself signed it.

A site that puts its ledger back to an older state can hide what it spent, and its own files look whole. Here
the later head is kept, shown to the site with its next order, which it then refuses (`client.account`), and
to the other sites, which keep it too.
"""

from __future__ import annotations

from pathlib import Path

from common.errors import ArtefactError
from common.privacy.heads import MOST_HEADS, SignedHead, newest
from common.privacy.witness import read_heads, write_heads

HEADS_FILE = "ledger-heads.jsonl"  # below the run's state
SHOWN = 64  # heads in one order of a round: the site's own, and of the sites that follow it by name

MISSING = "no ledger head in a private run"
UNASKED = "a ledger head in a run without privacy"
UNSIGNED = "a ledger head that nobody signed"
ANOTHER = "the ledger head of another site"
WENT_BACK = "a ledger head older than before: the ledger was cut or rolled back"


class Witness:
    """The heads of one run's sites.

    A coordinator who wants to remember them over runs begins a run with the last one's file in its place.

    Guarantees: a head only ever gives way to a later one; what an order shows is on the disk, so that no
    site is shown less after a crash than before.

    Args:
        private: whether the run asks for privacy; in one that does not, nobody has a head to show.
        path: of the file; None keeps none.

    Raises:
        ArtefactError: the file is damaged.
    """

    def __init__(self, private: bool, path: Path | None = None) -> None:
        self._private, self._path = private, path
        there = private and path is not None and path.exists()
        self._saved = newest(read_heads(path)) if there and path is not None else []
        self._last = {head.site: head for head in sorted(self._saved, key=lambda head: head.seq)}

    def take(self, site: str, head: SignedHead | None) -> None:
        """Keep the ``head`` of an answer of ``site`` in mind. Raises ``ArtefactError`` if it cannot be."""
        if fault := self._fault(site, head):
            raise ArtefactError(fault)
        if head is not None:
            self._last[site] = head

    def _fault(self, site: str, head: SignedHead | None) -> str:
        if head is None:
            return MISSING if self._private else ""
        if not self._private:
            return UNASKED
        if head.site != site:
            return ANOTHER
        if not head.holds:
            return UNSIGNED
        return WENT_BACK if site in self._last and head.before(self._last[site]) else ""

    def save(self) -> None:
        """Put what was taken on the disk, and into orders from now on. Raises ``DiskFault``."""
        heads = newest([*self._saved, *self._last.values()])
        if heads == self._saved:
            return
        if self._path is not None:
            write_heads(self._path, heads)
        self._saved = heads

    def shown_to(self, site: str) -> list[SignedHead]:
        """For an order to ``site``: its own heads and some of its peers', always of the same ones.

        To a node whose name is not known yet, at the roll call, all: its own is among them.
        """
        names = sorted({head.site for head in self._saved})
        if site not in names:
            return self._saved[:MOST_HEADS]
        place = names.index(site)
        near = set([*names[place:], *names[:place]][:SHOWN])
        return [head for head in self._saved if head.site in near]
