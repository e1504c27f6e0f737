"""The ledger of one site: what was released about its patients, across runs and projects.

Order of things: a reservation is on the disk before the first private gradient, a commit after the payload
left. What was reserved is spent, whatever happened then; there is no way to unspend. Each change happens
under a file lock, on the entries as they are on the disk, so runs side by side cannot share the last bit
of a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from types import MappingProxyType
from typing import Any

from common.canonical import sha256_of
from common.errors import ArtefactError, BudgetExceeded, PolicyRefusal
from common.privacy.budget import Caps, Histories, Spend, booked_epsilon, settled
from common.privacy.entries import (
    NO_ENTRY,
    SPENDING,
    Cohort,
    Context,
    Entry,
    EntryType,
    LedgerBroken,
    Payload,
    sealed,
)
from common.privacy.events import Event, gathered
from common.privacy.heads import SignedHead
from common.privacy.journal import LEDGER, Head, Journal
from common.privacy.keys import NEXT_KEY, SiteKeys, create_key, public_key, sign
from common.privacy.members import Members, Moves
from common.privacy.witness import ROLLED_BACK, chain_keys, heads_of, witness_faults

RECEIPTS = "receipts.jsonl"
NONCE_BYTES = 16  # in every entry: its hash travels, and without them its few secrets could be tried out
REPORTED_DELTAS = (1e-3, 1e-5)
_NOWHERE, _NOBODY, _NOTHING = Context(), Cohort(), MappingProxyType[str, Any]({})
_RECORDS = (EntryType.policy, EntryType.plan, EntryType.refuse, EntryType.audit, EntryType.checkpoint)


def system_clock() -> datetime:
    return datetime.now(UTC)


class Ledger:
    """Append-only, hash-chained, signed.

    Guarantees: `reserve` returns only when the reservation is on the disk and no patient passes a cap; the
    recorded spend is never below the true one, wherever the process is killed; a change, a cut below the
    local head or below a witnessed one, another key and a clock that runs backwards are refused.
    """

    def __init__(
        self, folder: Path, keys: SiteKeys, caps: Caps, clock: Callable[[], datetime] = system_clock
    ) -> None:
        self.folder, self.caps, self._clock = folder, caps, clock
        self.histories = Histories()
        self._members = Members(folder, keys.secret)
        self._journal = Journal(folder, keys, self._replay)

    @classmethod
    def create(
        cls, folder: Path, site: str, caps: Caps, clock: Callable[[], datetime] = system_clock
    ) -> Ledger:
        """A new ledger, with the site's keys or new ones. Raises ``ArtefactError`` if there is a ledger."""
        if (folder / LEDGER).exists():
            raise ArtefactError(f"{folder / LEDGER} exists: a ledger is never started again")
        folder.mkdir(parents=True, exist_ok=True)
        ledger = cls(folder, SiteKeys.open_or_create(folder), caps, clock)
        with ledger._journal.locked():
            detail = {"site": site, "public_key": ledger._journal.keys.public}
            ledger._append(EntryType.genesis, rest={"detail": detail})
        return ledger

    @classmethod
    def open(
        cls,
        folder: Path,
        caps: Caps,
        witnesses: Iterable[str] = (),
        clock: Callable[[], datetime] = system_clock,
    ) -> Ledger:
        """The ledger in ``folder``, checked from its first entry on.

        Args:
            witnesses: head hashes that others have seen; each must be in the chain. Without one, a ledger
                that was rolled back together with its head file looks whole.

        Raises:
            LedgerBroken: if it does not hold.
            ArtefactError: if there is none, or a key is missing.
        """
        if not (folder / LEDGER).exists():
            raise ArtefactError(
                f"there is no ledger in {folder}: start one with `wardround privacy ledger new`"
            )
        ledger = cls(folder, SiteKeys.open(folder), caps, clock)
        with ledger._journal.locked():
            ledger._journal.load()
        missing = set(witnesses) - {entry.hash for entry in ledger.entries}
        if missing:
            raise LedgerBroken(ROLLED_BACK)
        return ledger

    def refresh(self, caps: Caps) -> None:
        """Go on with ``caps``, and with the entries as they are on the disk now.

        What was checked before is compared byte for byte, what was appended since is checked.

        Raises:
            LedgerBroken: if it does not hold, or is another than it was.
        """
        self.caps = caps
        with self._journal.locked():
            self._journal.load()

    def check_witnessed(self, site: str, heads: Iterable[SignedHead]) -> None:
        """Every head of this ledger, or of ``site`` by whatever key, is in the chain; others are passed over.

        Args:
            heads: whose signatures hold.

        Raises:
            LedgerBroken: one is not: the ledger was cut, rolled back or exchanged.
        """
        own = heads_of(site, chain_keys(self.entries), heads)
        if faults := witness_faults(self.entries, own):
            raise LedgerBroken("; ".join(faults))

    def signed_head(self, site: str) -> SignedHead:
        """The newest entry, for others to keep."""
        return SignedHead.sign(site, (self.head.seq, self.head.hash), self._journal.keys.signer)

    @property
    def entries(self) -> list[Entry]:
        return self._journal.entries

    @property
    def head(self) -> Head:
        return self._journal.head

    def reserve(self, context: Context, stage: str, patients: Iterable[str], events: Sequence[Event]) -> int:
        """Spend ``events`` for each of ``patients``, before anything is computed; returns the entry's number.

        Raises:
            BudgetExceeded: if a patient would pass a cap; the refusal is on record, nothing is spent.
            DataError: if two of the ids are one person.
            PolicyRefusal: field ``clock``, if time has gone back.
        """
        return self._spend(EntryType.reserve, context, stage, patients, events)

    def charge_metric(
        self, context: Context, stage: str, patients: Iterable[str], events: Sequence[Event]
    ) -> int:
        """Spend Laplace releases of numbers, like `reserve`.

        Its commit says what left, and no step; the same numbers may leave again, by a commit of their own.
        """
        return self._spend(EntryType.metric, context, stage, patients, events)

    def declare_unprotected(
        self, context: Context, stage: str, patients: Iterable[str], payload: Sequence[Payload] = ()
    ) -> int:
        """Record that ``payload`` was released without noise: no guarantee for these patients, ever."""
        with self._transaction():
            cohort, moves = self._members.split(self._members.persons(patients), self._sizes())
            return self._append(
                EntryType.export, context, stage, cohort=self._written(cohort, moves),
                events=[Event(0.0, 1.0, 1)], rest={"payload": list(payload)},
            ).seq  # fmt: skip

    def commit(self, reservation: int, payload: Sequence[Payload], executed: Sequence[Event]) -> int:
        """Record what left under ``reservation`` and which of its steps ran.

        Raises ``ArtefactError`` if it is no open reservation or more ran than was reserved.
        """
        with self._transaction():
            reserved = self._open_reservation(reservation)
            if not covers(reserved.listed(), executed):
                raise ArtefactError(f"more steps ran than entry {reservation} of the ledger reserved")
            return self._settle(EntryType.commit, reserved, {"payload": list(payload)}, executed)

    def void(self, reservation: int, reason: str) -> int:
        """Record that nothing left under ``reservation``. It stays spent."""
        with self._transaction():
            reserved = self._open_reservation(reservation)
            return self._settle(EntryType.void_counted, reserved, {"detail": {"reason": reason}}, ())

    def charged(self, seq: int, patients: Iterable[str]) -> frozenset[str]:
        """Those of ``patients`` whom entry ``seq`` has charged, as the ledger knows them now."""
        return frozenset(
            patient
            for patient in patients
            if (name := self._members.class_of(patient)) and seq in self.histories.classes[name].shares
        )

    def open_reservations(self) -> list[int]:
        """Reservations that neither left nor were given up: those of a crash. They count."""
        closed = settled(self.entries)
        return [e.seq for e in self.entries if e.type is EntryType.reserve and e.seq not in closed]

    def record(self, kind: EntryType, context: Context, detail: dict[str, Any], stage: str = "") -> int:
        """An entry that spends nothing: POLICY, PLAN, REFUSE, AUDIT, CHECKPOINT."""
        if kind not in _RECORDS:
            raise ValueError(f"{kind} has a method of its own")
        with self._transaction():
            return self._append(kind, context, stage, rest={"detail": detail}).seq

    def merge(self, kept: str, other: str) -> int:
        """Two patient ids are one person, whose budget is what both have spent. Raises ``DataError``.

        Where both were in one release, the person is charged as a group of two records.
        """
        with self._transaction():
            cohort, moves = self._members.join(kept, other, self._sizes())
            return self._append(EntryType.merge, cohort=self._written(cohort, moves)).seq

    def roll_key(self) -> int:
        """Go on with a new signing key, announced by the old one."""
        with self._transaction():
            following = self.folder / NEXT_KEY
            following.unlink(missing_ok=True)
            new = create_key(following)
            detail = {"public_key": public_key(new), "proof": sign(new, self.head.hash)}
            entry = self._append(EntryType.keyroll, rest={"detail": detail})
            self._journal.take_next_key()
            return entry.seq

    def epsilon(self, delta: float) -> float:
        """Of the patients who have spent most, over everything."""
        return self.histories.most(delta)

    def most_used(self) -> tuple[Event, ...]:
        """What the patients who have spent most went through."""
        return self.histories.most_used(self.caps.delta)

    def _spend(
        self, kind: EntryType, context: Context, stage: str, patients: Iterable[str], events: Sequence[Event]
    ) -> int:
        with self._transaction() as now:
            cohort, moves = self._members.split(self._members.persons(patients), self._sizes())
            trial = self.histories.copy()
            trial.regroup(cohort, len(self.entries))
            trial.charge(len(self.entries), Spend(context.run_id, now, tuple(events)), cohort.classes)
            passed = trial.over(self.caps, cohort.classes, context.run_id, now)
            if passed is None:
                written = self._written(cohort, moves)
                return self._append(kind, context, stage, cohort=written, events=events).seq
            refusal = {"code": BudgetExceeded.border_code, "field": passed}
            self._append(EntryType.refuse, context, stage, rest={"detail": refusal})
        raise BudgetExceeded(
            f"stage {stage} would pass {passed} of this site's policy: ask for more noise or fewer steps, "
            "leave out the patients who have spent most, or sign a new policy"
        )

    @contextmanager
    def _transaction(self) -> Iterator[datetime]:
        """Alone with the newest entries, at a time that is not before the last of them."""
        with self._journal.locked():
            self._journal.load()
            now = self._clock()
            if now < self.entries[-1].time:
                raise PolicyRefusal(
                    "this machine's clock is behind the ledger's last entry: set it right", field="clock"
                )
            yield now

    def _append(
        self,
        kind: EntryType,
        context: Context = _NOWHERE,
        stage: str = "",
        cohort: Cohort = _NOBODY,
        events: Sequence[Event] = (),
        rest: Mapping[str, Any] = _NOTHING,
    ) -> Entry:
        """Seal and write an entry whose further fields are in ``rest``."""
        entry = Entry(
            seq=len(self.entries),
            prev=self.head.hash or NO_ENTRY,
            ts=self._now().isoformat(timespec="microseconds"),
            type=kind,
            **vars(context),
            cohort=cohort,
            events=[event.triple() for event in events],
            stage=stage,
            payload=rest.get("payload", []),
            epsilon_after={},
            detail={**rest.get("detail", {}), **receipts_anchor(self.folder), **_nonce()},
        )
        entry = sealed(replace(entry, epsilon_after=self._after(entry)), self._journal.keys.signer)
        self._journal.append(entry)
        return entry

    def _after(self, entry: Entry) -> dict[str, float | None]:
        """Epsilon with ``entry`` in the ledger, at each of the deltas."""
        named, last = [f"{delta:g}" for delta in self._deltas()], self.entries[-1:]
        changes = entry.cohort.classes or entry.cohort.parents or entry.type in SPENDING
        if last and not changes and set(last[0].epsilon_after) == set(named):
            return last[0].epsilon_after  # of the same histories
        trial = self.histories.copy()
        trial.apply(entry)
        return {name: booked_epsilon(trial.most(float(name))) for name in named}

    def _now(self) -> datetime:
        """Never before the last entry, whatever the clock does within a transaction."""
        return max([self._clock(), *(entry.time for entry in self.entries[-1:])])

    def _deltas(self) -> list[float]:
        return sorted({*REPORTED_DELTAS, self.caps.delta})

    def _replay(self, entry: Entry) -> None:
        self._members.follow(entry.cohort.members)
        self.histories.apply(entry)

    def _sizes(self) -> dict[str, int]:
        return {name: group.patients for name, group in self.histories.classes.items()}

    def _written(self, cohort: Cohort, moves: Moves) -> Cohort:
        return replace(cohort, members=self._members.write(moves))

    def _open_reservation(self, seq: int) -> Entry:
        charged = 0 <= seq < len(self.entries) and self.entries[seq].type is EntryType.metric
        if not charged and seq not in self.open_reservations():
            raise ArtefactError(f"entry {seq} of the ledger is no open reservation")
        return self.entries[seq]

    def _settle(
        self, kind: EntryType, reserved: Entry, rest: Mapping[str, Any], executed: Sequence[Event]
    ) -> int:
        context = Context(reserved.run_id, reserved.plan_sha256, reserved.policy_sha256, reserved.code_sha256)
        detail = {**rest.get("detail", {}), "settles": reserved.seq}
        entry = self._append(kind, context, reserved.stage, events=executed, rest={**rest, "detail": detail})
        return entry.seq


def _nonce() -> dict[str, str]:
    return {"nonce": token_hex(NONCE_BYTES)}


def receipts_anchor(folder: Path) -> dict[str, Any]:
    """Length and digest of the receipts so far, so that the ledger vouches for them too."""
    path = folder / RECEIPTS
    if not path.exists():
        return {}
    data = path.read_bytes()
    return {"receipts": {"bytes": len(data), "sha256": sha256_of(data)}}


def covers(reserved: Sequence[Event], executed: Sequence[Event]) -> bool:
    """Whether ``executed`` is no more than ``reserved``, kind by kind."""
    room = {replace(event, count=1): event.count for event in gathered(reserved)}
    return all(event.count <= room.get(replace(event, count=1), 0) for event in gathered(executed))
