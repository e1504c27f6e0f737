"""What a person at the site has said to each job, in ``jobs/``, and whether the site takes part at all.

``jobs/PLAN.json`` is a plan as it came, PLAN its digest, and ``jobs/PLAN.answer.json`` the signed word on it.
While ``stopped.json`` lies in the site's folder, whatever is in it, nothing is worked on. All of it is read
anew for every order: no answer is remembered, so that a stop or a refusal counts at once, with the
coordinator down and the guard running. What cannot be read counts as no.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from client.site import Site
from common.approval import LONGEST_NAME, LONGEST_REASON, Approval, Verdict, is_line
from common.canonical import canonical_json, sha256_of
from common.durable import write_atomic
from common.errors import ArtefactError, ConsentPending, ConsentRefused, UsageError
from common.plan import Round, RunPlan, Stage, day_of, start_of
from common.privacy.keys import SIGNING_KEY, public_key, read_private_key
from common.recipe import Consent
from common.strict_json import read_strictly

JOBS = "jobs"
STOPPED = "stopped.json"
SCHEMA = 1
TRAINING = (Stage.adapt, Stage.generator, Stage.shared_student)
MOST_WAITING = 64  # plans without an answer: a coordinator cannot fill the site's disk with them
SHORTEST_NAME = 6  # digits of a plan's digest by which a job is called


def _now() -> datetime:
    return datetime.now(UTC)


now: Callable[[], datetime] = _now


@dataclass(frozen=True)
class Job:
    """A plan as it came. ``text``: its exact bytes; ``arrived``: when it did first, ISO 8601."""

    schema: int
    arrived: str
    text: str

    @cached_property
    def plan(self) -> RunPlan:
        return RunPlan.from_json(self.text)


@dataclass(frozen=True)
class Answer:
    """The word on a job. ``note``: why, for the site's own people; it never leaves."""

    approval: Approval
    note: str


@dataclass(frozen=True)
class _Stop:
    schema: int
    who: str
    at: str


class Steward:
    """Reads and writes the site's consent.

    Args:
        asks: whether each plan wants a person's approval; if not, a stop and a plan's last day still count.

    Guarantees: an approval holds for one plan, to the bit; only what the site's key has signed is one;
    whatever is missing, damaged, out of date or of another key is a refusal.
    """

    def __init__(self, site: Site, asks: bool = True) -> None:
        self._site, self._asks = site, asks
        self.folder = site.folder / JOBS

    @classmethod
    def of_guard(cls, site: Site, own_process: bool) -> Steward:
        """As ``site.yaml`` says; where it says nothing, a guard in a process of its own asks."""
        return cls(site, own_process if site.consent is None else site.consent is Consent.ask)

    # ---- the guard's questions ------------------------------------------------------------------

    def hear(self, plan: RunPlan) -> Approval | None:
        """Keep ``plan`` for the site's people, and return their approval of it; None where nobody is asked.

        Raises:
            ConsentPending: nobody has answered yet.
            ConsentRefused: they said no, or their word does not hold (any more).
        """
        if self._asks and not self._path(plan.digest).exists():
            if len(self.waiting()) >= MOST_WAITING:
                raise ConsentRefused(
                    f"{MOST_WAITING} plans wait for an answer: answer them with `wardround site approve` or "
                    "`wardround site refuse`",
                    field="jobs",
                )
            job = Job(SCHEMA, now().isoformat(timespec="seconds"), plan.to_json())
            write_atomic(self._path(plan.digest), canonical_json(asdict(job)).encode())
        return self.check(plan)

    def heed(self, plan: RunPlan, order: Round, sent: list[str]) -> None:
        """``order`` is one that the approved plan has. Raises what `check` raises.

        Args:
            sent: digests of the adapters that came with it.
        """
        approval = self.check(plan)
        if approval is None:
            return
        most = plan.rounds_of(order.stage)
        if order.stage is Stage.adapt:
            most = min(most, approval.rounds)
        if not 0 <= order.index < most:
            raise ConsentRefused("the order is for a round that was not approved", field="rounds")
        start = plan.starts.get(start_of(order.stage, self._site.variant(plan)), "")
        if order.stage in TRAINING and order.index == 0 and sent != [start]:
            raise ConsentRefused("the first round does not start from what the plan names", field="starts")

    def check(self, plan: RunPlan) -> Approval | None:
        """The approval that ``plan`` has now; None where nobody is asked. Raises what `hear` raises."""
        if self.stopped:
            raise ConsentRefused(
                "this site has stopped taking part: wardround site stop --undo", field="stopped"
            )
        return self._standing(plan)

    def standing(self, plan: RunPlan) -> str:
        """approved, pending, refused, expired or damaged; a stop apart."""
        try:
            self._standing(plan)
        except ConsentPending:
            return "pending"
        except ConsentRefused as refusal:
            return refusal.field
        return str(Verdict.approved)

    def _standing(self, plan: RunPlan) -> Approval | None:
        today = now().date()
        if plan.ended(today):
            raise ConsentRefused(f"the plan's last day was {plan.expires}", field="expired")
        if not self._asks:
            return None
        approval = self._word(plan)
        if approval is None:
            raise ConsentPending(
                f"nobody has approved this plan yet: wardround site jobs {self._site.folder}",
                field="approval",
            )
        if approval.answer is not Verdict.approved:
            raise ConsentRefused("this site has refused the plan", field="refused")
        if approval.ended(today):
            raise ConsentRefused(f"the approval's last day was {approval.expires}", field="expired")
        return approval

    def refusal_of(self, plan: RunPlan) -> Approval | None:
        """The signed refusal of ``plan``, to be sent; None: there is none that holds."""
        try:
            word = self._word(plan)
        except (ConsentRefused, ArtefactError):
            return None
        return word if word is not None and word.answer is Verdict.refused else None

    def by_policy(self, plan: RunPlan) -> Approval | None:
        """Where nobody is asked, the site's signed word that its policy allows ``plan``, if it has a key."""
        if self._asks or not (self._site.folder / SIGNING_KEY).exists():
            return None
        word = Approval.of(self._site.name, plan, Verdict.approved, "the site's policy", now())
        return word.signed(read_private_key(self._site.folder / SIGNING_KEY))

    # ---- the site's people ----------------------------------------------------------------------

    def jobs(self) -> dict[str, Job]:
        """Every plan that came, by its digest, the last one first.

        Raises ``ArtefactError`` naming every file that is damaged.
        """
        found, broken = {}, []
        for path in sorted(self.folder.glob("*.json")):
            if not path.name.endswith(".answer.json"):
                try:
                    found[path.stem] = self._job(path)
                except ArtefactError as error:
                    broken.append(error.message)
        if broken:
            raise ArtefactError("jobs were changed since they came: move the files away", broken)
        return dict(sorted(found.items(), key=lambda item: item[1].arrived, reverse=True))

    def find(self, name: str) -> Job:
        """The job whose digest begins with ``name``. Raises ``UsageError``, listing those there are."""
        known = self.jobs()
        fits = [digest for digest in known if digest.startswith(name.lower())]
        if len(fits) != 1 or len(name) < SHORTEST_NAME:
            listed = ", ".join(digest[:12] for digest in known) or "there is none"
            raise UsageError(
                f"{name!r} names {len(fits)} jobs: give the first {SHORTEST_NAME} digits of one ({listed})"
            )
        return known[fits[0]]

    def answer(self, plan: RunPlan) -> Answer | None:
        """What was said to ``plan``, if it holds. Raises ``ConsentRefused`` for what is damaged."""
        path = self._answer_path(plan.digest)
        if not path.exists():
            return None
        try:
            found = read_strictly(path.read_text(encoding="utf-8"), Answer, "answer")
            key = public_key(read_private_key(self._site.folder / SIGNING_KEY))
            faults = list(found.approval.word_faults(self._site.name, key, plan.digest))
        except (OSError, UnicodeDecodeError, ArtefactError) as error:
            raise ConsentRefused(f"{path} cannot be relied on: answer the job again", "damaged") from error
        if faults:
            raise ConsentRefused(
                f"{path} cannot be relied on, {', '.join(faults)}: answer the job again", "damaged"
            )
        return found

    def waiting(self) -> list[str]:
        """Digests of the plans without an answer."""
        names = {path.stem for path in self.folder.glob("*.json")}
        return sorted(name for name in names if "." not in name and f"{name}.answer" not in names)

    def approve(self, plan: RunPlan, who: str, until: str = "") -> Approval:
        """Approve ``plan``, and nothing else, until the day ``until`` if it ends before the plan does.

        Raises:
            UsageError: the plan is over, ``until`` is no day or no earlier one, or ``who`` no name.
            ArtefactError: the site has no key to sign with.
        """
        word = Approval.of(self._site.name, plan, Verdict.approved, who, now())
        if until:
            day = day_of(until)
            if day is None or day < now().date() or (plan.expires and until > plan.expires):
                raise UsageError(
                    f"--until {until!r}: give a day from today to the plan's last, {plan.expires or 'any'}"
                )
            word = replace(word, expires=until)
        if plan.ended(now().date()):
            raise UsageError(f"the plan's last day was {plan.expires}: ask for a new one")
        return self._keep(plan, word, "")

    def refuse(self, plan: RunPlan, who: str, reason: str, tell: bool) -> Approval:
        """Say no to ``plan``, or take an approval back; ``reason`` stays at the site unless ``tell``."""
        if not is_line(reason, LONGEST_REASON):
            raise UsageError(f"--reason: one line of at most {LONGEST_REASON} characters")
        word = Approval.of(self._site.name, plan, Verdict.refused, who, now())
        return self._keep(plan, replace(word, reason=reason if tell else ""), reason)

    def stop(self, who: str) -> None:
        """From now on no order is worked on, and what is being worked on does not leave."""
        stop = _Stop(SCHEMA, who, now().isoformat(timespec="seconds"))
        write_atomic(self._site.folder / STOPPED, canonical_json(asdict(stop)).encode())

    def undo_stop(self) -> bool:
        """Whether there was a stop to undo. Approvals are as they were."""
        path = self._site.folder / STOPPED
        stopped = path.exists()
        path.unlink(missing_ok=True)
        return stopped

    @property
    def stopped(self) -> bool:
        return (self._site.folder / STOPPED).exists()

    def last_approved(self, but: str) -> RunPlan | None:
        """The plan that was approved last, of those with another digest than ``but``."""
        found = [(answer.approval.at, job.plan) for job, answer in self._approved() if job.plan.digest != but]
        return max(found, key=lambda item: item[0])[1] if found else None

    def _approved(self) -> Iterator[tuple[Job, Answer]]:
        for job in self.jobs().values():
            try:
                answer = self.answer(job.plan)
            except ConsentRefused:
                continue  # its own line in the list says so
            if answer is not None and answer.approval.answer is Verdict.approved:
                yield job, answer

    def _word(self, plan: RunPlan) -> Approval | None:
        path = self._path(plan.digest)
        try:
            self._job(path)
        except ArtefactError as error:
            raise ConsentRefused(error.message, field="damaged") from error
        answer = self.answer(plan)
        return None if answer is None else answer.approval

    def _keep(self, plan: RunPlan, word: Approval, note: str) -> Approval:
        if not is_line(word.who, LONGEST_NAME):
            raise UsageError(f"--officer: one line of at most {LONGEST_NAME} characters")
        signed = word.signed(read_private_key(self._site.folder / SIGNING_KEY))
        text = canonical_json(asdict(Answer(signed, note)))
        write_atomic(self._answer_path(plan.digest), text.encode())
        return signed

    def _job(self, path: Path) -> Job:
        try:
            job = read_strictly(path.read_text(encoding="utf-8"), Job, "job")
            whole = job.schema == SCHEMA and sha256_of(job.text.encode()) == path.stem == job.plan.digest
        except (OSError, UnicodeDecodeError, ArtefactError) as error:
            raise ArtefactError(f"{path} is missing or damaged") from error
        if not whole:
            raise ArtefactError(f"{path} is not the plan of its name")
        return job

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest}.json"

    def _answer_path(self, digest: str) -> Path:
        return self.folder / f"{digest}.answer.json"
