"""The privacy part of a report: what a site's ledger and receipts say of one run, and nothing beyond."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from client.account import MECHANISM
from client.charges import GAUSSIAN
from client.egress import RECEIPTS
from client.site import Site
from common.plan import RunPlan, Stage
from common.privacy.accounting import Neighbouring, epsilon
from common.privacy.budget import Histories, booked_epsilon
from common.privacy.entries import Entry, EntryType
from common.privacy.events import Event
from common.privacy.journal import LEDGER, read_lines
from common.privacy.plan import PrivacyPlan
from common.privacy.published import LAPLACE
from common.privacy.receipts import NO_MECHANISM, PUBLIC, read_receipts
from server.report.schema import PrivacyEntry, PrivacyStage


def privacy_entry(site: Site, plan: RunPlan) -> PrivacyEntry:
    """Of ``site`` in the run of ``plan``.

    Guarantee: ``guarantee`` is True only where every receipt of the run names the mechanism or public
    values, and the ledger knows of no release without noise, in this run or before.

    Raises:
        LedgerBroken, VerificationFailed: the site's records are damaged.
    """
    if not plan.privacy.asked:
        return PrivacyEntry(stages=[PrivacyStage(str(stage), NO_MECHANISM) for stage in plan.stages])
    entries = read_lines((site.folder / LEDGER).read_bytes())
    own = [entry for entry in entries if entry.run_id == plan.run_id]
    plans = _plans_of(next(entry for entry in own if entry.type is EntryType.plan))
    planned = plans[str(Stage.adapt)]
    # Epsilon of the run alone is of no use to a patient who was in a release without noise.
    bounded = bool(entries) and not any(entry.type is EntryType.export for entry in entries)
    receipts = read_receipts((site.folder / RECEIPTS).read_bytes())
    covered = all(receipt.mechanism != NO_MECHANISM for receipt in receipts)
    guarantee = bounded and covered
    return PrivacyEntry(
        unit=str(planned.unit),
        guarantee=guarantee,
        epsilon=_most(entries, plan.run_id, planned.delta) if guarantee else None,
        delta=planned.delta if guarantee else None,
        neighbouring=str(Neighbouring.add_remove),
        sampling=str(planned.sampling),
        stages=[_stage(stage, plan, plans, own) for stage in plan.stages],
        ledger_head=entries[-1].hash,
    )


def _plans_of(entry: Entry) -> dict[str, PrivacyPlan]:
    """Stage -> its noised releases."""
    return {stage: PrivacyPlan.from_json(value) for stage, value in entry.detail["plans"].items()}


def _stage(
    stage: Stage, plan: RunPlan, plans: Mapping[str, PrivacyPlan], own: Sequence[Entry]
) -> PrivacyStage:
    """What ``stage`` spent, by the entries of the run that are its own."""
    each, delta = plan.privacy.metric_epsilon, plans[str(Stage.adapt)].delta
    if stage in plans:
        kind = MECHANISM if stage is Stage.adapt else GAUSSIAN
        noise, rate = plans[stage].noise_multiplier, plans[stage].sample_rate
    elif stage is Stage.evaluate and each is not None:
        kind, noise, rate = LAPLACE, 1 / each, 1.0
    else:
        public = stage is Stage.propose or (stage is Stage.student and plan.privacy.covered)
        return PrivacyStage(str(stage), PUBLIC if public else NO_MECHANISM)
    events = [event for entry in own if entry.stage == stage for event in entry.spent()]
    return PrivacyStage(
        stage=str(stage),
        mechanism=kind,
        noise_multiplier=noise,
        sample_rate=rate,
        steps=sum(event.count for event in events),
        epsilon=_epsilon(events, delta),
    )


def _most(entries: list[Entry], run_id: str, delta: float) -> float | None:
    """Of the run, for the patients who were charged most in it: those who trained, or those who tested."""
    histories = Histories()
    for entry in entries:
        histories.apply(entry)
    groups = {histories.events(name, lambda spend: spend.run_id == run_id) for name in histories.classes}
    return max((_epsilon(events, delta) or 0.0 for events in groups), default=0.0)


def _epsilon(spent: Sequence[Event], delta: float) -> float | None:
    """Rounded up to six digits, as the ledger writes it."""
    return booked_epsilon(epsilon(spent, delta)) if spent else 0.0
