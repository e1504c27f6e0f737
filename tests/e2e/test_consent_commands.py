"""The data steward's commands, and the coordinator's, as people type them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client.app import app as client_app
from client.guard_process import answering
from client.site import Site
from common import wire
from common.config import load_recipe, load_site, save_site
from common.plan import Round, RunPlan, Stage
from common.privacy.keys import SiteKeys
from common.recipe import SiteFile
from server.invited import Invited, write_roster
from simulations import simulate
from simulations.loopback import task_identity
from tests.e2e import walks
from tests.integration.test_guard_process import GuardedGrid, guards

Door = Callable[[Stage, wire.Content], wire.Content]


@pytest.fixture
def hospital(elsewhere: Path) -> Path:
    (home := elsewhere / "east").mkdir()
    save_site(SiteFile("east"), home / "site.yaml")
    SiteKeys.create(home)
    return home


@pytest.fixture
def roster(elsewhere: Path, hospital: Path) -> Path:
    sites = [
        Invited("east", "ab" * 32, SiteKeys.open(hospital).public),
        Invited("west", "cd" * 32, "ef" * 32),
    ]
    write_roster(elsewhere / "roster.json", sites)
    return elsewhere / "roster.json"


def submitted(roster: Path, out: str, *settings: str) -> RunPlan:
    done = walks.invoke(
        "consortium", "submit", "smoke", "baselines=[]", *settings, "--roster", roster, "--out", out,
        "--expires", "30", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    plan = RunPlan.from_json(Path(out, "plan.json").read_text())
    assert json.loads(done.stdout)["plan_sha256"] == plan.digest
    return plan


def proposed(hospital: Path, plan: RunPlan, nonce: str) -> tuple[str, str]:
    """(code, field) of what the site's guard, started anew, says to ``plan``."""
    order = Round(plan.digest, Stage.propose, 0, 60.0, nonce)
    content = wire.encode_proposal(order, plan)
    reply = answering(hospital, Site.open(hospital))(Stage.propose, content)
    told = wire.decode_refusal(reply) or wire.decode_answer(reply)
    return told.code, told.field


def ok(*arguments: str | Path) -> str:
    done = walks.invoke(*arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def listed(hospital: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ok("site", "jobs", hospital, "--json"))
    return found


def test_a_job_from_its_submission_to_a_stop(hospital: Path, roster: Path) -> None:
    assert ok("site", "jobs", hospital) == "no job was put to this site\n"
    first, second = submitted(roster, "first"), submitted(roster, "second", "run.rounds=5")
    assert proposed(hospital, first, "1") == proposed(hospital, second, "2") == ("PENDING", "approval")
    assert {row["plan_sha256"]: row["state"] for row in listed(hospital)["jobs"]} == {
        first.digest: "pending",
        second.digest: "pending",
    }

    said = ok("site", "approve", hospital, first.digest[:10], "--officer", "M. Ruiz")
    assert said.startswith(f"approved {first.digest}, last day {first.expires}")
    # Past consent now, and on to what it says of its data, of which there are none.
    assert proposed(hospital, first, "3")[0] != "PENDING"
    assert proposed(hospital, second, "4") == ("PENDING", "approval")

    shown = ok("site", "jobs", hospital, second.digest[:10])
    assert f"against {first.digest[:12]}, which was approved last:" in shown
    assert "  rounds: 2 -> 5\n" in shown
    assert "adapt          5 x at most" in shown
    detail = json.loads(ok("site", "jobs", hospital, second.digest[:10], "--json"))
    assert {"key": "rounds", "before": 2, "now": 5} in detail["changes"]
    assert detail["last_approved"] == first.digest

    ok("site", "refuse", hospital, second.digest[:10], "--reason", "too many rounds")
    assert proposed(hospital, second, "5") == ("REFUSED_CONSENT", "refused")
    assert "(too many rounds)" in ok("site", "jobs", hospital, second.digest[:10])

    ok("site", "stop", hospital)
    assert proposed(hospital, first, "6") == ("REFUSED_CONSENT", "stopped")
    assert listed(hospital)["stopped"] is True
    assert ok("site", "jobs", hospital).startswith("STOPPED")
    assert ok("site", "stop", hospital, "--undo") == "takes part again\n"
    assert proposed(hospital, first, "7")[1] != "stopped"


def test_a_running_guard_hears_an_approval_and_a_stop_at_once(roster: Path, elsewhere: Path) -> None:
    """In its own process, behind its socket, and never started again in between."""
    plan = submitted(roster, "run", "generator.scope=none")
    simulate.prepare_sites(load_recipe("smoke"), elsewhere / "homes")
    home = elsewhere / "homes" / "east"
    save_site(replace(load_site(home / "site.yaml"), consent=None), home / "site.yaml")
    SiteKeys.create(home)
    (elsewhere / "door").mkdir(mode=0o750)
    sockets = {"east": elsewhere / "door" / "guard.sock"}

    def told(nonce: str) -> tuple[str, str]:
        order = Round(plan.digest, Stage.propose, 0, 60.0, nonce)
        with task_identity():
            message = wire.request_message(wire.encode_proposal(order, plan), 1000, Stage.propose, 60.0)
            reply = client_app(message, next(iter(grid._contexts.values()))).content
        answer = wire.decode_refusal(reply) or wire.decode_answer(reply)
        return answer.code, answer.field

    with guards({"east": home}, sockets):
        grid = GuardedGrid(list(sockets.values()))
        assert told("1") == ("PENDING", "approval")
        ok("site", "approve", home, plan.digest[:8])
        assert told("2") == ("", "")
        ok("site", "stop", home)
        assert told("3") == ("REFUSED_CONSENT", "stopped")
        ok("site", "stop", home, "--undo")
        assert told("4") == ("", "")
        ok("site", "refuse", home, plan.digest[:8], "--reason", "enough")
        assert told("5") == ("REFUSED_CONSENT", "refused")


def test_the_plan_of_a_job_can_be_taken_out_to_draft_a_policy_for_it(
    hospital: Path, roster: Path, elsewhere: Path
) -> None:
    plan = submitted(roster, "run")
    proposed(hospital, plan, "1")
    ok("site", "jobs", hospital, plan.digest[:8], "--plan", "asked.json")
    assert (elsewhere / "asked.json").read_bytes() == (elsewhere / "run" / "plan.json").read_bytes()


def test_status_says_where_each_site_stands(roster: Path) -> None:
    plan = submitted(roster, "run")
    text = ok("consortium", "status", "run")
    assert text.splitlines()[0] == f"job {plan.digest}: 0 of 2 sites have approved it"
    found = json.loads(ok("consortium", "status", "run", "--json"))
    assert [(one["site"], one["state"]) for one in found["sites"]] == [
        ("east", "unasked"),
        ("west", "unasked"),
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("site", "approve", "east", "abcdef12"), 2, "names 0 jobs"),
        (("site", "jobs", "east", "abc"), 2, "first 6 digits"),
        (("site", "jobs", "east", "--plan", "x"), 2, "Name it"),
        (("site", "refuse", "east", "abcdef12"), 2, "--reason"),
        (("consortium", "status", "nowhere"), 2, "consortium submit"),
        (("consortium", "submit", "smoke", "--roster", "roster.json", "--out", "east"), 2, "not empty"),
        (("consortium", "submit", "smoke", "--roster", "nowhere", "--out", "new"), 12, "cannot be read"),
        (("consortium", "submit", "smoke", "--roster", "short.json", "--out", "new"), 10, "west"),
    ],
)
def test_a_mistake_is_named_and_has_its_exit_code(
    hospital: Path, roster: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    write_roster(roster.with_name("short.json"), [Invited("east", "ab" * 32, "cd" * 32)])
    done = walks.invoke(*arguments)
    assert (done.exit_code, words in done.output) == (code, True), done.output
