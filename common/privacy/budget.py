"""Who has spent what: the ledger's entries replayed into classes of patients, and the caps on them.

Every patient belongs to one class, all of whose patients went through the same releases. The most-used class
decides. Ledger and verifier replay with this same code, from the entries alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from common.privacy.accounting import quick_epsilon
from common.privacy.entries import SPENDING, Cohort, Entry, EntryType, LedgerBroken
from common.privacy.events import Event, gathered

YEAR = timedelta(days=365)


@dataclass(frozen=True)
class Spend:
    """What one entry charged."""

    run_id: str
    time: datetime
    events: tuple[Event, ...]


@dataclass
class PatientClass:
    """Persons of one history.

    Attributes:
        patients: how many.
        shares: spending entry -> how many of its records each person was: 1, unless two were one person.
    """

    patients: int
    shares: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Caps:
    """Most that any patient may spend, at ``delta``. None: no cap of that kind."""

    delta: float
    total: float | None = None
    per_run: float | None = None
    per_year: float | None = None


class Histories:
    """The classes after some entries. Copy before trying something out."""

    def __init__(self) -> None:
        self.classes: dict[str, PatientClass] = {}
        self.spends: dict[int, Spend] = {}

    def copy(self) -> Histories:
        other = Histories()
        other.classes = {name: PatientClass(c.patients, dict(c.shares)) for name, c in self.classes.items()}
        other.spends = dict(self.spends)
        return other

    def apply(self, entry: Entry) -> None:
        """Raises ``LedgerBroken`` if the entry's classes do not add up."""
        self.regroup(entry.cohort, entry.seq)
        if entry.type in SPENDING:
            self.charge(
                entry.seq, Spend(entry.run_id, entry.time, tuple(entry.spent())), entry.cohort.classes
            )

    def regroup(self, cohort: Cohort, seq: int) -> None:
        for name, parents in cohort.parents.items():
            size = cohort.classes.get(name, 0)
            if name in self.classes or size < 1 or not all(parent in self.classes for parent in parents):
                raise LedgerBroken(f"entry {seq}: its classes of patients do not follow from those before")
            shares: dict[int, int] = {}
            for parent in parents:
                self.classes[parent].patients -= size
                for number, share in self.classes[parent].shares.items():
                    shares[number] = shares.get(number, 0) + share
            self.classes[name] = PatientClass(size, shares)
        wrong = [
            n for n, size in cohort.classes.items() if self.classes.get(n, PatientClass(-1)).patients != size
        ]
        if wrong or any(group.patients < 0 for group in self.classes.values()):
            raise LedgerBroken(f"entry {seq}: its numbers of patients do not follow from those before")

    def charge(self, seq: int, spend: Spend, classes: Iterable[str]) -> None:
        self.spends[seq] = spend
        for name in classes:
            self.classes[name].shares[seq] = 1

    def events(self, name: str, counts: Callable[[Spend], bool] = lambda _: True) -> tuple[Event, ...]:
        """Everything that patients of class ``name`` went through, where ``counts`` says yes."""
        return gathered(
            event.of_group(share)
            for seq, share in self.classes[name].shares.items()
            if counts(self.spends[seq])
            for event in self.spends[seq].events
        )

    def most(self, delta: float) -> float:
        """Epsilon of the most-used class."""
        return spent_epsilon(self.most_used(delta), delta)

    def most_used(self, delta: float) -> tuple[Event, ...]:
        """What the most-used class went through; empty if nobody spent anything."""
        live = {self.events(name) for name, group in self.classes.items() if group.patients}
        return max(live, key=lambda events: spent_epsilon(events, delta), default=())

    def over(self, caps: Caps, classes: Iterable[str], run_id: str, now: datetime) -> str | None:
        """The first cap that one of ``classes`` has passed, by the policy's name for it, or None."""
        asked = list(classes)
        limits: list[tuple[str, float | None, Callable[[Spend], bool]]] = [
            ("max_epsilon_total", caps.total, lambda _: True),
            ("max_epsilon_per_run", caps.per_run, lambda spend: spend.run_id == run_id),
            ("max_epsilon_per_year", caps.per_year, lambda spend: spend.time > now - YEAR),
        ]
        for name, limit, counts in limits:
            spent = {self.events(group, counts) for group in asked} if limit is not None else set()
            if any(spent_epsilon(events, caps.delta) > (limit or 0.0) for events in spent):
                return name
        return None


def spent_epsilon(events: tuple[Event, ...], delta: float) -> float:
    return quick_epsilon(events, delta) if events else 0.0


def booked_epsilon(value: float) -> float | None:
    """``value`` as it is written: rounded up to six digits, None if there is no guarantee."""
    return None if math.isinf(value) else math.ceil(value * 1e6) / 1e6


def settled(entries: Iterable[Entry]) -> set[int]:
    """Sequence numbers of the reservations that a COMMIT or VOID_COUNTED has closed."""
    closing = (EntryType.commit, EntryType.void_counted)
    return {int(entry.detail["settles"]) for entry in entries if entry.type in closing}
