"""The walk of a run: propose -> adapt rounds -> style -> generator, student rounds -> student -> evaluate.

Every phase has a deadline and an owner: the sites owe their answers within ``run.site_deadline_s``, the
server owes the next step. A site that fails, refuses or is late is dropped from that round by name and
cause, and may come back in the next. Where fewer than ``run.min_sites`` remain the run ends, with its
state kept.
"""

from __future__ import annotations

import secrets
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

from common import wire
from common.adapter import Adapter
from common.canonical import canonical_json
from common.durable import write_atomic
from common.errors import WardroundError
from common.plan import PayloadSpec, RunPlan, Stage
from common.precision import pack_down
from common.recipe import Recipe
from server.aggregation import AggregationRule, Share, build_rule
from server.approvals import invite
from server.collect import Collector, Errand, Take
from server.outcome import RunOutcome
from server.planning import FirstAdapters, build_plan, first_adapters
from server.roll_call import call_the_roll
from server.rounds import Rounds
from server.screening import admit_metrics, admit_note, admit_style
from server.state import Checkpoint, StateStore
from server.submission import Submission
from server.training import Training
from server.witness import HEADS_FILE, Witness

TEACHER_FILE = "teacher/adapter.safetensors"
INBOX = "inbox"  # below the state's folder: the answers of an open round


def run_walk(
    collector: Collector, recipe: Recipe, run_dir: Path, submitted: Submission | None = None
) -> RunOutcome:
    """Run, or resume where ``run_dir`` holds a checkpoint; the teacher and the outcome are left there.

    Guarantee: of a submitted run nothing is sent to a site whose signed approval of this very plan is not
    held; nothing at all if the plan is not the one that was submitted.

    Args:
        submitted: None: whoever is online is asked, as in a simulation.

    Raises:
        FederationError: too few sites agreed, answered or were admitted.
        DeadlinePassed: too few, and late answers were the cause.
        ArtefactError: the state is another plan's, a model is missing, the disk is full.
    """
    shutil.rmtree(run_dir / "state" / INBOX, ignore_errors=True)
    try:
        walk = Walk(collector, recipe, run_dir, submitted=submitted)
        walk.train()
        if Stage.evaluate in walk.plan.stages:
            walk.evaluate()
    except WardroundError as error:
        collector.events.write("failed", exit_code=error.exit_code, reason=str(error))
        raise
    walk.outcome.save(run_dir / "state")
    collector.events.write("finished", adapter_sha256=walk.outcome.adapter_sha256)
    return walk.outcome


class Walk:
    """One run under way: the plan, the rules, and what came of it so far."""

    def __init__(
        self,
        collector: Collector,
        recipe: Recipe,
        run_dir: Path,
        first: FirstAdapters | None = None,
        submitted: Submission | None = None,
    ) -> None:
        """``first``: what the rounds start from; None: what the recipe's own models say."""
        self.recipe = recipe
        self.run_dir = run_dir
        self.store = StateStore(run_dir / "state")
        saved = self.store.load()
        self.first = first or first_adapters(recipe)
        self.submitted = submitted
        self.plan = self._planned(saved)
        self.saved = self.store.load_for(self.plan)
        momentum = recipe.privacy.momentum if recipe.privacy.asked else 0.0
        self.rules: dict[Stage, AggregationRule] = {Stage.adapt: build_rule(recipe.aggregation, momentum)}
        if self.first.generator is not None:
            self.rules[Stage.generator] = build_rule(recipe.aggregation)
        if self.first.student is not None:
            # Dense tensors alone: a mean under any rule, and a vote where the recipe wants one.
            self.rules[Stage.shared_student] = build_rule(replace(recipe.aggregation, rule="exact_split"))
        witness = Witness(self.plan.privacy.asked, run_dir / "state" / HEADS_FILE)
        self.rounds = Rounds(collector, recipe, self.plan, witness)
        self.outcome = RunOutcome(self.plan.run_id, self.plan.digest, [])
        seen_nonces: set[str] = set()
        self.training = {
            stage: Training(
                stage,
                rule,
                self.rounds,
                recipe.policy.max_weight,
                run_dir / "state" / INBOX,
                partial(self._payload, stage),
                seen_nonces,
            )
            for stage, rule in self.rules.items()
        }

    def _planned(self, saved: Checkpoint | None) -> RunPlan:
        """The plan, made anew; the one that was submitted, if any was."""
        job = self.submitted
        known = job or saved
        run_id = known.plan.run_id if known else secrets.token_hex(8)
        plan = build_plan(self.recipe, run_id, self.first, None if job is None else job.terms)
        if job is not None:
            job.check(plan)
        return plan

    def train(self) -> None:
        """Every phase of the plan up to the students."""
        self.propose()
        self.adapt()
        for stage, phase in (
            (Stage.style, self.style),
            (Stage.generator, self.generator),
            (Stage.shared_student, self.shared_student),
        ):
            if stage in self.plan.stages:
                phase()
        self.student()

    def propose(self) -> None:
        """Ask every node; those that agree are the run's sites. A resumed run keeps its first sites."""
        before = self.saved.outcome if self.saved else None
        job = self.submitted
        invitation = None if job is None else invite(self.rounds.collector, self.recipe, job)
        roll = call_the_roll(self.rounds, self.recipe, before, invitation)
        self.rounds.nodes = roll.nodes
        if self.saved:
            self.outcome = self.saved.outcome
            self.rounds.absent = sorted(set(self.outcome.sites) - set(roll.nodes))
            for stage, rule in self.rules.items():
                rule.restore(self.saved.rule_state(stage))
            self.rounds.events.write("resumed", rounds=len(self.outcome.rounds), absent=self.rounds.absent)
            return
        sites = sorted(roll.nodes)
        self.outcome = RunOutcome(
            self.plan.run_id, self.plan.digest, sites, roll.refusals, adapters=roll.adapters
        )
        self._start_rules()
        self._keep(self.outcome.with_round(roll.record))

    def _start_rules(self) -> None:
        """Tell each rule where it starts and what each site trains.

        Raises ``ConfigError`` for a mixture that cannot be aggregated.
        """
        first = {(one.preset, one.rank): Share.of(one) for one in self.first.teachers}
        shares = {site: first[one.preset, one.rank] for site, one in self.outcome.adapters.items()}
        self.rules[Stage.adapt].start(self.first.whole(), shares, Share.of(self.first.teachers[0]))
        for stage, one in (
            (Stage.generator, self.first.generator),
            (Stage.shared_student, self.first.student),
        ):
            if one is not None:
                self.rules[stage].start(one, dict.fromkeys(self.outcome.sites, Share.of(one)))

    def adapt(self) -> None:
        """The teacher's rounds; the global adapter is then in ``RUN/teacher``."""
        for index in range(self.plan.rounds):
            self._train(Stage.adapt, index)
        adapter = self.rules[Stage.adapt].global_adapter()
        if self.outcome.adapter_sha256 != adapter.digest or not (self.run_dir / TEACHER_FILE).exists():
            self._write_teacher(adapter)
            self._keep(replace(self.outcome, adapter_sha256=adapter.digest))

    def style(self) -> None:
        """Each site's style summary, for the others to paint with."""
        if self.outcome.has(Stage.style, 0):
            return
        styles = {}

        def take(site: str, content: wire.Content) -> None:
            summary = wire.decode_style(content)
            admit_style(summary, self.plan.generator.style_groups, self.plan.generator.style_detail)
            styles[site] = summary

        done = self.rounds.run(self._errand(Stage.style, take), "styles")
        self._keep(self.outcome.with_round(done.record(), styles=styles))

    def generator(self) -> None:
        """The rounds of the generator's adapter, in the federated scope."""
        for index in range(self.plan.generator.rounds):
            self._train(Stage.generator, index)
        digest = self.rules[Stage.generator].global_adapter().digest
        if self.outcome.generator_sha256 != digest:
            self._keep(replace(self.outcome, generator_sha256=digest))

    def shared_student(self) -> None:
        """The rounds of the student's own weights, where they travel."""
        for index in range(self.plan.student.rounds):
            self._train(Stage.shared_student, index)
        digest = self.rules[Stage.shared_student].global_adapter().digest
        if self.outcome.student_sha256 != digest:
            self._keep(replace(self.outcome, student_sha256=digest))

    def student(self) -> None:
        """Each site makes synthetic images and distils its student; only a note of it comes back."""
        if self.outcome.has(Stage.student, 0):
            return
        notes = {}
        rule = self.rules.get(Stage.generator)
        generator = pack_down(rule.global_adapter(), self.plan.aggregation.wire_dtype) if rule else None

        together = self.training.get(Stage.shared_student)

        def write(site: str) -> wire.Content:
            common = None if together is None else together.down(site)
            teacher = self.training[Stage.adapt].down(site)
            request = wire.StudentRequest(teacher, self.outcome.styles, generator, common)
            return wire.encode_student_request(self.rounds.order(Stage.student, 0, site), request)

        def take(site: str, content: wire.Content) -> None:
            note = wire.decode_note(content)
            admit_note(note, site)
            self.rounds.witness.take(site, note.ledger_head)
            notes[site] = note

        done = self.rounds.run(self.rounds.errand(Stage.student, 0, write, take), "students")
        self._keep(self.outcome.with_round(done.record(), notes=notes))

    def evaluate(self) -> None:
        """Each site that has a student measures it, the teacher and the baselines on its test split."""
        if self.outcome.has(Stage.evaluate, 0):
            return
        metrics = {}

        def write(site: str) -> wire.Content:
            return wire.encode_request(
                self.rounds.order(Stage.evaluate, 0, site), self.training[Stage.adapt].down(site)
            )

        def take(site: str, content: wire.Content) -> None:
            found = wire.decode_metrics(content)
            admit_metrics(found, site)
            self.rounds.witness.take(site, found.ledger_head)
            metrics[site] = found

        errand = self.rounds.errand(Stage.evaluate, 0, write, take)
        done = self.rounds.run(errand, "evaluation", among=self.outcome.notes)
        self._keep(self.outcome.with_round(done.record(), metrics=metrics))

    def _train(self, stage: Stage, index: int) -> None:
        if not self.outcome.has(stage, index):
            self._keep(self.outcome.with_round(self.training[stage].run(index)))

    def _payload(self, stage: Stage, index: int, site: str) -> PayloadSpec:
        """What the plan lets ``site`` send up in a round of ``stage``."""
        agreed = self.outcome.adapters[site]
        variant = self.plan.variant(agreed.preset, agreed.rank) if stage is Stage.adapt else None
        payload = variant.payload(index) if variant else self.plan.payload(stage, index)
        assert payload is not None, "the roll call admits only variants of the plan"
        return payload

    def _errand(self, stage: Stage, take: Take) -> Errand:
        """An errand whose request is the bare order."""
        return self.rounds.errand(
            stage, 0, lambda site: wire.encode_request(self.rounds.order(stage, 0, site)), take
        )

    def _keep(self, outcome: RunOutcome) -> None:
        """Save the state, then take ``outcome`` for granted. The ledger heads of it go first."""
        self.rounds.witness.save()
        tensors = {
            f"{stage}/{name}": tensor
            for stage, rule in self.rules.items()
            for name, tensor in rule.state().items()
        }
        self.store.save(Checkpoint(self.plan, outcome, tensors))
        self.outcome = outcome

    def _write_teacher(self, adapter: Adapter) -> None:
        path = self.run_dir / TEACHER_FILE
        write_atomic(path, adapter.to_bytes())
        card = {
            "teacher": self.plan.teacher.name, "adapter_sha256": adapter.digest, "preset": adapter.preset,
            "rank": adapter.rank, "base_sha256": adapter.base_sha256, "elements": adapter.elements,
            "rounds": self.plan.rounds,
            "sites": self.outcome.sites, "run_id": self.plan.run_id, "plan_sha256": self.plan.digest,
        }  # fmt: skip
        write_atomic(path.with_name("card.json"), canonical_json(card).encode())
