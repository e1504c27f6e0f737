"""A site's mechanism, ready for the run's next round: crops, their finished features, the probed gradient.

In a private run a round is one step, and what a step needs is the same in every round but for the trained
tensors: making it anew would cost more than the step. It is kept in this process alone, within a limit of
memory, and let go with the frozen prefix when the site has its student.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from client.dp.mechanism import PrivateGradient

KEPT_BYTES = 1 << 30  # of all sites of this process together: a simulation may have many

mechanisms_made = 0  # of this process: tests assert that it is one a site and run


@dataclass(frozen=True)
class _Kept:
    name: str
    made_for: tuple[object, ...]
    mechanism: PrivateGradient
    bytes: int


_kept: dict[Path, _Kept] = {}  # a site's folder -> its bench, the least recently used first


@dataclass(frozen=True)
class Bench:
    """Where the mechanism of one site waits between rounds.

    Guarantees: a mechanism is used again only for the same ``name`` and the very same objects, and only for
    the step that comes next in it; one that failed is not used again.

    Attributes:
        folder: the site's own; None keeps nothing.
        name: of the run, and of whatever else decides its features.
        made_for: what the mechanism reads and trains; compared by identity.
    """

    folder: Path | None
    name: str
    made_for: tuple[object, ...]

    @contextmanager
    def mechanism(
        self, step: int, make: Callable[[], tuple[PrivateGradient, int]]
    ) -> Iterator[PrivateGradient]:
        """The mechanism whose next step is ``step``: the kept one, or what ``make`` gives.

        Args:
            make: the mechanism and the bytes that it holds.
        """
        global mechanisms_made
        kept = None if self.folder is None else _kept.pop(self.folder, None)
        if kept is None or not self._fits(kept, step):
            mechanism, size = make()
            mechanisms_made += 1
            kept = _Kept(self.name, self.made_for, mechanism, size)
        yield kept.mechanism
        if self.folder is not None:
            _keep(self.folder, kept)

    def _fits(self, kept: _Kept, step: int) -> bool:
        same = len(kept.made_for) == len(self.made_for) and all(
            one is other for one, other in zip(kept.made_for, self.made_for, strict=True)
        )
        return same and kept.name == self.name and kept.mechanism.steps_taken == step


def forget(folder: Path) -> None:
    """Let go of what the site in ``folder`` keeps."""
    _kept.pop(folder, None)


def _keep(folder: Path, kept: _Kept) -> None:
    if kept.bytes > KEPT_BYTES:
        return
    while _kept and sum(one.bytes for one in _kept.values()) + kept.bytes > KEPT_BYTES:
        del _kept[next(iter(_kept))]
    _kept[folder] = kept
