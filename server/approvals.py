"""Approvals: who is asked, what each site has signed, and to whom a run may speak at all.

``RUN/approvals/SITE.json`` is a site's own signed word, ``RUN/approvals/asked.json`` what the coordinator
saw when it asked. Only the first counts: to a site without an approval of this very plan nothing is sent
but the question, and that only when the sites are being asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum

from common import wire
from common.approval import Approval, Verdict
from common.canonical import canonical_json
from common.durable import write_atomic
from common.errors import ArtefactError, ConsentPending, DeadlinePassed, PolicyRefusal
from common.guard_api import PlanAnswer
from common.plan import Stage
from common.recipe import Recipe
from common.strict_json import read_strictly
from server.collect import Collector
from server.invited import locate
from server.roll_call import NODES_WAIT_S, Invitation
from server.rounds import Rounds
from server.submission import Submission

APPROVALS = "approvals"
ASKED = "asked.json"


def _now() -> datetime:
    return datetime.now(UTC)


now: Callable[[], datetime] = _now


class State(StrEnum):
    approved = "approved"
    refused = "refused"
    expired = "expired"
    damaged = "damaged"
    pending = "pending"
    declined = "declined"  # its guard said no by itself: a policy, a budget
    unreachable = "unreachable"
    unasked = "unasked"


@dataclass(frozen=True)
class Standing:
    """Where a site stands. ``since``: ISO 8601; ``why``: the site's code, or its reason if it tells one."""

    site: str
    state: State
    since: str = ""
    who: str = ""
    until: str = ""
    why: str = ""


@dataclass(frozen=True)
class _Asked:
    sites: dict[str, Standing]


class ApprovalBook:
    """The approvals of one submission.

    Guarantee: nothing is kept, and nothing counts, that the site's own key did not sign for this very plan.
    """

    def __init__(self, submission: Submission) -> None:
        self._job = submission
        self._folder = submission.run_dir / APPROVALS

    def standings(self) -> list[Standing]:
        """Of every invited site, by name."""
        asked = self._asked()
        return [self._standing(site, asked) for site in sorted(self._job.roster)]

    def approved(self) -> list[str]:
        return [one.site for one in self.standings() if one.state is State.approved]

    def hear(self, site: str, answer: PlanAnswer) -> None:
        """Keep the signed word in ``answer``, which came from the node of ``site``.

        Raises ``ArtefactError``: the answer is another site's or to another plan, the word does not hold, or
        the site goes along without one.
        """
        if answer.site != site:
            raise ArtefactError("an answer in another site's name")
        if answer.approval is None:
            if answer.agrees:
                raise ArtefactError("it agrees without a signed approval")
            return
        if any(self._faults(site, answer.approval)):
            raise ArtefactError("an approval that does not hold", list(self._faults(site, answer.approval)))
        if answer.agrees != (answer.approval.answer is Verdict.approved):
            raise ArtefactError("an answer that its signed word contradicts")
        text = canonical_json(asdict(answer.approval)).encode()
        write_atomic(self._folder / f"{site}.json", text)

    def saw(self, seen: dict[str, Standing]) -> None:
        """Keep what came of asking; where a site stands as before, so does its ``since``."""
        before = self._asked()
        kept = dict(before)
        for site, new in seen.items():
            old = before.get(site)
            same = old is not None and (old.state, old.why) == (new.state, new.why)
            kept[site] = old if same and old is not None else new
        write_atomic(self._folder / ASKED, canonical_json(asdict(_Asked(kept))).encode())

    def _standing(self, site: str, asked: dict[str, Standing]) -> Standing:
        path = self._folder / f"{site}.json"
        if not path.exists():
            return asked.get(site, Standing(site, State.unasked))
        try:
            word = read_strictly(path.read_text(encoding="utf-8"), Approval, "approval")
        except (OSError, UnicodeDecodeError, ArtefactError):
            return Standing(site, State.damaged, why=f"{path.name} cannot be read: ask the site again")
        if faults := list(self._faults(site, word)):
            return Standing(site, State.damaged, why="; ".join(faults))
        state = State.approved if word.answer is Verdict.approved else State.refused
        if state is State.approved and word.ended(now().date()):
            state = State.expired
        return Standing(site, state, word.at, word.who, word.expires, word.reason)

    def _faults(self, site: str, word: Approval) -> list[str]:
        return list(word.word_faults(site, self._job.roster[site].ledger_key, self._job.plan.digest))

    def _asked(self) -> dict[str, Standing]:
        try:
            text = (self._folder / ASKED).read_text(encoding="utf-8")
            return read_strictly(text, _Asked, "record").sites
        except (OSError, UnicodeDecodeError, ArtefactError):
            return {}  # it decides nothing


def ask_sites(collector: Collector, recipe: Recipe, job: Submission) -> list[Standing]:
    """Put the plan to every invited site that has not approved it, and keep what they sign.

    Nothing but ``query.propose``, which carries the plan, is sent. Returns where every site now stands.
    """
    book, seen = ApprovalBook(job), {}
    wanted = {site: one for site, one in job.roster.items() if site not in book.approved()}
    nodes = locate(collector, wanted, _wait(recipe)) if wanted else {}
    rounds = Rounds(collector, recipe, job.plan)

    def write(site: str) -> wire.Content:
        return wire.encode_proposal(rounds.order(Stage.propose, 0, site), job.plan)

    def take(site: str, content: wire.Content) -> None:
        answer = wire.decode_answer(content)
        book.hear(site, answer)
        pending = answer.code == ConsentPending.border_code
        seen[site] = _seen(site, State.pending if pending else State.declined, answer.code, answer.field)

    done = rounds.ask(rounds.errand(Stage.propose, 0, write, take), "asking the sites", nodes)
    for one in done.collection.rejected:
        seen[one.site] = _seen(one.site, State.declined, one.reason)
    seen |= {site: _seen(site, State.unreachable) for site in wanted if site not in nodes}
    book.saw(seen)
    standings = book.standings()
    for standing in standings:
        collector.events.write("approval", site=standing.site, state=standing.state)
    return standings


def invite(collector: Collector, recipe: Recipe, job: Submission) -> Invitation:
    """The nodes of the sites that have approved the plan, and of nobody else.

    Raises:
        PolicyRefusal: fewer than ``run.min_sites`` have; says where each stands.
        DeadlinePassed: too few of those that have are connected.
    """
    book = ApprovalBook(job)
    approved = {site: job.roster[site] for site in book.approved()}
    if len(approved) < recipe.run.min_sites:
        error = PolicyRefusal(
            f"{len(approved)} site(s) have approved the plan and run.min_sites is {recipe.run.min_sites}: "
            "ask the others again; nothing was sent",
            field="approval",
        )
        error.faults = tuple(f"{one.site}: {one.state}" for one in book.standings())
        raise error
    nodes = locate(collector, approved, _wait(recipe))
    if len(nodes) < recipe.run.min_sites:
        raise DeadlinePassed(
            f"{len(nodes)} of the {len(approved)} sites that have approved the plan came online within "
            f"{_wait(recipe):g} s, and run.min_sites is {recipe.run.min_sites}: start the missing sites, "
            "then run again"
        )
    return Invitation(nodes, book.hear)


def _wait(recipe: Recipe) -> float:
    return min(NODES_WAIT_S, recipe.run.site_deadline_s)


def _seen(site: str, state: State, code: str = "", field: str = "") -> Standing:
    moment = now().isoformat(timespec="seconds")
    return Standing(site, state, moment, why=f"{code} ({field})" if field else code)
