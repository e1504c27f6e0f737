"""Items 4, 18 to 20, 22 and 23: restarts, cuts, kills, two runs at once, caps, projects."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from common.errors import BudgetExceeded, DataError
from common.privacy.accounting import epsilon
from common.privacy.budget import Caps
from common.privacy.entries import Context, EntryType, LedgerBroken, Payload
from common.privacy.events import Event
from common.privacy.journal import HEAD, LEDGER
from common.privacy.ledger import Ledger
from simulations.privacy_exam.verdict import Verdict

DELTA = 1e-5
RUN = Context("run-a")
PATIENTS = [f"patient-{number}" for number in range(40)]
ROUND = [Event(2.0, 0.1, 5)]
UNNOISED = [Event(0.0, 1.0, 1)]
FORK = multiprocessing.get_context("fork")


def in_folder(work: Callable[[Path], Any]) -> Any:
    with tempfile.TemporaryDirectory() as name:
        return work(Path(name) / "site")


def item_4(rounds: int) -> Verdict:
    """A ledger opened anew before each round, against one that stays open, and the library's own sum."""

    def spent(folder: Path, anew: bool) -> float:
        ledger = Ledger.create(folder, "harbour", Caps(DELTA))
        for number in range(rounds):
            ledger = Ledger.open(folder, Caps(DELTA)) if anew else ledger
            seq = ledger.reserve(RUN, "adapt", PATIENTS, ROUND)
            ledger.commit(seq, [Payload(f"round-{number}", "0" * 64, 8)], ROUND)
        return Ledger.open(folder, Caps(DELTA)).epsilon(DELTA)

    whole, pieces = in_folder(lambda f: spent(f, False)), in_folder(lambda f: spent(f, True))
    once = epsilon(ROUND, DELTA)
    figure = f"differ by {abs(whole - pieces):.0e}; {pieces:.3f}, where one round is {once:.3f}"
    passed = abs(whole - pieces) <= 1e-12 and pieces > once * 1.2
    return Verdict("4", f"restart after each of {rounds} rounds", figure, "1e-12", passed)


def item_18(count: int) -> Verdict:
    """Cut the last entries, or put an old ledger and head back; with and without somebody who remembers."""

    def work(folder: Path) -> Verdict:
        ledger = Ledger.create(folder, "harbour", Caps(DELTA))
        old = [(ledger.head.hash, _saved(folder))]
        for _ in range(count):
            ledger.reserve(RUN, "adapt", PATIENTS, ROUND)
            old.append((ledger.head.hash, _saved(folder)))
        witness, newest = old[-1]
        refused = tried = unseen = 0
        for _, files in old[:-1]:
            cut = {LEDGER: files[LEDGER], HEAD: newest[HEAD]}  # entries deleted
            for state, witnesses in ((cut, ()), (cut, (witness,)), (files, (witness,))):
                _restore(folder, state)
                tried += 1
                refused += _refused(folder, witnesses)
            _restore(folder, files)
            unseen += not _refused(folder, ())
        figure = f"{refused} of {tried} refused; of {count} whole restores without a witness {unseen} open"
        return Verdict(
            "18", "entries cut, old files restored", figure, "all refused with a witness", refused == tried
        )

    return in_folder(work)


def _saved(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (LEDGER, HEAD)}


def _restore(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _refused(folder: Path, witnesses: tuple[str, ...]) -> bool:
    try:
        Ledger.open(folder, Caps(DELTA), witnesses)
    except LedgerBroken:
        return True
    return False


def item_19(count: int, seed: int = 0) -> Verdict:
    """A site killed at a random moment, again and again on one ledger, and started from what is there."""
    rng = random.Random(seed)

    def work(folder: Path) -> Verdict:
        Ledger.create(folder, "harbour", Caps(DELTA))
        computed = folder / "computed"
        less = 0
        for number in range(count):
            site = FORK.Process(target=_compute_rounds, args=(folder, computed, number))
            site.start()
            time.sleep(rng.uniform(0.0, 0.25))
            os.kill(site.pid or 0, signal.SIGKILL)
            site.join()
            ledger = Ledger.open(folder, Caps(DELTA))
            recorded = sum(entry.type is EntryType.reserve for entry in ledger.entries)
            less += recorded < (computed.stat().st_size if computed.exists() else 0)
            for seq in ledger.open_reservations():
                ledger.void(seq, "killed")
        done = computed.stat().st_size if computed.exists() else 0
        figure = f"less than was computed: {less} of {count}; {done} rounds computed, {recorded} recorded"
        return Verdict("19", f"kill -9 at {count} random moments", figure, "0", less == 0 and done > 0)

    return in_folder(work)


def _compute_rounds(folder: Path, computed: Path, number: int) -> None:
    """Reserve, then leave a byte for the private gradient, then commit; without end.

    Without noise, so that the time goes into files instead of accounting.
    """
    ledger = Ledger.open(folder, Caps(DELTA))
    some = [patient for index, patient in enumerate(PATIENTS) if (index + number) % 3]  # classes split too
    while True:
        seq = ledger.reserve(RUN, "adapt", some, UNNOISED)
        with computed.open("ab") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
        ledger.commit(seq, [], UNNOISED)


def item_20(count: int) -> Verdict:
    """Two runs that both ask for the last bit of the budget at the same moment."""
    alone, both = epsilon(ROUND, DELTA), epsilon(ROUND * 2, DELTA)
    caps = Caps(DELTA, total=(alone + both) / 2)

    def race(folder: Path) -> bool:
        Ledger.create(folder, "harbour", caps)
        barrier, answers = FORK.Barrier(2), FORK.SimpleQueue()
        runs: list[BaseProcess] = [
            FORK.Process(target=_ask_at_once, args=(folder, caps, name, barrier, answers)) for name in "ab"
        ]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
        outcomes = sorted(answers.get() for _ in runs)
        spent = Ledger.open(folder, caps).epsilon(DELTA)
        return outcomes == ["proceeds", "refused"] and spent <= (caps.total or 0.0)

    right = sum(in_folder(race) for _ in range(count))
    return Verdict(
        "20", "two runs at once on the last bit", f"one proceeds in {right} of {count}", "all", right == count
    )


def _ask_at_once(folder: Path, caps: Caps, name: str, barrier: Any, answers: Any) -> None:
    ledger = Ledger.open(folder, caps)
    barrier.wait()
    try:
        ledger.reserve(Context(f"run-{name}"), "adapt", PATIENTS, ROUND)
        answers.put("proceeds")
    except BudgetExceeded:
        answers.put("refused")


def item_22(cap: float) -> Verdict:
    """Rounds until the cap says no; nothing is reserved, and so nothing sent, after that."""

    def work(folder: Path) -> Verdict:
        caps = Caps(DELTA, total=cap)
        ledger = Ledger.create(folder, "harbour", caps)
        affordable = next(n for n in range(1, 1000) if epsilon(ROUND * (n + 1), DELTA) > cap)
        sent = after = 0
        for _ in range(affordable + 3):
            try:
                seq = ledger.reserve(RUN, "adapt", PATIENTS, ROUND)
            except BudgetExceeded:
                continue
            ledger.commit(seq, [Payload("adapter", "0" * 64, 8)], ROUND)
            sent += 1
            after += sent > affordable
        spent = ledger.epsilon(DELTA)
        figure = f"{sent} rounds of {affordable} affordable, epsilon {spent:.3f}; {after} sent after"
        passed = spent <= cap and sent == affordable and after == 0
        return Verdict("22", f"cap {cap:g} in the middle of a run", figure, "at most the cap; 0", passed)

    return in_folder(work)


def item_23() -> Verdict:
    """Two projects on overlapping cohorts, then two ids that turn out to be one person."""

    def work(folder: Path) -> Verdict:
        ledger = Ledger.create(folder, "harbour", Caps(DELTA))
        first, second = Event(3.0, 0.2, 10), Event(2.0, 0.1, 10)
        ledger.reserve(Context("a"), "adapt", PATIENTS[:30], [first])
        ledger.reserve(Context("b"), "adapt", PATIENTS[30:], [second])
        apart = ledger.epsilon(DELTA)
        disjoint = abs(apart - max(epsilon([first], DELTA), epsilon([second], DELTA)))
        ledger.reserve(Context("c"), "adapt", PATIENTS[20:], [second])
        overlap = abs(ledger.epsilon(DELTA) - epsilon([first, second], DELTA))
        ledger.merge(PATIENTS[0], PATIENTS[35])  # one had a; the other b and c
        merged = abs(ledger.epsilon(DELTA) - epsilon([first, second, second], DELTA))
        ledger.merge(PATIENTS[21], PATIENTS[22])  # both had a and c
        group = epsilon([first.of_group(2), second.of_group(2)], DELTA)
        grouped = abs(Ledger.open(folder, Caps(DELTA)).epsilon(DELTA) - group)
        try:
            ledger.reserve(Context("d"), "adapt", PATIENTS[20:24], [second])
            twice = False
        except DataError:
            twice = True
        worst = max(disjoint, overlap, merged, grouped) / group
        figure = f"off by {worst:.0e}; epsilon apart {apart:.2f}, a merged person {group:.2f}"
        return Verdict("23", "patients in two projects, merged ids", figure, "1e-3", worst <= 1e-3 and twice)

    return in_folder(work)
