"""A site's word on a job: one plan, one key, one day at a time, and no in every doubt."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import client.steward
from client.guard import Guard
from client.site import Site
from client.steward import MOST_WAITING, STOPPED, Steward
from common.approval import Approval, Verdict
from common.config import save_site
from common.errors import ArtefactError, ConsentPending, ConsentRefused, PolicyRefusal, UsageError
from common.plan import Round, RunPlan, Stage
from common.privacy.keys import SIGNING_KEY, SiteKeys, create_key
from common.recipe import Consent, SiteFile

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(client.steward, "now", lambda: NOW)
    save_site(SiteFile("east"), tmp_path / "site.yaml")
    SiteKeys.create(tmp_path)
    return tmp_path


@pytest.fixture
def steward(home: Path) -> Steward:
    return Steward(Site.open(home))


@pytest.fixture
def plan(smoke_plan: RunPlan) -> RunPlan:
    return replace(smoke_plan, expires="2026-12-01")


def approved(steward: Steward, plan: RunPlan) -> Approval:
    with pytest.raises(ConsentPending):
        steward.hear(plan)
    return steward.approve(plan, "M. Ruiz")


def refused(steward: Steward, plan: RunPlan) -> str:
    """The field of the refusal; what is asked and what is kept for people agree on it."""
    with pytest.raises(ConsentRefused) as refusal:
        steward.check(plan)
    return refusal.value.field


def test_a_plan_waits_until_it_is_approved_and_is_kept_as_it_came(steward: Steward, plan: RunPlan) -> None:
    word = approved(steward, plan)
    assert steward.hear(plan) == word == steward.check(plan)
    (job,) = steward.jobs().values()
    assert (job.text, job.arrived) == (plan.to_json(), NOW.isoformat(timespec="seconds"))
    assert steward.waiting() == []


@pytest.mark.parametrize(
    "change",
    [
        {"rounds": 3}, {"seed": 1}, {"run_id": "another"}, {"bundle_sha256": "ab" * 32},
        {"coordinator_key": "ab" * 32}, {"expires": "2026-12-02"}, {"starts": {}},
    ],
)  # fmt: skip
def test_an_approval_holds_for_one_plan_to_the_bit(
    steward: Steward, plan: RunPlan, change: dict[str, Any]
) -> None:
    approved(steward, plan)
    with pytest.raises(ConsentPending):
        steward.hear(replace(plan, **change))


def _field(name: str, value: object) -> Callable[[Path, Path], None]:
    def change(job: Path, answer: Path) -> None:
        body = json.loads(answer.read_text())
        assert body["approval"][name] != value
        body["approval"][name] = value
        answer.write_text(json.dumps(body))

    return change


def _answer(text: str) -> Callable[[Path, Path], None]:
    return lambda job, answer: answer.write_text(text) and None  # type: ignore[return-value]


def _job(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Path], None]:
    def act(job: Path, answer: Path) -> None:
        body = json.loads(job.read_text())
        change(body)
        job.write_text(json.dumps(body))

    return act


@pytest.mark.parametrize(
    "damage",
    [
        _field("schema", 2), _field("site", "west"), _field("plan_sha256", "0" * 64), _field("rounds", 9),
        _field("expires", ""), _field("expires", "2099-01-01"), _field("who", "N. Obody"),
        _field("at", "2026-11-22"), _field("reason", "x"), _field("key", "ab" * 32), _field("sig", "ab" * 64),
        _field("answer", "refused"), _field("answer", "maybe"), _field("who", "a\nb"),
        _answer(""), _answer("{}"), _answer("not json"), _answer('{"approval": null, "note": ""}'),
        lambda job, answer: job.unlink(),
        lambda job, answer: answer.write_bytes(b"\xff\xfe"),
        _job(lambda body: body.update(text=body["text"].replace('"rounds":2', '"rounds":3'))),
        _job(lambda body: body.update(schema=2)),
        _job(lambda body: body.pop("arrived")),
    ],
)  # fmt: skip
def test_whatever_is_damaged_is_a_no(
    steward: Steward, plan: RunPlan, damage: Callable[[Path, Path], None]
) -> None:
    approved(steward, plan)
    damage(steward.folder / f"{plan.digest}.json", steward.folder / f"{plan.digest}.answer.json")
    assert refused(steward, plan) == steward.standing(plan) == "damaged"


def test_only_what_the_sites_key_signed_is_an_approval(
    steward: Steward, plan: RunPlan, home: Path, tmp_path: Path
) -> None:
    approved(steward, plan)
    (home / SIGNING_KEY).unlink()
    create_key(home / SIGNING_KEY)
    assert refused(steward, plan) == "damaged"
    steward.approve(plan, "M. Ruiz")
    assert steward.check(plan) is not None
    (home / SIGNING_KEY).unlink()
    assert refused(steward, plan) == "damaged"
    with pytest.raises(ArtefactError, match="no private key"):
        steward.approve(plan, "M. Ruiz")


def test_an_approval_ends_with_its_last_day_and_with_the_plans(
    steward: Steward, plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    approved(steward, plan)
    steward.approve(plan, "M. Ruiz", until="2026-11-25")
    for day, holds in ((25, True), (26, False)):
        monkeypatch.setattr(client.steward, "now", lambda day=day: NOW.replace(day=day))
        if holds:
            assert steward.check(plan) is not None
        else:
            assert refused(steward, plan) == steward.standing(plan) == "expired"
    steward.approve(plan, "M. Ruiz")
    assert steward.check(plan) is not None
    monkeypatch.setattr(client.steward, "now", lambda: NOW + timedelta(days=11))
    assert refused(steward, plan) == "expired"
    with pytest.raises(UsageError, match="last day was"):
        steward.approve(plan, "M. Ruiz")


@pytest.mark.parametrize("expires", ["tomorrow", "2026-1-1", "20261231", "2026-02-30"])
def test_a_last_day_that_is_no_day_has_passed(steward: Steward, smoke_plan: RunPlan, expires: str) -> None:
    assert refused(steward, replace(smoke_plan, expires=expires)) == "expired"


@pytest.mark.parametrize("until", ["2026-11-20", "2026-12-02", "soon", "2026-1-1"])
def test_an_approval_may_end_before_the_plan_and_not_after(
    steward: Steward, plan: RunPlan, until: str
) -> None:
    with pytest.raises(UsageError, match="--until"):
        steward.approve(plan, "M. Ruiz", until)


@pytest.mark.parametrize("text", ["", "{}", "garbage"])
def test_a_stop_counts_whatever_is_in_its_file_and_whoever_is_asked(
    home: Path, plan: RunPlan, text: str
) -> None:
    for asks in (True, False):
        steward = Steward(Site.open(home), asks)
        if asks:
            approved(steward, plan)
        (home / STOPPED).write_text(text)
        assert refused(steward, plan) == "stopped"
        assert steward.undo_stop()
        steward.check(plan)
        assert not steward.undo_stop()


def test_a_refusal_takes_an_approval_back_and_keeps_its_reason_at_home(
    steward: Steward, plan: RunPlan
) -> None:
    approved(steward, plan)
    word = steward.refuse(plan, "M. Ruiz", "too many rounds", tell=False)
    assert refused(steward, plan) == "refused"
    assert (word.answer, word.reason) == (Verdict.refused, "")
    assert steward.refusal_of(plan) == word
    answer = steward.answer(plan)
    assert answer is not None
    assert answer.note == "too many rounds"
    assert steward.refuse(plan, "M. Ruiz", "too many rounds", tell=True).reason == "too many rounds"


@pytest.mark.parametrize("text", ["two\nlines", "x" * 201, "\x1b[2J"])
def test_what_people_write_is_one_plain_line(steward: Steward, plan: RunPlan, text: str) -> None:
    with pytest.raises(UsageError):
        steward.refuse(plan, "M. Ruiz", text, tell=True)
    with pytest.raises(UsageError):
        steward.approve(plan, text)


def test_only_orders_of_the_approved_plan_are_heeded(steward: Steward, smoke_plan: RunPlan) -> None:
    approved(steward, smoke_plan)
    start = [smoke_plan.starts["adapt.base.8"]]

    def field(stage: Stage, index: int, sent: list[str]) -> str:
        try:
            steward.heed(smoke_plan, Round(smoke_plan.digest, stage, index, 60.0, "n"), sent)
        except ConsentRefused as refusal:
            return refusal.field
        return ""

    assert field(Stage.adapt, 0, start) == field(Stage.adapt, 1, ["another"]) == ""
    assert field(Stage.student, 0, ["another"]) == field(Stage.style, 0, []) == ""
    assert field(Stage.adapt, 0, ["another"]) == field(Stage.adapt, 0, []) == "starts"
    for stage, index in ((Stage.adapt, 2), (Stage.adapt, -1), (Stage.style, 1), (Stage.generator, 0)):
        assert field(stage, index, start) == "rounds"


def test_no_more_rounds_are_worked_on_than_were_approved(
    steward: Steward, smoke_plan: RunPlan, home: Path
) -> None:
    word = approved(steward, smoke_plan)
    fewer = replace(word, rounds=1).signed(SiteKeys.open(home).signer)
    path = steward.folder / f"{smoke_plan.digest}.answer.json"
    path.write_text(json.dumps({"approval": asdict(fewer), "note": ""}))
    second = Round(smoke_plan.digest, Stage.adapt, 1, 60.0, "n")
    with pytest.raises(ConsentRefused) as refusal:
        steward.heed(smoke_plan, second, ["any"])
    assert refusal.value.field == "rounds"


def test_a_coordinator_cannot_fill_the_disk_with_plans(
    steward: Steward, plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.steward, "MOST_WAITING", 3)
    assert MOST_WAITING >= 3
    for seed in range(3):
        with pytest.raises(ConsentPending):
            steward.hear(replace(plan, seed=100 + seed))
    with pytest.raises(ConsentRefused) as full:
        steward.hear(plan)
    assert full.value.field == "jobs"
    assert len(steward.jobs()) == 3
    steward.refuse(replace(plan, seed=100), "M. Ruiz", "no", tell=False)
    with pytest.raises(ConsentPending):
        steward.hear(plan)


def test_a_job_is_found_by_the_beginning_of_its_digest(steward: Steward, plan: RunPlan) -> None:
    with pytest.raises(ConsentPending):
        steward.hear(plan)
    assert steward.find(plan.digest[:8]).plan == plan
    for name in (plan.digest[:3], "", "ffffffff" if plan.digest[0] != "f" else "00000000"):
        with pytest.raises(UsageError, match=plan.digest[:12]):
            steward.find(name)


def test_damaged_jobs_are_all_named_at_once(steward: Steward, plan: RunPlan) -> None:
    for seed in (1, 2):
        with pytest.raises(ConsentPending):
            steward.hear(replace(plan, seed=seed))
    for path in steward.folder.iterdir():
        path.write_text("{")
    with pytest.raises(ArtefactError) as broken:
        steward.jobs()
    assert len(broken.value.faults) == 2


@pytest.mark.parametrize(
    ("said", "own_process", "asks"),
    [
        (None, True, True),
        (None, False, False),
        (Consent.ask, False, True),
        (Consent.policy, True, False),
    ],
)
def test_a_guard_in_its_own_process_asks_unless_the_site_says_otherwise(
    home: Path, plan: RunPlan, said: Consent | None, own_process: bool, asks: bool
) -> None:
    save_site(SiteFile("east", consent=said), home / "site.yaml")
    steward = Steward.of_guard(Site.open(home), own_process)
    if asks:
        approved(steward, plan)
        assert steward.by_policy(plan) is None
    else:
        assert steward.check(plan) is None
        word = steward.by_policy(plan)
        assert word is not None
        assert list(word.word_faults("east", SiteKeys.open(home).public, plan.digest)) == []


def test_a_guard_in_the_couriers_process_takes_no_plan_that_wants_answers_sealed(
    home: Path, plan: RunPlan
) -> None:
    sealed = replace(plan, coordinator_key="ab" * 32)
    order = Round(sealed.digest, Stage.propose, 0, 60.0, "n")
    answer = Guard(Site.open(home)).propose(sealed, order)
    assert (answer.code, answer.field) == (PolicyRefusal.border_code, "coordinator_key")


def test_nothing_is_booked_or_opened_for_a_plan_that_nobody_has_approved(home: Path, plan: RunPlan) -> None:
    """The site has no data at all, and no ledger: a pending answer needs neither."""
    order = Round(plan.digest, Stage.propose, 0, 60.0, "n")
    answer = Guard(Site.open(home), own_process=True).propose(plan, order)
    assert (answer.agrees, answer.code, answer.field) == (False, "PENDING", "approval")
    assert answer.approval is None
    assert not (home / "plan.json").exists()
