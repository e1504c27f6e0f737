"""One round of training at the sites: sent down, admitted one by one, compared with each other, folded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from common import wire
from common.adapter import Adapter
from common.plan import PayloadSpec, Stage
from common.precision import pack_down, unpack
from common.recipe import AggregationConfig
from server.aggregation import AggregationRule
from server.answers import Answers
from server.collect import Collection
from server.report.schema import RoundRecord
from server.rounds import Rounds
from server.screening import Sent, admit
from server.settling import settle
from server.steps import sent_to

TITLES = {Stage.adapt: "teacher", Stage.generator: "generator", Stage.shared_student: "shared student"}


@dataclass
class Training:
    """The training rounds of one stage.

    Guarantees: an answer is checked whole before anything of it is kept; what is kept of a round lies on the
    disk, at most two updates are in memory; until the round is settled the rule is as it was before.

    Attributes:
        max_weight: cap on the declared patient count.
        inbox: folder for the answers of the round.
        payload: round, site -> what the plan lets the site send up.
        seen_nonces: of the answers admitted so far in this run, of all stages.
    """

    stage: Stage
    rule: AggregationRule
    rounds: Rounds
    max_weight: float
    inbox: Path
    payload: Callable[[int, str], PayloadSpec]
    seen_nonces: set[str] = field(default_factory=set)

    @property
    def _config(self) -> AggregationConfig:
        return self.rule.config

    def down(self, site: str) -> Adapter:
        """What ``site`` is sent now, as it travels."""
        return pack_down(self.rule.adapter_for(site), self._config.wire_dtype)

    def run(self, index: int) -> RoundRecord:
        """Raises what `Rounds.run` raises; the rule has then not moved."""
        sent: dict[str, Sent] = {}
        losses: dict[str, list[float]] = {}
        answers = Answers(self.inbox, self.rounds.live.watch)

        def write(site: str) -> wire.Content:
            order, adapter = self.rounds.order(self.stage, index, site), self.down(site)
            sent[site] = Sent.of(adapter, order.nonce)
            return wire.encode_request(order, adapter)

        def take(site: str, content: wire.Content) -> None:
            nonce, update = wire.decode_update(content)
            self.rounds.live.watch(update)
            admit(update, nonce, sent[site], self.payload(index, site), self.max_weight, self.seen_nonces)
            self.rounds.witness.take(site, update.ledger_head)
            answers.add(site, replace(update, adapter=unpack(update.adapter)))
            losses[site] = [loss for loss in update.losses if loss == loss]  # NaN: not measured

        errand = self.rounds.errand(self.stage, index, write, take)
        title = f"{TITLES[self.stage]}, round {index + 1}"
        finished = self.rounds.run(errand, title, settle=partial(self._settle, index, answers))
        residual = self.rule.close_round()
        kept = {site: losses[site] for site in finished.collection.sites}
        return finished.record(residual, kept)

    def _settle(self, index: int, answers: Answers, collection: Collection) -> None:
        """Fold what is kept of the round; whoever is not is dropped from ``collection`` with the reason."""
        self.rule.open_round()
        if not answers.sites():
            return
        sent = sent_to(self.rule, answers.sites())
        plan = self.rounds.plan
        settled = settle(answers, self.rule, self._config, sent, index / plan.rounds_of(self.stage))
        answers.clear()
        collection.sites = settled.taken
        collection.rejected += settled.rejected
        place = {"stage": self.stage, "round": index}
        for one in settled.rejected:
            self.rounds.events.write("dropped", **place, site=one.site, reason=one.reason)
        self.rounds.events.write("settled", **place, **settled.notes)
