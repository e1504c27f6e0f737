"""What the run cost and what that means: every figure of the page that comes from privacy accounting.

Each composition is made once: what-ifs and curves use the coarse grid, which is still an upper bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from common.errors import ConfigError
from common.privacy.accounting import (
    COARSE_INTERVAL,
    Neighbouring,
    epsilon,
    image_level,
    quick_epsilon,
    rdp_epsilon,
    shuffled,
)
from common.privacy.attacker import FALSE_POSITIVE_RATES, crude_rate, true_positive_rates
from common.privacy.budget import Histories, Spend, spent_epsilon
from common.privacy.entries import Entry
from common.privacy.events import Event, Mechanism, gathered
from common.privacy.planner import band
from common.privacy.report.record import SiteRecord
from common.privacy.report.rounding import per_hundred, upper, upper_rate

CURVE_RATES = tuple(10 ** (-3 + 3 * index / 30) for index in range(31))  # false positives, 0.001 to 1
PLANNED_POINTS = 8  # of the plan's curve by step
IMAGES_ASKED = 2  # of a patient, at least, in the what-if of clipping images


@dataclass(frozen=True)
class Spending:
    """What the most-used patients went through, as events.

    Attributes:
        run: in the run alone.
        before: in everything before the run's first entry.
        total: in the whole ledger.
        classes: patients and what they went through, one a class.
    """

    run: tuple[Event, ...]
    before: tuple[Event, ...]
    total: tuple[Event, ...]
    classes: tuple[tuple[int, tuple[Event, ...]], ...]


def spending(record: SiteRecord, delta: float) -> Spending:
    """Replay the ledger up to the run and to its end."""
    start = record.own[0].seq if record.own else len(record.entries)
    before, whole = _replayed(record.entries[:start]), _replayed(record.entries)
    live = [(name, group.patients) for name, group in whole.classes.items() if group.patients]
    return Spending(
        run=_most(whole, delta, lambda spend: spend.run_id == record.run_id),
        before=before.most_used(delta),
        total=whole.most_used(delta),
        classes=tuple((patients, whole.events(name)) for name, patients in live),
    )


def _replayed(entries: Iterable[Entry]) -> Histories:
    histories = Histories()
    for entry in entries:
        histories.apply(entry)
    return histories


def _most(histories: Histories, delta: float, counts: Callable[[Spend], bool]) -> tuple[Event, ...]:
    live = {histories.events(name, counts) for name, group in histories.classes.items() if group.patients}
    return max(live, key=lambda events: spent_epsilon(events, delta), default=())


@lru_cache(maxsize=32)
def bound(events: tuple[Event, ...], delta: float) -> float | None:
    """Epsilon on the fine grid, rounded up to three decimals; None: no guarantee."""
    return upper(epsilon(events, delta)) if events else 0.0


@lru_cache(maxsize=128)
def _quick(events: tuple[Event, ...], delta: float) -> float | None:
    return upper(quick_epsilon(events, delta)) if events else 0.0


def epsilons(spent: Spending, deltas: Sequence[float]) -> list[dict[str, Any]]:
    """Of the run and of everything, at each delta."""
    return [
        {"delta": delta, "run": bound(spent.run, delta), "total": bound(spent.total, delta)}
        for delta in deltas
    ]


def what_ifs(
    events: tuple[Event, ...], images_per_patient: int, deltas: Sequence[float]
) -> list[dict[str, Any]]:
    """The same noise under other readings, at each delta; None where it is not known or not bounded."""
    images = max(IMAGES_ASKED, images_per_patient)
    shuffles = gathered(map(_shuffled, events))
    readings: dict[str, Callable[[float], float | None]] = {
        "as it was: patient, add or remove one, Poisson sampling": lambda delta: bound(events, delta),
        "two data sets that differ in one replaced patient": lambda delta: _replaced(events, delta),
        "batches from a shuffled list: no amplification is charged": lambda delta: _quick(shuffles, delta),
        f"{images} images of a patient, each drawn and clipped for itself": lambda delta: _by_image(
            events, images, delta
        ),
        "by Renyi accounting (RDP), the bracket above": lambda delta: _renyi(events, delta),
    }
    return [
        {"reading": name, "epsilons": [figure(delta) for delta in deltas]}
        for name, figure in readings.items()
    ]


def _shuffled(event: Event) -> Event:
    return event if event.mechanism is Mechanism.laplace else shuffled(event)


@lru_cache(maxsize=32)
def _replaced(events: tuple[Event, ...], delta: float) -> float | None:
    try:
        return upper(epsilon(events, delta, Neighbouring.replace_one, COARSE_INTERVAL))
    except ConfigError:
        return None


@lru_cache(maxsize=32)
def _by_image(events: tuple[Event, ...], images: int, delta: float) -> float | None:
    several = gathered(image_level(event, images) for event in events)
    return upper(epsilon(several, delta, interval=COARSE_INTERVAL))


def _renyi(events: tuple[Event, ...], delta: float) -> float | None:
    found = rdp_epsilon(events, delta)
    return None if found is None else upper(found)


@lru_cache(maxsize=32)
def _ceiling(events: tuple[Event, ...], rates: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(upper_rate(rate) for rate in true_positive_rates(events, rates))


def odds(events: tuple[Event, ...], delta: float) -> list[dict[str, Any]]:
    """Most of the patients who took part that an attacker can name, for those wrongly named. Rounded up."""
    figure = bound(events, delta)
    rows = []
    for wrong, found in zip(FALSE_POSITIVE_RATES, _ceiling(events, FALSE_POSITIVE_RATES), strict=True):
        crude = upper_rate(crude_rate(float("inf") if figure is None else figure, delta, wrong))
        rows.append(
            {
                "wrongly_named_per_100": per_hundred(wrong),
                "found_per_100": per_hundred(found),
                "crude_per_100": per_hundred(crude),
            }
        )
    return rows


def roc(events: tuple[Event, ...], delta: float) -> dict[str, list[list[float]]]:
    """Points of the ceiling, of the crude bound and of guessing: [false positives, true positives]."""
    figure = bound(events, delta)
    crude = [crude_rate(float("inf") if figure is None else figure, delta, rate) for rate in CURVE_RATES]
    return {
        "ceiling": _points(_ceiling(events, CURVE_RATES)),
        "crude": _points([upper_rate(rate) for rate in crude]),
    }


def _points(rates: Sequence[float]) -> list[list[float]]:
    return [[round(x, 6), y] for x, y in zip(CURVE_RATES, rates, strict=True)]


def stages(record: SiteRecord, spent: Spending, delta: float) -> list[dict[str, Any]]:
    """What each stage added to the joint figure, in their order: epsilons do not add, events compose."""
    events: dict[str, list[Event]] = {}
    for entry in record.own:
        if entry.spent():
            events.setdefault(entry.stage, []).extend(entry.spent())
    so_far = list(spent.before)
    parts = [("before this run", gathered(spent.before))] if spent.before else []
    found, last = [], 0.0
    for stage, own in [*parts, *((stage, gathered(group)) for stage, group in events.items())]:
        so_far += own if stage in events else []
        joint = bound(gathered(so_far), delta)
        added = None if joint is None else max(0.0, round(joint - last, 3))
        found.append({"stage": stage, "alone": bound(own, delta), "joint": joint, "added": added})
        last = joint or last
    return found


def by_step(record: SiteRecord, spent: Spending, delta: float) -> dict[str, list[list[float]]]:
    """[steps, epsilon after them] as planned, recomputed here, and as the ledger booked it."""
    plan = record.terms
    assert plan is not None
    before = [0, _quick(gathered(spent.before), delta)]
    marks = {max(1, round(plan.steps * number / PLANNED_POINTS)) for number in range(1, PLANNED_POINTS + 1)}
    planned = [[step, _quick(gathered([plan.event(step), *spent.before]), delta)] for step in sorted(marks)]
    booked, steps = [], 0
    for entry in record.own:
        steps += sum(event.count for event in entry.spent()) if entry.stage == plan.stage else 0
        figure = entry.epsilon_after.get(f"{delta:g}")
        if entry.spent() and figure is not None:
            booked.append([steps, upper(figure)])
    return {"planned": _known([before, *planned]), "booked": _known([before, *booked])}


def _known(points: Sequence[Sequence[float | None]]) -> list[list[float]]:
    return [[x, y] for x, y in points if x is not None and y is not None]


def histogram(spent: Spending, delta: float) -> list[dict[str, Any]]:
    """Patients by what they have spent over all projects, least first; None: no guarantee."""
    counts: dict[float | None, int] = {}
    for patients, events in spent.classes:
        figure = _quick(gathered(events), delta)
        counts[figure] = counts.get(figure, 0) + patients
    ordered = sorted(counts.items(), key=lambda item: float("inf") if item[0] is None else item[0])
    return [{"patients": patients, "epsilon": figure} for figure, patients in ordered]


def worded(figure: float | None) -> str:
    """The customary band of an epsilon."""
    return "NO GUARANTEE" if figure is None else band(figure)
