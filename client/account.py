"""A site's privacy account in one run: agreed before data are opened, booked before a gradient is taken.

The ledger (`common.privacy.ledger`) is the site's, over all runs; this module says what of a run goes into
it. What left with noise is a reservation and its commit, what left without is an EXPORT that no later entry
takes back, and every receipt is vouched for by the entry after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from client.charges import MetricCharge, Reservation, StyleCharge
from client.consent import asked_of, signed_policy
from client.dp.dress_rehearsal import installed_code, rehearse
from client.patients import Patient
from client.site import Site
from common.errors import ArtefactError, BudgetExceeded, PolicyRefusal, WardroundError
from common.plan import RunPlan, Stage
from common.privacy.accounting import quick_epsilon
from common.privacy.audits import REHEARSAL, lately_rehearsed, save_audit
from common.privacy.budget import Caps, booked_epsilon
from common.privacy.entries import Context, Entry, EntryType, LedgerBroken
from common.privacy.heads import SignedHead
from common.privacy.ledger import Ledger, system_clock
from common.privacy.plan import PlanSettings, PrivacyPlan, calibrate, one_release
from common.privacy.published import PublishedMetrics
from common.privacy.terms import agree, check_in_force, policy_record
from common.recipe import PrivacyConfig

MECHANISM = "dp_sgd"  # on receipts and updates: made by noised steps alone
STAGE = str(Stage.adapt)  # the one whose steps are noised
MEASURED = str(Stage.evaluate)  # the one whose numbers are
STYLED = str(Stage.style)  # the one whose sums over all patients are


@lru_cache(maxsize=64)
def privacy_plan(asked: PrivacyConfig, patients: int) -> PrivacyPlan:
    """The noised steps of a whole run at a site that declares ``patients``.

    What epsilon the run has is theirs and the style summary's together, where that is noised.

    Raises ``ConfigError`` listing every fault.
    """
    settings, styled = _settings(asked, patients), style_plan(asked, patients)
    if asked.noise_multiplier is not None:
        return PrivacyPlan.make(settings, asked.noise_multiplier)
    assert asked.epsilon is not None, "no noise is asked for"
    return calibrate(settings, asked.epsilon, [] if styled is None else [styled.event()])


@lru_cache(maxsize=64)
def style_plan(asked: PrivacyConfig, patients: int) -> PrivacyPlan | None:
    """The one noised sum that a site's style summary is made of; None: a style leaves as it is, or none does.

    Raises ``ConfigError`` listing every fault.
    """
    if not asked.asked or asked.style_epsilon is None:
        return None
    return one_release(STYLED, asked.style_epsilon, _settings(asked, patients))


def _settings(asked: PrivacyConfig, patients: int) -> PlanSettings:
    return PlanSettings(
        patients=patients,
        sample_rate=asked.sample_rate,
        steps=asked.steps + asked.spare_steps,
        delta=asked.delta,
        max_grad_norm=asked.max_grad_norm,
        max_images_per_patient=asked.max_images_per_patient,
        stage=STAGE,
    )


def published_metrics(plan: RunPlan, site: Site) -> PublishedMetrics | None:
    """The numbers of ``plan`` that leave with noise: the teacher's mean Dice, one a class; None: none does.

    Raises ``PolicyRefusal``: the site declares no test patients, or fewer than its own smallest cell.
    """
    each = plan.privacy.metric_epsilon
    if not plan.privacy.asked or each is None or Stage.evaluate not in plan.stages:
        return None
    if site.declared_test is None:
        raise PolicyRefusal(
            "a metric with noise is divided by a public number: write test_patients into site.yaml",
            field="test_patients",
        )
    if site.declared_test < site.policy.min_cell_patients:
        raise PolicyRefusal("fewer test patients are declared than a metric may be of", "min_cell_patients")
    return PublishedMetrics(each, len(plan.data.classes), site.declared_test)


class OpenLedger:
    """The ledger of the site in ``folder``, open from one order to the next: only what is new is checked.

    Guarantee: what this process has seen must stay. A ledger that was put back to an older state is refused
    until the guard is started again, whatever else would hold of it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ledger: Ledger | None = None

    def read(self, caps: Caps) -> Ledger:
        """As it is on the disk now. Raises what `Ledger.open` raises."""
        if self._ledger is None:
            self._ledger = Ledger.open(self._folder, caps)
        else:
            self._ledger.refresh(caps)
        return self._ledger


class Account:
    """What one plan costs at one site.

    Guarantees: a site with a signed policy takes part in nothing that the policy does not allow; a private
    plan is worked on only beside a whole ledger; neither opens a data file to find out.

    Args:
        ledger: the site's, if its guard has it open.

    Attributes:
        policy: the site's signed one, if it has one.
        terms: of the plan's noised steps; None: it asks for none.
        styled: of the site's style summary; None: it leaves without noise, or none does.
        published: what of the plan's metrics leaves with noise; None: none does.

    Raises:
        PolicyRefusal: the policy is not the officer's, or the site declares no patients, or too few.
        ConfigError: the plan's settings are no privacy plan.
    """

    def __init__(self, site: Site, plan: RunPlan, ledger: OpenLedger | None = None) -> None:
        self._site, self._plan = site, plan
        self._kept = ledger or OpenLedger(site.folder)
        self._opened: Ledger | None = None
        self.policy = signed_policy(site)
        self.terms: PrivacyPlan | None = None
        self.styled: PrivacyPlan | None = None
        if plan.privacy.asked:
            if site.declared is None:
                raise PolicyRefusal(
                    "a private run divides by a public number of patients: write patients into site.yaml",
                    field="patients",
                )
            if site.declared < plan.data.min_patients:
                raise PolicyRefusal(
                    "the plan needs more patients than this site declares to train", field="patients"
                )
            self.terms = privacy_plan(plan.privacy, site.declared)
            if Stage.style in plan.stages:
                self.styled = style_plan(plan.privacy, site.declared)
        self.published = published_metrics(plan, site)

    @property
    def private(self) -> bool:
        return self.terms is not None

    @property
    def plans(self) -> dict[str, PrivacyPlan]:
        """Stage -> its noised releases, each with its event; of the patients who train."""
        plans = {STAGE: self.terms, STYLED: self.styled}
        return {stage: plan for stage, plan in plans.items() if plan is not None}

    @property
    def opened(self) -> bool:
        """Whether `check` has found a ledger that holds."""
        return self._opened is not None

    def check(self, heads: Sequence[SignedHead] = ()) -> None:
        """The policy is in force and allows the plan, and the ledger holds: before anything is done.

        Args:
            heads: of sites' ledgers, as an order names them; in a private run this site's own are held
                against its ledger.

        Raises:
            PolicyRefusal: with the policy's field.
            LedgerBroken: the ledger was changed, cut or rolled back, or lacks what it has signed.
            ArtefactError: a private plan, and there is no ledger; a head that nobody signed.
        """
        if self.terms is not None:  # first: a refusal is booked where there is a ledger
            if unsigned := sum(not head.holds for head in heads):
                raise ArtefactError(f"the order names {unsigned} ledger heads that nobody signed")
            ledger = self._kept.read(self._caps)
            ledger.check_witnessed(self._site.name, heads)
            self._opened = ledger
        if self.policy is not None:
            seen = self._ledger.entries if self.opened else ()
            check_in_force(self.policy, system_clock(), seen)
            agree(self.policy, asked_of(self._plan, self._site, self.plans, self.published))

    def check_affordable(self) -> None:
        """Raises ``BudgetExceeded`` if what remains of the run would pass the cap on everything."""
        if self.terms is None or self._caps.total is None:
            return
        if self.forecast() > self._caps.total:
            raise BudgetExceeded(
                "the run would pass max_epsilon_total of this site's policy: ask for more noise or fewer "
                "steps, or sign a new policy"
            )

    def forecast(self) -> float:
        """Epsilon of the patients who have spent most, once all that remains of the run is paid.

        After `check`, of a private plan.
        """
        assert self.terms is not None, "only a private plan spends"
        ahead = [self.terms.event(self.terms.steps - self.taken)]
        if self.styled is not None and not self._reserved(STYLED):
            ahead.append(self.styled.event())
        spent = quick_epsilon([*ahead, *self._ledger.most_used()], self._caps.delta)
        if self.published is not None:  # of other patients, whose past is seen when they are charged
            spent = max(spent, quick_epsilon([self.published.event], self._caps.delta))
        return spent

    def check_in_force(self) -> None:
        """Raises ``PolicyRefusal`` if the policy has run out since `check`."""
        if self.policy is not None:
            check_in_force(self.policy, system_clock(), self._ledger.entries)

    def rehearse(self) -> None:
        """This build adds the noise and draws the patients that the plan says: shown on made-up data.

        It is shown anew unless the ledger knows of a rehearsal of the same code that passed, and that the
        policy does not call old. What came of it is booked and kept in ``audits/rehearsal.json``.

        Raises:
            PolicyRefusal: it does not (field ``audit``). Nothing was computed on a patient.
        """
        if self.terms is None:
            return
        code = installed_code()
        if lately_rehearsed(self._ledger.entries, code, system_clock(), self.policy):
            return
        found = rehearse(self.terms)
        kept = save_audit(self._site.folder, REHEARSAL, found.to_json())
        detail = {"kind": REHEARSAL, "passed": found.passed, "code_sha256": code, **kept}
        self._ledger.record(EntryType.audit, self._context, detail, STAGE)
        if not found.passed:
            raise PolicyRefusal(
                "this build does not do what its plan says: see audits/rehearsal.json, and install a build "
                "that passes",
                field="audit",
            )

    def begin(self, own_process: bool = False) -> None:
        """Book the policy in force and the run's plan, each once, and whether the guard is by itself."""
        if self.terms is None:
            return
        if self.policy is not None:
            seen = [entry.detail for entry in self._entries(EntryType.policy)]
            if not seen or seen[-1]["sha256"] != self.policy.digest:
                self._ledger.record(EntryType.policy, self._context, policy_record(self.policy))
        detail: dict[str, Any] = {"plans": {stage: plan.to_json() for stage, plan in self.plans.items()}}
        if own_process:
            detail["own_process"] = True
        if self.published is not None:
            detail["metrics"] = self.published.to_json()
        own = [entry.detail["plans"] for entry in self._entries(EntryType.plan) if self._mine(entry)]
        if detail["plans"] not in own:
            self._ledger.record(EntryType.plan, self._context, detail, STAGE)

    def refuse(self, error: WardroundError) -> None:
        """Book a refusal of the plan, by its code and field, if there is a ledger that takes it.

        It stands in any case: one whose clock has gone back, or whose disk is full, takes nothing.
        """
        if self.opened:
            field = error.field if isinstance(error, PolicyRefusal) else ""
            with suppress(PolicyRefusal, ArtefactError, LedgerBroken):
                self._ledger.record(
                    EntryType.refuse, self._context, {"code": error.border_code, "field": field}, STAGE
                )

    @property
    def taken(self) -> int:
        """Steps of this run that are reserved, those that a crash lost among them."""
        return sum(event.count for entry in self._reserved(STAGE) for event in entry.listed())

    def reserve(self, patients: Sequence[Patient]) -> Reservation:
        """The next step of the run for all ``patients``, who may each be drawn. After `check`.

        Whatever ends it before its commit, it stays spent. One that was left open is booked as lost first.

        Raises:
            BudgetExceeded: the plan has no further step, or a patient would pass a cap.
        """
        terms, taken = self.terms, self.taken
        assert terms is not None, "only a private plan reserves"
        if taken >= terms.steps:
            raise BudgetExceeded(
                f"all {terms.steps} noised steps of this run are spent, those that a crash lost among them: "
                "plan some more with privacy.spare_steps"
            )
        self._void_lost()
        number = self._ledger.reserve(self._context, STAGE, _ids(patients), [terms.event(1)])
        spent = booked_epsilon(self._ledger.epsilon(terms.delta))
        return Reservation(self._ledger, number, taken, terms, spent)

    def charge_metrics(self, patients: Sequence[Patient]) -> MetricCharge:
        """All numbers of the run, for all test ``patients``, before one is computed. Once a run.

        Raises ``BudgetExceeded`` if one of them would pass a cap.
        """
        terms, published = self.terms, self.published
        assert terms is not None, "only a private plan is charged"
        assert published is not None, "only what leaves with noise is charged"
        own = [entry.seq for entry in self._entries(EntryType.metric) if self._mine(entry)]
        if own:
            number = own[0]
        else:
            number = self._ledger.charge_metric(self._context, MEASURED, _ids(patients), [published.event])
        spent = booked_epsilon(self._ledger.epsilon(terms.delta))
        return MetricCharge(self._ledger, number, published.numbers, not own, spent)

    def charge_style(self, patients: Sequence[Patient]) -> StyleCharge:
        """The style summary of the run, for all ``patients``, before it is computed. Once a run.

        A summary that a crash took before it left is made again under the same charge, of those who paid.

        Raises ``BudgetExceeded`` if one of them would pass a cap.
        """
        styled = self.styled
        assert styled is not None, "only what leaves with noise is charged"
        own = self._reserved(STYLED)
        ids = _ids(patients)
        number = own[0].seq if own else self._ledger.reserve(self._context, STYLED, ids, [styled.event()])
        left = [e for e in self._entries(EntryType.commit) if e.detail["settles"] == number]
        sent = left[0].payload[0].sha256 if left else ""
        charged, spent = self._ledger.charged(number, ids), booked_epsilon(self._ledger.epsilon(styled.delta))
        return StyleCharge(self._ledger, number, styled, self._context, charged, sent, spent)

    def export(self, stage: Stage, patients: Sequence[Patient]) -> None:
        """Book that something of ``patients`` is about to leave without noise; nothing takes it back."""
        self._ledger.declare_unprotected(self._context, str(stage), _ids(patients))

    def signed_head(self) -> SignedHead:
        """The ledger's newest entry, for the server and the other sites to keep."""
        return self._ledger.signed_head(self._site.name)

    def vouch(self) -> None:
        """An entry that names the receipts so far, so that none can be taken away."""
        self._ledger.record(EntryType.checkpoint, self._context, {})

    @property
    def _ledger(self) -> Ledger:
        assert self._opened is not None, "check() comes first"
        return self._opened

    @property
    def _caps(self) -> Caps:
        return Caps(self._plan.privacy.delta) if self.policy is None else self.policy.caps

    @property
    def _context(self) -> Context:
        policy = "" if self.policy is None else self.policy.digest
        return Context(self._plan.run_id, self._plan.digest, policy, self._plan.code_sha256)

    def _entries(self, kind: EntryType) -> list[Entry]:
        return [entry for entry in self._ledger.entries if entry.type is kind]

    def _mine(self, entry: Entry) -> bool:
        return entry.run_id == self._plan.run_id

    def _reserved(self, stage: str) -> list[Entry]:
        """This run's reservations for ``stage``."""
        return [e for e in self._entries(EntryType.reserve) if self._mine(e) and e.stage == stage]

    def _void_lost(self) -> None:
        still_open = set(self._ledger.open_reservations())
        for entry in self._reserved(STAGE):
            if entry.seq in still_open:
                self._ledger.void(entry.seq, "nothing left under it")


def _ids(patients: Sequence[Patient]) -> list[str]:
    return [patient.id for patient in patients]
