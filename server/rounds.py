"""One round: an errand to every site, the count of who answered, and its record."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass

from common import progress
from common.errors import (
    BudgetExceeded,
    ConsentPending,
    ConsentRefused,
    DeadlinePassed,
    FederationError,
    PolicyRefusal,
    WardroundError,
)
from common.plan import Round, RunPlan, Stage
from common.recipe import Recipe
from server.collect import Collection, Collector, Errand, Take, Write
from server.report.schema import Rejection, RoundRecord
from server.witness import Witness

FRAME_BYTES = 4096  # what a message holds beside its payload: keys, digests, the nonce


@dataclass(frozen=True)
class FinishedRound:
    """A round that enough sites answered."""

    errand: Errand
    collection: Collection
    wall_s: float

    def record(
        self, residual: float | None = None, losses: Mapping[str, list[float]] | None = None
    ) -> RoundRecord:
        done = self.collection
        return RoundRecord(
            index=self.errand.index,
            stage=str(self.errand.stage),
            sites=done.sites,
            bytes_up=done.bytes_up,
            bytes_down=done.bytes_down,
            wall_s=self.wall_s,
            residual=residual,
            rejected=done.rejected,
            losses=dict(losses or {}),
        )


class Rounds:
    """Runs the rounds of one plan.

    Attributes:
        nodes: site -> node id, of the sites that agreed and are there.
        absent: sites of a resumed run that are not there any more.
        notices: site -> why its last answer was not used, for its next order.
        witness: of the sites' ledgers in a private run.
    """

    def __init__(
        self, collector: Collector, recipe: Recipe, plan: RunPlan, witness: Witness | None = None
    ) -> None:
        self.collector = collector
        self.events = collector.events
        self.live = collector.live
        self.config = recipe.run
        self.plan = plan
        self.nodes: dict[str, int] = {}
        self.absent: list[str] = []
        self.notices: dict[str, str] = {}
        self.witness = witness or Witness(private=False)

    def order(self, stage: Stage, index: int, site: str) -> Round:
        """Orders for ``site`` with a fresh nonce: one call a message."""
        nonce, notice = secrets.token_hex(16), self.notices.get(site, "")
        heads, deadline_s = self.witness.shown_to(site), self.config.site_deadline_s
        return Round(self.plan.digest, stage, index, deadline_s, nonce, notice, heads)

    def errand(self, stage: Stage, index: int, write: Write, take: Take) -> Errand:
        adapters = self.plan.variants if stage is Stage.adapt else []
        variants = [payload for one in adapters for payload in one.payloads]
        payloads = [*variants, *(one for one in self.plan.payloads if one.stage is stage)]
        most = max(payload.max_bytes for payload in payloads) + FRAME_BYTES
        return Errand(stage, index, self.config.site_deadline_s, write, take, most)

    def run(
        self,
        errand: Errand,
        title: str,
        among: Container[str] | None = None,
        settle: Callable[[Collection], None] = lambda _: None,
    ) -> FinishedRound:
        """The errand to every site (of ``among``).

        Args:
            settle: called with what came of it before the sites are counted; may drop some.

        Raises:
            DeadlinePassed: fewer than ``run.min_sites`` answered, and the late ones would have sufficed.
            BudgetExceeded: so did too few, because the others' privacy budgets are spent.
            PolicyRefusal: because the others' policies say no.
            FederationError: fewer than ``run.min_sites`` answered for other reasons.
        """
        nodes = {site: node for site, node in self.nodes.items() if among is None or site in among}
        finished = self.ask(errand, title, nodes)
        collection = finished.collection
        settle(collection)
        self._take_note(errand, collection)
        collection.rejected += [Rejection(site, "NOT_ONLINE") for site in self.absent]
        self.require(finished, len(collection.sites))
        return finished

    def _take_note(self, errand: Errand, collection: Collection) -> None:
        """Each site whose answer was not used is told so with its next order."""
        reasons = {one.site: one.reason for one in collection.rejected}
        kept = {site: notice for site, notice in self.notices.items() if site not in collection.sites}
        told = {site: f"{errand.stage}, round {errand.index + 1}: {why}" for site, why in reasons.items()}
        self.notices = kept | told

    def ask(self, errand: Errand, title: str, nodes: Mapping[str, int]) -> FinishedRound:
        """The errand to ``nodes``, however many answer."""
        progress.stage(title, len(nodes))
        self.events.write("round", state="open", stage=errand.stage, round=errand.index, sites=sorted(nodes))
        started = time.perf_counter()
        collection = self.collector.run(errand, nodes)
        finished = FinishedRound(errand, collection, time.perf_counter() - started)
        progress.end()
        return finished

    def require(self, finished: FinishedRound, count: int) -> None:
        """Close the round if ``count`` sites are enough; otherwise raise as `run` says."""
        errand, collection = finished.errand, finished.collection
        enough = count >= self.config.min_sites
        self.events.write(
            "round",
            state="closed" if enough else "failed",
            stage=errand.stage,
            round=errand.index,
            count=count,
        )
        if enough:
            return
        enough_but_late = count + collection.late >= self.config.min_sites
        error = (DeadlinePassed if enough_but_late else _shortage(collection))(
            f"stage {errand.stage}, round {errand.index}: {count} site(s) answered and run.min_sites is "
            f"{self.config.min_sites}. Each site's own faults.log says more; the state before this round is "
            "kept: run again with --resume"
        )
        error.faults = tuple(f"{rejection.site}: {rejection.reason}" for rejection in collection.rejected)
        raise error


def _shortage(collection: Collection) -> type[WardroundError]:
    """What too few answers are called: by the one reason that all the others had, if it is one."""
    codes = {rejection.reason.partition(" ")[0] for rejection in collection.rejected}
    refusals = {kind.border_code for kind in (PolicyRefusal, ConsentPending, ConsentRefused)}
    if codes == {BudgetExceeded.border_code}:
        return BudgetExceeded
    return PolicyRefusal if codes and codes <= refusals else FederationError
