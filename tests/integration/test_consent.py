"""Consent over the whole walk: sites that are asked, that approve one plan, and that stop in the middle.

The couriers here hand each message to the guard's own door (`client.guard_process.answering`), as a process
of the site's would get it, so that its answers are sealed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from flwr.app import Context, Message

import client.rounds
import client.steward
from client.guard_process import answering
from client.site import Site
from client.steward import Steward
from common import wire
from common.config import load_recipe, load_run_config, save_run_config
from common.errors import ArtefactError, PolicyRefusal
from common.plan import Round, RunPlan, Stage
from common.privacy.keys import SiteKeys
from common.recipe import Recipe
from common.wire.sealed import HEAD, SEALED
from server.approvals import ApprovalBook, State
from server.invited import Invited
from server.outcome import RunOutcome
from server.planning import first_adapters
from server.submission import Asked, Submission, submit
from simulations import simulate
from simulations.loopback import LoopbackGrid, drive, run_loopback
from tests.e2e import walks
from tests.integration.consortium import rejected

SITES = ("east", "north", "west")
STAGES = {action: stage for stage, action in wire.ACTIONS.items()}
TODAY = datetime.now(UTC).date()


def fingerprint(site: str) -> str:
    """Of the key of the site's node, which the loopback does not have."""
    return hashlib.sha256(site.encode()).hexdigest()


def recipe_of(sites: tuple[str, ...]) -> Recipe:
    quick = ["baselines=[]", "generator.scope=none", "teacher.steps=1", "student.steps=1"]
    recipe = load_recipe("smoke", [*quick, "evaluation.bootstrap=2"])
    looks = {site.name: site for site in recipe.sites} | {"north": replace(recipe.sites[1], name="north")}
    return replace(recipe, sites=[looks[site] for site in sites])


@dataclass
class Consortium:
    """Hospitals with guards of their own, and one coordinator."""

    root: Path
    doors: dict[str, Callable[[Stage, wire.Content], wire.Content]] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)
    replies: list[tuple[Stage, wire.Content]] = field(default_factory=list)

    def __post_init__(self) -> None:
        simulate.prepare_sites(recipe_of(SITES), self.root / "homes")
        for site in SITES:
            described = self.home(site) / "site.yaml"
            said = yaml.safe_load(described.read_text())
            assert said.pop("consent") == "policy"  # what a simulated site says; a real one is silent
            described.write_text(yaml.safe_dump(said))
            SiteKeys.create(self.home(site))
            self.doors[site] = answering(self.home(site), Site.open(self.home(site)))

    def home(self, site: str) -> Path:
        return self.root / "homes" / site

    def steward(self, site: str) -> Steward:
        return Steward(Site.open(self.home(site)))

    def roster(self) -> dict[str, Invited]:
        return {
            site: Invited(site, fingerprint(site), SiteKeys.open(self.home(site)).public) for site in SITES
        }

    def submit(self, name: str, **run: int) -> Path:
        recipe = recipe_of(SITES)
        folder = self.root / name
        submit(replace(recipe, run=replace(recipe.run, **run)), folder, Asked(self.roster(), 30), TODAY)
        return folder

    def drive(self, run: Path, mode: str) -> None:
        """Counts what reaches each site from here on."""
        self.sent.clear()
        self.replies.clear()
        keys = [fingerprint(site) for site in SITES]
        drive(LoopbackGrid(self._courier, len(SITES), keys), run, self.root / "nowhere", mode)

    def _courier(self, message: Message, context: Context) -> Message:
        site = SITES[int(context.node_config["partition-id"])]
        stage = STAGES[message.metadata.message_type]
        self.sent[site] += 1
        content = self.doors[site](stage, message.content)
        self.replies.append((stage, content))
        return Message(content, reply_to=message)

    def approve(self, run: Path, *sites: str) -> None:
        plan = job_of(run).plan
        for site in sites:
            self.steward(site).approve(plan, "M. Ruiz")


def job_of(run: Path) -> Submission:
    job = Submission.load(run)
    assert job is not None
    return job


def states(run: Path) -> dict[str, State]:
    return {one.site: one.state for one in ApprovalBook(job_of(run)).standings()}


def adapter_of(run: Path) -> str:
    return str(json.loads((run / "teacher" / "card.json").read_text())["adapter_sha256"])


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return Consortium(tmp_path_factory.mktemp("consent"))


@dataclass(frozen=True)
class Story:
    """What was seen on the way from a submission to the end of its run."""

    run: Path
    first: dict[str, State]
    second: dict[str, State]
    asked: list[Counter[str]]
    walked: Counter[str]
    replies: list[tuple[Stage, wire.Content]]
    early: type[BaseException]


@pytest.fixture(scope="module")
def story(consortium: Consortium) -> Story:
    """Asked, pending; two of three approve; asked again; run."""
    run, asked = consortium.submit("first", min_sites=2), []
    with pytest.raises(PolicyRefusal) as early:
        consortium.drive(run, "run")
    asked.append(Counter(consortium.sent))
    consortium.drive(run, "ask")
    asked.append(Counter(consortium.sent))
    first = states(run)
    consortium.approve(run, "east", "west")
    consortium.drive(run, "ask")
    asked.append(Counter(consortium.sent))
    second = states(run)
    consortium.drive(run, "run")
    walked, replies = Counter(consortium.sent), list(consortium.replies)
    return Story(run, first, second, asked, walked, replies, early.type)


def test_a_plan_is_pending_until_a_person_approves_it(story: Story) -> None:
    assert story.first == dict.fromkeys(SITES, State.pending)
    assert story.second == {"east": State.approved, "north": State.pending, "west": State.approved}


def test_before_the_approvals_nothing_but_the_question_is_sent(story: Story) -> None:
    assert story.early is PolicyRefusal
    assert story.asked == [Counter(), Counter(SITES), Counter(SITES)]


def test_an_unapproved_connected_site_gets_no_message(story: Story, consortium: Consortium) -> None:
    assert story.walked["north"] == 0
    assert story.walked["east"] == story.walked["west"] > 3
    taken = (consortium.home("north") / "orders.jsonl").read_text().splitlines()
    assert {json.loads(line)["stage"] for line in taken} == {"propose"}
    run_events = [e for e in walks.events_of(story.run) if e["event"] in ("message", "taken", "dropped")]
    north = [e for e in run_events if e["site"] == "north"]
    assert {e["stage"] for e in north} == {"propose"}
    assert len([e for e in north if e["event"] == "message" and e["direction"] == "down"]) == 2


def test_a_run_under_consent_ends_with_the_same_adapter_as_without(
    story: Story, tmp_path: Path, consortium: Consortium
) -> None:
    recipe = recipe_of(("east", "west"))
    simulate.prepare_sites(recipe, tmp_path / "sites")
    save_run_config(recipe, tmp_path / "run" / "config.yaml")
    run_loopback(tmp_path / "run", tmp_path / "sites")
    assert adapter_of(story.run) == adapter_of(tmp_path / "run")
    for site in ("east", "west"):
        ours, theirs = (
            json.loads((home / "student.json").read_text())["sha256"]
            for home in (consortium.home(site), tmp_path / "sites" / site)
        )
        assert ours == theirs


def test_every_answer_but_the_word_on_the_plan_travels_sealed(story: Story) -> None:
    kinds = {stage for stage, _ in story.replies}
    assert {Stage.adapt, Stage.student, Stage.evaluate} <= kinds
    for stage, content in story.replies:
        readable = set(content) - {SEALED, HEAD, "signature"}
        assert readable == ({"body"} if stage is Stage.propose else set())


def test_bytes_up_are_those_of_the_sealed_message(story: Story) -> None:
    outcome = RunOutcome.load(story.run / "state")
    record = next(one for one in outcome.rounds if one.stage == Stage.adapt)
    sealed = [content for stage, content in story.replies if stage is Stage.adapt]
    least = min(len(wire.pack_content(content)) for content in sealed)
    assert all(least < count < least + 1000 for count in record.bytes_up.values())


def test_a_resumed_run_speaks_to_the_approved_sites_alone(story: Story, consortium: Consortium) -> None:
    before = adapter_of(story.run)
    consortium.drive(story.run, "run")
    assert dict(consortium.sent) == {"east": 1, "west": 1}  # the roll call; the rest was done
    assert adapter_of(story.run) == before


def test_a_changed_plan_is_pending_again_and_nothing_is_sent(story: Story, consortium: Consortium) -> None:
    run = consortium.submit("changed", min_sites=2, rounds=3)
    with pytest.raises(PolicyRefusal):
        consortium.drive(run, "run")
    assert not consortium.sent
    consortium.drive(run, "ask")
    assert states(run) == dict.fromkeys(SITES, State.pending)


def test_a_refusal_reaches_the_coordinator_signed_and_its_reason_only_where_it_is_told(
    consortium: Consortium,
) -> None:
    run = consortium.submit("refused", min_sites=2, rounds=4)
    consortium.drive(run, "ask")
    plan = job_of(run).plan
    for site, tell in (("east", True), ("north", False)):
        consortium.steward(site).refuse(plan, "M. Ruiz", f"{site} has a reason", tell)
    consortium.drive(run, "ask")
    found = {one.site: (one.state, one.why) for one in ApprovalBook(job_of(run)).standings()}
    assert found["east"] == (State.refused, "east has a reason")
    assert found["north"] == (State.refused, "")
    assert found["west"] == (State.pending, "PENDING (approval)")
    assert not any(b"north has a reason" in wire.pack_content(reply) for _, reply in consortium.replies)


def test_an_approval_that_is_taken_back_counts_before_the_run(consortium: Consortium) -> None:
    run = consortium.submit("withdrawn", min_sites=2, rounds=5)
    consortium.drive(run, "ask")
    consortium.approve(run, "east", "west")
    consortium.drive(run, "ask")
    consortium.steward("west").refuse(job_of(run).plan, "M. Ruiz", "changed our mind", tell=False)
    with pytest.raises(PolicyRefusal):
        consortium.drive(run, "run")
    assert dict(consortium.sent) == {"east": 1, "west": 1}
    assert states(run)["west"] is State.refused


def test_an_approval_does_not_serve_another_job(story: Story, consortium: Consortium) -> None:
    """The coordinator puts the signed approvals of the first job beside a second one."""
    run = consortium.submit("borrowed", min_sites=2, rounds=3)
    (run / "approvals").mkdir()
    for site in ("east", "west"):
        (run / "approvals" / f"{site}.json").write_bytes(
            (story.run / "approvals" / f"{site}.json").read_bytes()
        )
    with pytest.raises(PolicyRefusal):
        consortium.drive(run, "run")
    assert not consortium.sent
    assert states(run)["east"] is State.damaged


def test_what_would_run_must_be_what_was_submitted(story: Story, consortium: Consortium) -> None:
    config = story.run / "config.yaml"
    before = config.read_bytes()
    recipe = load_run_config(config)
    save_run_config(replace(recipe, teacher=replace(recipe.teacher, steps=2)), config)
    try:
        with pytest.raises(ArtefactError, match=r"teacher\.steps: 1 as submitted, 2 now"):
            consortium.drive(story.run, "run")
        assert not consortium.sent
    finally:
        config.write_bytes(before)


def test_a_site_that_stops_in_the_middle_drops_out_by_name_and_the_others_finish(
    consortium: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    """West stops while it trains its second round: not even that leaves."""
    run = consortium.submit("stopped", min_sites=2, rounds=3)
    consortium.drive(run, "ask")
    consortium.approve(run, *SITES)
    consortium.drive(run, "ask")
    trained, real = Counter[str](), client.rounds.adapt_teacher

    def adapt(site: Site, *rest: object) -> object:
        trained[site.name] += 1
        if (site.name, trained[site.name]) == ("west", 2):
            consortium.steward("west").stop("M. Ruiz")
        return real(site, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(client.rounds, "adapt_teacher", adapt)
    try:
        consortium.drive(run, "run")
    finally:
        consortium.steward("west").undo_stop()
    outcome = RunOutcome.load(run / "state")
    assert trained == {"east": 3, "north": 3, "west": 2}
    assert "west" not in rejected(outcome, "adapt", 0)
    for stage, index in (("adapt", 1), ("adapt", 2), ("student", 0)):
        assert rejected(outcome, stage, index) == {"west": "REFUSED_CONSENT (stopped)"}
    assert sorted(outcome.notes) == ["east", "north"]


def test_a_message_of_one_stage_cannot_carry_the_order_of_another(consortium: Consortium) -> None:
    plan = RunPlan.from_json((consortium.home("east") / "plan.json").read_text())
    adapter = first_adapters(recipe_of(SITES)).teachers[0]
    content = wire.encode_request(Round(plan.digest, Stage.evaluate, 0, 60.0, "mixed"), adapter)
    told = wire.decode_refusal(consortium.doors["east"](Stage.adapt, content))
    assert told is not None
    assert told.code == "ARTEFACT_MISMATCH"


def test_an_expired_job_is_refused_at_every_stage(
    story: Story, consortium: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = RunPlan.from_json((consortium.home("east") / "plan.json").read_text())
    assert consortium.steward("east").check(plan) is not None
    next_day = datetime.fromisoformat(f"{plan.expires}T00:00:00+00:00") + timedelta(days=1)
    monkeypatch.setattr(client.steward, "now", lambda: next_day)
    adapter = first_adapters(recipe_of(SITES)).teachers[0]
    for stage in wire.ACTIONS:
        order = Round(plan.digest, stage, 0, 60.0, f"late-{stage}")
        content = wire.encode_request(order, None if stage is Stage.style else adapter)
        if stage is Stage.propose:
            content = wire.encode_proposal(order, plan)
        if stage is Stage.student:
            content = wire.encode_student_request(order, wire.StudentRequest(adapter, {}, None))
        reply = consortium.doors["east"](stage, content)
        told = wire.decode_refusal(reply) or wire.decode_answer(reply)
        assert (told.code, told.field) == ("REFUSED_CONSENT", "expired")
