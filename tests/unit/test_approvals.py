"""The coordinator's side of consent: whose node is whose, what is kept, and what a submission holds."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import server.approvals
import server.submission
from common.approval import Approval, Verdict
from common.canonical import canonical_json
from common.config import load_recipe
from common.errors import ArtefactError, ConfigError, PolicyRefusal
from common.guard_api import PlanAnswer
from common.network.identity import fingerprint_of_pem
from common.plan import RunPlan
from common.privacy.keys import public_key
from common.recipe import Recipe
from common.wire.sealed import create_sealing_key
from server.approvals import ApprovalBook, Standing, State, invite
from server.collect import Collector
from server.invited import Invited, locate, read_roster, write_roster
from server.planning import build_plan
from server.submission import PLAN_FILE, SEALING_KEY, Asked, Submission, submit

KEYS = {site: Ed25519PrivateKey.generate() for site in ("east", "west")}
NODES = {site: ec.generate_private_key(ec.SECP384R1()) for site in KEYS}
NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


def pem(site: str) -> bytes:
    public = NODES[site].public_key()
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


ROSTER = {site: Invited(site, fingerprint_of_pem(pem(site)), public_key(KEYS[site])) for site in KEYS}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("smoke", ["baselines=[]"])


@pytest.fixture
def job(tmp_path: Path, smoke_plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> Submission:
    monkeypatch.setattr(server.approvals, "now", lambda: NOW)
    key = create_sealing_key(tmp_path / SEALING_KEY)
    plan = replace(smoke_plan, coordinator_key=key, expires="2026-12-01")
    write_roster(tmp_path / "roster.json", ROSTER.values())
    (tmp_path / PLAN_FILE).write_text(plan.to_json())
    found = Submission.load(tmp_path)
    assert found is not None
    return found


def answer(job: Submission, site: str = "east", verdict: Verdict = Verdict.approved) -> PlanAnswer:
    word = Approval.of(site, job.plan, verdict, "M. Ruiz", NOW).signed(KEYS[site])
    return PlanAnswer(site, verdict is Verdict.approved, job.plan.digest, approval=word)


def standing(job: Submission, site: str = "east") -> Standing:
    return next(one for one in ApprovalBook(job).standings() if one.site == site)


def test_what_a_site_signed_is_kept_as_it_is(job: Submission) -> None:
    ApprovalBook(job).hear("east", answer(job))
    assert standing(job).state is State.approved
    assert (standing(job).who, standing(job).until) == ("M. Ruiz", "2026-12-01")
    assert standing(job, "west").state is State.unasked
    kept = (job.run_dir / "approvals" / "east.json").read_text()
    assert kept == canonical_json(asdict(answer(job).approval))  # type: ignore[arg-type]


def _by(job: Submission, **change: Any) -> PlanAnswer:
    """East's answer with a word that was changed after it was signed, or signed anew (``signer``)."""
    signer = change.pop("signer", None)
    word = answer(job).approval
    assert word is not None
    word = replace(word, **change)
    return replace(answer(job), approval=word if signer is None else word.signed(KEYS[signer]))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"rounds": 99}, "not signed"),
        ({"expires": ""}, "not signed"),
        ({"sig": ""}, "not signed"),
        ({"signer": "west"}, "not signed"),
        ({"key": public_key(KEYS["west"])}, "not signed"),
        ({"site": "west", "signer": "east"}, "another site"),
        ({"plan_sha256": "0" * 64, "signer": "east"}, "another plan"),
        ({"schema": 2, "signer": "east"}, "no form"),
        ({"who": "a\x1b[2J", "signer": "east"}, "no form"),
        ({"reason": "x" * 300, "signer": "east"}, "no form"),
    ],
)
def test_a_word_that_does_not_hold_is_not_kept(job: Submission, change: dict[str, Any], why: str) -> None:
    with pytest.raises(ArtefactError) as refused:
        ApprovalBook(job).hear("east", _by(job, **change))
    assert any(why in fault for fault in refused.value.faults)
    assert standing(job).state is State.unasked


def test_the_node_of_one_site_cannot_answer_for_another(job: Submission) -> None:
    with pytest.raises(ArtefactError, match="another site's name"):
        ApprovalBook(job).hear("east", answer(job, "west"))
    with pytest.raises(ArtefactError):
        ApprovalBook(job).hear("east", replace(answer(job, "west"), site="east"))
    assert not ApprovalBook(job).approved()


def test_a_site_goes_along_with_its_signature_or_not_at_all(job: Submission) -> None:
    with pytest.raises(ArtefactError, match="without a signed approval"):
        ApprovalBook(job).hear("east", replace(answer(job), approval=None))
    with pytest.raises(ArtefactError, match="contradicts"):
        ApprovalBook(job).hear("east", replace(answer(job), agrees=False))
    no = answer(job, verdict=Verdict.refused)
    with pytest.raises(ArtefactError, match="contradicts"):
        ApprovalBook(job).hear("east", replace(no, agrees=True))
    ApprovalBook(job).hear("east", no)
    assert standing(job).state is State.refused


@pytest.mark.parametrize("damage", ["", "{}", '{"schema": 1}'])
def test_a_damaged_approval_is_none(job: Submission, damage: str) -> None:
    ApprovalBook(job).hear("east", answer(job))
    path = job.run_dir / "approvals" / "east.json"
    text = path.read_text()
    path.write_text(damage or text.replace("M. Ruiz", "N. Ruiz"))
    assert standing(job).state is State.damaged


def test_an_approval_that_has_expired_is_none(job: Submission, monkeypatch: pytest.MonkeyPatch) -> None:
    ApprovalBook(job).hear("east", answer(job))
    monkeypatch.setattr(server.approvals, "now", lambda: NOW + timedelta(days=11))
    assert standing(job).state is State.expired
    assert ApprovalBook(job).approved() == []


def test_since_is_when_a_site_came_to_stand_so(job: Submission) -> None:
    book = ApprovalBook(job)
    book.saw({"east": Standing("east", State.pending, "monday", why="PENDING")})
    book.saw({"east": Standing("east", State.pending, "tuesday", why="PENDING")})
    assert standing(job).since == "monday"
    book.saw({"east": Standing("east", State.unreachable, "wednesday")})
    assert (standing(job).state, standing(job).since) == (State.unreachable, "wednesday")
    (job.run_dir / "approvals" / "asked.json").write_text("damaged")
    assert standing(job).state is State.unasked  # it decides nothing


def test_without_enough_approvals_nobody_is_looked_for(job: Submission, recipe: Recipe) -> None:
    ApprovalBook(job).hear("east", answer(job))
    with pytest.raises(PolicyRefusal) as refused:
        invite(cast(Collector, None), recipe, job)  # any use of the collector would raise another error
    assert refused.value.faults == ("east: approved", "west: unasked")


# ---- whose node is whose ------------------------------------------------------------------------


def grid(*nodes: tuple[int, bytes, str]) -> Collector:
    infos = [SimpleNamespace(node_id=number, public_key=key, name=name) for number, key, name in nodes]
    return cast(Collector, SimpleNamespace(grid=SimpleNamespace(get_nodes=lambda: infos)))


def test_a_node_is_a_sites_by_its_key_alone() -> None:
    stranger = ec.generate_private_key(ec.SECP384R1()).public_key()
    key = stranger.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    found = grid((7, key, "east"), (8, pem("east"), "anything"), (9, b"", "west"), (10, b"no key", "west"))
    assert locate(found, ROSTER, 0.0) == {"east": 8}
    assert locate(found, {}, 0.0) == {}


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("", 0), ("{", 0), ('{"schema":1}', 0), ('{"schema":2,"sites":[]}', 1),
        ('{"schema":1,"sites":[{"site":"../x","node":"ab","ledger_key":"cd"}]}', 3),
    ],
)  # fmt: skip
def test_a_roster_is_read_strictly_with_every_fault(tmp_path: Path, text: str, faults: int) -> None:
    (tmp_path / "roster.json").write_text(text)
    with pytest.raises(ArtefactError) as bad:
        read_roster(tmp_path / "roster.json")
    assert len(bad.value.faults) == faults


def test_two_sites_cannot_share_a_key(tmp_path: Path) -> None:
    twins = [ROSTER["east"], replace(ROSTER["east"], site="west")]
    write_roster(tmp_path / "roster.json", twins)
    with pytest.raises(ArtefactError) as bad:
        read_roster(tmp_path / "roster.json")
    assert len(bad.value.faults) == 2


# ---- the submission -----------------------------------------------------------------------------


def test_a_submission_is_the_plan_that_the_recipe_gives(tmp_path: Path, recipe: Recipe) -> None:
    asked = Asked(ROSTER, days=10, bundle_sha256="ab" * 32)
    plan = submit(recipe, tmp_path / "run", asked, date(2099, 11, 21))
    job = Submission.load(tmp_path / "run")
    assert job is not None
    assert (plan.expires, plan.bundle_sha256) == ("2099-12-01", "ab" * 32)
    assert job.plan == plan
    assert job.roster == ROSTER
    again = build_plan(recipe, plan.run_id, terms=job.terms)
    job.check(again)
    with pytest.raises(ArtefactError, match=r"seed: 0 as submitted, 1 now"):
        job.check(replace(again, seed=1))
    over = replace(again, expires="2026-01-01")
    with pytest.raises(PolicyRefusal, match="2026-01-01"):
        replace(job, plan=over).check(over)


def test_every_fault_of_a_submission_is_named_at_once(tmp_path: Path) -> None:
    recipe = load_recipe("smoke", ["baselines=[centralised]"])
    with pytest.raises(ConfigError) as bad:
        submit(recipe, tmp_path, Asked({"west": ROSTER["west"]}, 1, "no digest"), NOW.date())
    text = "\n".join(bad.value.faults)
    assert len(bad.value.faults) == 3
    assert "baselines" in text
    assert "east" in text
    assert "SHA-256" in text
    assert not list(tmp_path.iterdir())


def test_nothing_submitted_is_no_submission_and_a_damaged_one_is_an_error(
    job: Submission, tmp_path: Path
) -> None:
    assert Submission.load(tmp_path / "elsewhere") is None
    path = job.run_dir / PLAN_FILE
    body = json.loads(path.read_text())
    for damaged in ("{", json.dumps(body | {"coordinator_key": "ab" * 32})):
        path.write_text(damaged)
        with pytest.raises(ArtefactError, match="submit the run anew"):
            Submission.load(job.run_dir)
