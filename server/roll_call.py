"""The roll call that opens a run: which node is which site, and who agrees to the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from common import wire
from common.errors import ArtefactError, DeadlinePassed
from common.guard_api import PlanAnswer
from common.plan import RunPlan, Stage
from common.recipe import Recipe
from common.wire.signed import claimed_site
from server.outcome import RunOutcome, SiteAdapter, SiteRefusal
from server.report.schema import Rejection, RoundRecord
from server.rounds import FinishedRound, Rounds
from server.witness import Witness

CHANGED = "another adapter or rank than it agreed to when the run began"
NODES_WAIT_S = 120.0  # for the nodes to come online, or the sites' own deadline if that is shorter


@dataclass(frozen=True)
class Roll:
    """``nodes`` and ``adapters`` of the sites that agree, by site; ``refusals`` of those that do not."""

    nodes: dict[str, int]
    adapters: dict[str, SiteAdapter]
    refusals: list[SiteRefusal]
    record: RoundRecord


@dataclass(frozen=True)
class Invitation:
    """The nodes that a run may speak to, by site, and who looks at each answer before it counts."""

    nodes: Mapping[str, int]
    hear: Callable[[str, PlanAnswer], None]


def call_the_roll(
    rounds: Rounds, recipe: Recipe, before: RunOutcome | None, invitation: Invitation | None = None
) -> Roll:
    """Propose the plan to every node that is online, or to those alone that were invited.

    Args:
        before: the outcome so far of a resumed run, whose sites alone may take part.
        invitation: of a run that was submitted; None: whoever is online may answer.

    Raises:
        DeadlinePassed: too few nodes came online, or too few answered in time.
        FederationError: too few sites agree.
    """
    nodes = _online(rounds, recipe) if invitation is None else dict(invitation.nodes)
    answers: dict[str, PlanAnswer] = {}

    def write(label: str) -> wire.Content:
        return wire.encode_proposal(rounds.order(Stage.propose, 0, label), rounds.plan)

    def take(label: str, content: wire.Content) -> None:
        answer = _admitted(wire.decode_answer(content), rounds.plan)
        if rounds.collector.keys is not None and claimed_site(content) != answer.site:
            raise ArtefactError("an answer in the name of a site that did not sign it")
        if invitation is not None:
            invitation.hear(label, answer)
        answers[label] = answer

    finished = rounds.ask(rounds.errand(Stage.propose, 0, write, take), "proposal", nodes)
    faults = _faults(answers, recipe, before)
    names = {label: answer.site for label, answer in answers.items() if label not in faults}
    faults |= _witnessed(rounds.witness, [(label, answers[label]) for label in sorted(names)])
    agreed = {label for label, answer in answers.items() if answer.agrees and label not in faults}
    refused = [
        answer for label, answer in sorted(answers.items()) if not answer.agrees and label not in faults
    ]
    finished = _renamed(finished, names, agreed, faults)
    finished.collection.rejected += [Rejection(answer.site, _words(answer)) for answer in refused]
    for rejection in finished.collection.rejected:
        rounds.events.write("refused", stage=Stage.propose, site=rejection.site, reason=rejection.reason)
    rounds.require(finished, len(agreed))
    return Roll(
        nodes={names[label]: nodes[label] for label in sorted(agreed, key=names.__getitem__)},
        adapters={names[label]: SiteAdapter(answers[label].preset, answers[label].rank) for label in agreed},
        refusals=[SiteRefusal(answer.site, answer.code, answer.field) for answer in refused],
        record=finished.record(),
    )


def _admitted(answer: PlanAnswer, plan: RunPlan) -> PlanAnswer:
    """``answer``, if it is one to ``plan``. Raises ``ArtefactError``."""
    if answer.plan_sha256 != plan.digest:
        raise ArtefactError("an answer to another plan")
    if answer.agrees and plan.variant(answer.preset, answer.rank) is None:
        raise ArtefactError("an adapter that the plan does not list")
    return answer


def _online(rounds: Rounds, recipe: Recipe) -> dict[str, int]:
    """Label -> node id. A node has no site's name before it has answered."""
    expected = len(recipe.sites) or (recipe.cohort.sites if recipe.cohort else recipe.run.min_sites)
    wait = min(NODES_WAIT_S, recipe.run.site_deadline_s)
    node_ids = rounds.collector.online(expected, wait)
    if len(node_ids) < recipe.run.min_sites:
        raise DeadlinePassed(
            f"{len(node_ids)} of {expected} sites came online within {wait:g} s, and run.min_sites is "
            f"{recipe.run.min_sites}: start the missing sites, then run again"
        )
    return {f"node-{number:04d}": node_id for number, node_id in enumerate(node_ids, 1)}


def _known_sites(recipe: Recipe, before: RunOutcome | None) -> set[str] | None:
    """The names that may answer; None where the recipe gives none."""
    if before is not None:
        return set(before.sites)
    return {site.name for site in recipe.sites} or None


def _faults(answers: dict[str, PlanAnswer], recipe: Recipe, before: RunOutcome | None) -> dict[str, str]:
    """Label -> why that answer cannot be taken."""
    known = _known_sites(recipe, before)
    faults = {label: fault for label in answers if (fault := _fault(label, answers, known))}
    if before is not None:
        faults |= {label: CHANGED for label, answer in answers.items() if _changed(answer, before)}
    return faults


def _witnessed(witness: Witness, answers: list[tuple[str, PlanAnswer]]) -> dict[str, str]:
    """Label -> what its ledger's head says against it; the other heads of those that agree are taken."""
    faults = {}
    for label, answer in answers:
        if answer.agrees:
            try:
                witness.take(answer.site, answer.ledger_head)
            except ArtefactError as error:
                faults[label] = error.message
    return faults


def _fault(label: str, answers: dict[str, PlanAnswer], known: set[str] | None) -> str:
    name = answers[label].site
    if known is not None and name not in known:
        return "a site that is not in this run"
    if any(other != label and answer.site == name for other, answer in answers.items()):
        return "another node gives the same site's name"  # which one lies cannot be told from here
    return ""


def _changed(answer: PlanAnswer, before: RunOutcome) -> bool:
    """Whether the site now says another preset or rank than in the run that is resumed."""
    agreed = before.adapters.get(answer.site)
    return answer.agrees and agreed is not None and agreed != SiteAdapter(answer.preset, answer.rank)


def _words(answer: PlanAnswer) -> str:
    return f"{answer.code} ({answer.field})" if answer.field else answer.code


def _renamed(
    finished: FinishedRound, names: dict[str, str], agreed: set[str], faults: dict[str, str]
) -> FinishedRound:
    """The round with sites' names in place of node labels."""
    old = finished.collection
    collection = replace(
        old,
        sites=sorted(names[label] for label in agreed),
        rejected=[
            *old.rejected,
            *(Rejection(names.get(label, label), fault) for label, fault in sorted(faults.items())),
        ],
        bytes_up={names.get(label, label): size for label, size in old.bytes_up.items()},
        bytes_down={names.get(label, label): size for label, size in old.bytes_down.items()},
    )
    return replace(finished, collection=collection)
