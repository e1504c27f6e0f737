"""The guard: it alone opens a site's data, and everything it answers goes through `client.egress`.

In a deployment it is a process of the site's own; in a simulation it runs inside the courier's process, so
the policy is advisory there and the report says so. The training is in `client.rounds` and `client.workshop`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import client.measuring as measuring
import client.rounds as rounds
from client.account import MECHANISM, Account, OpenLedger
from client.adaptation import Adaptation
from client.charges import MetricCharge, StyleCharge
from client.deadline import Deadline
from client.dp.randomness import SystemRandomness
from client.egress import Egress, Noised
from client.faults import border_answer, keep_notice, keep_refusal
from client.limits import refuse_inbound
from client.manifest_rows import read_manifest
from client.noised_style import noised_style
from client.patients import Patient, Split, of_split
from client.pinned_factors import check_named, check_sent
from client.publishing import KEPT_STYLE, keep, keep_style, kept_metrics, kept_style, lost_metrics
from client.site import Site
from client.steward import Steward
from client.students import start_of
from client.style import summarise_style
from client.witnesses import witness
from client.workshop import Workshop
from common import checkpoints
from common.adapter import Adapter, AdapterUpdate
from common.errors import ArtefactError, BudgetExceeded, DataError, PolicyRefusal
from common.guard_api import PlanAnswer, SiteCounts, SiteMetrics, StudentNote
from common.plan import Round, RunPlan, Stage, rebuild
from common.precision import pack, unpack
from common.privacy.entries import LedgerBroken
from common.privacy.receipts import NO_MECHANISM
from common.recipe import GeneratorScope
from common.style import StyleSummary

_T = TypeVar("_T")


class Guard:
    """Implements `common.guard_api.GuardApi` for one site.

    Guarantees: the policy is checked before any data file is opened; nothing is returned that
    `client.egress` has not released; an order for a plan that this site did not agree to is refused.
    """

    def __init__(self, site: Site, own_process: bool = False) -> None:
        """``own_process``: no code of a run shares this process; the ledger books it, and reports say so."""
        self.site, self._own_process = site, own_process
        self._ledger = OpenLedger(site.folder)
        self._steward = Steward.of_guard(site, own_process)

    def propose(self, plan: RunPlan, order: Round) -> PlanAnswer:
        """Agree or refuse; a refusal names a code and a policy field, nothing that depends on data."""
        answer = PlanAnswer(self.site.name, True, plan.digest)
        account: Account | None = None
        try:
            approval = self._steward.hear(plan)
            self._refuse_unsealed(plan)
            self._check_policy(plan)
            account = Account(self.site, plan, self._ledger)
            self._check(account, order)
            account.check_affordable()
            account.rehearse()
            variant = self.site.variant(plan)
            if account.private:
                check_named(variant)
            answer = replace(answer, preset=variant.preset, rank=variant.rank)
            if plan.privacy.asked:
                self._refuse_dealing()
            self._labelled(plan)  # a site that cannot read its data says so now, not in the middle
            self.site.accept(plan)
            account.begin(self._own_process)
            word = approval or (self._steward.by_policy(plan) if self._own_process else None)
            answer = replace(answer, approval=word)
        except (PolicyRefusal, BudgetExceeded, LedgerBroken) as refusal:
            word = self._steward.refusal_of(plan)
            answer = PlanAnswer(self.site.name, False, plan.digest, *border_answer(refusal), approval=word)
            keep_refusal(self.site.folder, order.stage, refusal)
            if account is not None:
                account.refuse(refusal)
        known = account if account is not None and account.opened else None
        # Of no variant, for there may be none.
        egress = Egress(self.site.name, self.site.folder, plan, account=known, witnessed=answer.agrees)
        about = (order.stage, order.index, "answer")
        return _as_sent(PlanAnswer, egress.release_numbers(*about, asdict(answer), of=()))

    def adapt(self, order: Round, adapter: Adapter) -> AdapterUpdate:
        plan, account = self._heed(order, adapter)
        if account.private:
            self._check_factors(plan, account, adapter)
        train = self._labelled(plan)
        if account.private:
            update, noised = self._noised_update(plan, order, adapter, account, train)
        else:
            adaptation = rounds.adapt_teacher(self.site, plan, unpack(adapter), train, order)
            update, noised = self._update(plan, adapter, adaptation, len(train)), None
        return self._egress(plan, account).release_update(order.stage, order.index, update, noised)

    def style(self, order: Round) -> StyleSummary:
        plan, account = self._heed(order)
        train = self._labelled(plan)
        paid: StyleCharge | None = None
        if account.styled is not None:
            summary, paid = self._noised_style(plan, account, train)
            train = []
        else:
            summary = summarise_style(
                train,
                plan.data.image_size,
                plan.generator.style_groups,
                self.site.policy.min_group_patients,
                self.site.draw_seed(plan, "style"),
                plan.generator.style_detail,
            )
        egress = self._egress(plan, account)
        egress.release_numbers(order.stage, order.index, "style", asdict(summary), of=train, paid=paid)
        return summary

    def train_generator(self, order: Round, adapter: Adapter) -> AdapterUpdate:
        plan, account = self._heed(order, adapter)
        train = self._labelled(plan)
        adaptation = rounds.adapt_generator(self.site, plan, unpack(adapter), train, order)
        update = self._update(plan, adapter, adaptation, len(train))
        return self._egress(plan, account).release_update(order.stage, order.index, update)

    def train_shared_student(self, order: Round, student: Adapter) -> AdapterUpdate:
        plan, account = self._heed(order, student)
        if Stage.shared_student not in plan.stages:
            raise PolicyRefusal("the plan trains no student together", field="plan")
        train = self._labelled(plan)
        adaptation = rounds.train_shared_student(self.site, plan, unpack(student), train, order)
        update = self._update(plan, student, adaptation, len(train))
        return self._egress(plan, account).release_update(order.stage, order.index, update)

    def train_student(
        self,
        order: Round,
        adapter: Adapter,
        styles: dict[str, StyleSummary],
        generator: Adapter | None,
        student: Adapter | None = None,
    ) -> StudentNote:
        plan, account = self._heed(order, *(one for one in (adapter, generator, student) if one is not None))
        train, deadline = of_split(self._patients(plan), Split.train), Deadline(order.deadline_s)
        painted, common = (None if one is None else unpack(one) for one in (generator, student))
        note = Workshop(self.site, plan, unpack(adapter), styles, painted, train, deadline, common).run()
        if plan.privacy.covered:
            note, train = public_note(note, plan), []
        egress = self._egress(plan, account)
        about = (order.stage, order.index, "note")
        return _as_sent(StudentNote, egress.release_numbers(*about, asdict(note), of=train))

    def evaluate(self, order: Round, adapter: Adapter) -> SiteMetrics:
        plan, account = self._heed(order, adapter)
        everyone = self._patients(plan)
        paid: MetricCharge | None = None
        if account.published is not None:
            answer, paid = self._noised_metrics(plan, adapter, account, everyone)
            everyone = []
        else:
            answer = self._metrics(plan, order, adapter, everyone)
        egress = self._egress(plan, account)
        about = (order.stage, order.index, "metrics")
        return _as_sent(SiteMetrics, egress.release_numbers(*about, asdict(answer), of=everyone, paid=paid))

    def _heed(self, order: Round, *sent: Adapter) -> tuple[RunPlan, Account]:
        """The plan of ``order``, if this site agreed to it and its people and policy still do; what it costs.

        What the order says to the site's people is kept. The policy also looks at what was ``sent`` with it.
        """
        plan = self.site.accepted_plan(order.plan_sha256)
        self._steward.heed(plan, order, [one.digest for one in sent])
        if order.notice:
            keep_notice(self.site.folder, order)
        account = Account(self.site, plan, self._ledger)
        self._check(account, order)
        if account.policy is not None:
            refuse_inbound(account.policy, sent)
        return plan, account

    def _check(self, account: Account, order: Round) -> None:
        """Policy and ledger allow ``order``; what it shows of other sites' ledgers is kept."""
        account.check(order.heads)
        if account.private and order.heads:
            for notice in witness(self.site.folder, self.site.name, order.heads):
                keep_notice(self.site.folder, replace(order, notice=notice))

    def _check_policy(self, plan: RunPlan) -> None:
        policy = self.site.policy
        if Stage.style in plan.stages and not policy.allow_style:
            raise PolicyRefusal("this site shares no style summary", field="allow_style")
        if Stage.generator in plan.stages and not policy.allow_generator:
            raise PolicyRefusal("this site trains no generator for others", field="allow_generator")
        if Stage.shared_student in plan.stages:
            self._check_shared_student(plan)
        payloads = [*plan.payloads, *self.site.variant(plan).payloads]
        largest = max(payload.max_bytes for payload in payloads)
        if largest > policy.max_payload_mb * 2**20:
            raise PolicyRefusal(f"a payload of {largest} bytes is asked for", field="max_payload_mb")
        for name, digest in plan.models.items():
            if checkpoints.base_sha256(name) != digest:
                raise ArtefactError(f"the plan's {name} is not this site's: install the same release")
        start_of(self.site.student or plan.student.name, plan.student.start)  # else the last stage would fail

    def _check_shared_student(self, plan: RunPlan) -> None:
        if not self.site.policy.allow_student:
            raise PolicyRefusal("no student's weights leave this site", field="allow_student")
        if self.site.student not in (None, plan.student.name):
            what = f"this site's student is {self.site.student}, the one to be averaged {plan.student.name}"
            raise PolicyRefusal(what, field="student")

    def _check_factors(self, plan: RunPlan, account: Account, sent: Adapter) -> None:
        """Raises ``PolicyRefusal`` for another A than the plan's, and books it."""
        try:
            check_sent(self.site.variant(plan), sent)
        except PolicyRefusal as refusal:
            account.refuse(refusal)
            raise

    def _refuse_unsealed(self, plan: RunPlan) -> None:
        if plan.coordinator_key and not self._own_process:
            raise PolicyRefusal(
                "the plan wants answers sealed, and a guard in the courier's process cannot: start one of "
                "its own with `wardround site guard`",
                field="coordinator_key",
            )

    def _patients(self, plan: RunPlan) -> list[Patient]:
        return self.site.patients(plan.data, plan.seed)

    def _refuse_dealing(self) -> None:
        """Dealing looks at how many patients there are: one more, and others would change sides."""
        manifest = read_manifest(self.site.manifest)
        if manifest.rows and not manifest.has_splits:
            raise DataError(f"a private run wants a split column in {self.site.manifest}: add one")

    def _labelled(self, plan: RunPlan) -> list[Patient]:
        train = of_split(self._patients(plan), Split.train)
        labelled = [patient for patient in train if patient.labelled]
        # In a private run the declared number was held against the plan's: how many there are is a secret.
        if not plan.privacy.asked and len(labelled) < plan.data.min_patients:
            raise DataError(
                f"{len(labelled)} labelled training patients, the plan needs {plan.data.min_patients}: "
                f"label more, or check {self.site.manifest} with `wardround data check`"
            )
        return labelled

    def _egress(self, plan: RunPlan, account: Account) -> Egress:
        """The exit, for what was just made. Raises what `Steward.check` raises: a stop counts here too."""
        self._steward.check(plan)
        return Egress(self.site.name, self.site.folder, plan, self.site.variant(plan), account)

    def _update(self, plan: RunPlan, sent: Adapter, trained: Adaptation, patients: int) -> AdapterUpdate:
        step = trained.adapter.trained(trained.halves).step_from(unpack(sent))
        return AdapterUpdate(
            adapter=pack(step, plan.aggregation.wire_dtype),
            weight=float(min(patients, self.site.policy.max_weight)),
            started_from=sent.digest,
            losses=trained.losses,
        )

    def _metrics(
        self, plan: RunPlan, order: Round, adapter: Adapter, everyone: Sequence[Patient]
    ) -> SiteMetrics:
        test = of_split(everyone, Split.test)
        metrics = measuring.evaluate_models(
            self.site, plan, unpack(adapter), test, Deadline(order.deadline_s)
        )
        return SiteMetrics(self.site.name, count_patients(everyone), metrics)

    def _noised_style(
        self, plan: RunPlan, account: Account, train: Sequence[Patient]
    ) -> tuple[StyleSummary, StyleCharge]:
        """The summary of the run, booked before it is computed, and the same one whatever is asked again.

        Raises ``DataError``: the one that left is lost, and another is not made.
        """
        paid = account.charge_style(train)
        kept = kept_style(self.site.folder, plan)
        if kept is not None:
            return kept, paid
        if paid.sent:
            raise DataError(f"{KEPT_STYLE} is gone: put it back, for what has left is not made anew")
        payers = [patient for patient in train if patient.id in paid.charged]
        limits = self.site.policy.min_group_patients, plan.generator.style_groups
        style = noised_style(payers, plan.data.image_size, paid.terms, limits, SystemRandomness())
        keep_style(self.site.folder, plan, style)
        return style, paid

    def _noised_metrics(
        self, plan: RunPlan, adapter: Adapter, account: Account, everyone: Sequence[Patient]
    ) -> tuple[SiteMetrics, MetricCharge]:
        """The numbers of the run, booked before they are measured; measured once, whatever is asked again."""
        assert account.published is not None
        test = [patient for patient in of_split(everyone, Split.test) if patient.labelled]
        paid = account.charge_metrics(test)
        if not paid.fresh:
            kept = kept_metrics(self.site.folder, plan)
            return kept or lost_metrics(self.site.name, plan, account.published), paid
        cells = measuring.noised_metrics(self.site, plan, unpack(adapter), test, account.published)
        answer = SiteMetrics(self.site.name, None, cells)
        keep(self.site.folder, plan, answer)
        return answer, paid

    def _noised_update(
        self, plan: RunPlan, order: Round, sent: Adapter, account: Account, train: Sequence[Patient]
    ) -> tuple[AdapterUpdate, Noised]:
        """One noised step, reserved before its first gradient; nothing beside it is measured on patients."""
        account.rehearse()  # of another build than agreed to the plan, if it was replaced since
        reservation = account.reserve(train)
        made = rounds.private_teacher_step(self.site, plan, unpack(sent), train, order, reservation)
        update = AdapterUpdate(
            adapter=pack(made.step, plan.aggregation.wire_dtype),
            weight=float(min(reservation.terms.patients, self.site.policy.max_weight)),
            started_from=sent.digest,
            mechanism=MECHANISM if made.guaranteed else NO_MECHANISM,
        )
        return update, Noised(reservation, frozenset(made.step.tensors))


def public_note(note: StudentNote, plan: RunPlan) -> StudentNote:
    """What of ``note`` no patient changes: the architecture and its times, and how many images are painted.

    Which of them were kept may depend on patients: all count as kept, as withheld copies do.
    """
    painted = 0 if plan.generator.scope is GeneratorScope.none else plan.generator.images
    told = {"generated": painted, "kept": painted, "dropped_inconsistent": 0}
    return replace(note, sha256="", dropped_copy=None, copy_rate=None, **told)


def _as_sent(kind: type[_T], released: dict[str, Any]) -> _T:
    """What was released, with the ledger's head where the plan has one sent along."""
    sent: _T = rebuild(kind, released)
    return sent


def count_patients(patients: Sequence[Patient]) -> SiteCounts:
    splits = {split: len(of_split(patients, split)) for split in Split}
    return SiteCounts(
        patients=len(patients),
        images=sum(len(patient.samples) for patient in patients),
        train=splits[Split.train],
        val=splits[Split.val],
        test=splits[Split.test],
    )


@lru_cache(maxsize=64)
def open_guard(folder: str) -> Guard:
    """The guard of the site in ``folder``; one for a process. Raises ``ConfigError`` for a bad site file."""
    return Guard(Site.open(Path(folder)))
