"""The executor's decisions, over a SuperNode and a launcher that are made up."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, AcquireTaskResponse
from flwr.proto.task_pb2 import Task

import client.network.executing as executing
import client.network.executor as executor
from client.network.approved import APPROVED, ApprovedBundles
from client.network.executing import SECRET, Settings, execute
from client.network.executor import MOST_AT_ONCE, TASKS, Node, SiteExecutor
from client.network.task import TOKEN, Program
from common.config import save_site
from common.errors import ConfigError, FederationError
from common.recipe import SiteFile

GOOD, BAD = "a" * 64, "b" * 64
QUICK, FAILING, ENDLESS = "pass", "raise SystemExit(3)", "import time; time.sleep(60)"


def task(number: int, fab: str) -> AcquireTaskResponse:
    return AcquireTaskResponse(task=Task(task_id=number, fab_hash=fab), token=f"token-{number}")


def refused(status: int) -> Exception:
    request = httpx.Request("POST", "http://node")
    return httpx.HTTPStatusError("no", request=request, response=httpx.Response(status, request=request))


class FakeNode(Node):
    """Answers in turn; one without the secret hears 401, as from a SuperNode that has one."""

    answers: list[AcquireTaskResponse | Exception]
    stranger: list[Exception | None]

    def client(self, authorised: bool = True) -> Any:
        def acquire(request: AcquireTaskRequest) -> AcquireTaskResponse:
            source: list[Any] = self.answers if authorised else self.stranger
            answer = source.pop(0) if source else AcquireTaskResponse()
            if isinstance(answer, Exception):
                raise answer
            return answer or AcquireTaskResponse()

        return SimpleNamespace(AcquireTask=acquire, close=lambda: None)


class FakeLauncher:
    """Notes what is to run, and runs ``code`` in its place."""

    def __init__(self, code: str = QUICK) -> None:
        self.code = code
        self.started: list[tuple[Program, str]] = []
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, program: Program, token: str) -> subprocess.Popen[bytes]:
        self.started.append((program, token))
        is_courier = isinstance(program.code, str)
        code = self.code if is_courier else QUICK
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        self.processes.append(process)
        return process


class Case:
    def __init__(self, folder: Path, *answers: AcquireTaskResponse | Exception, **options: Any) -> None:
        self.node = FakeNode("127.0.0.1:1", b"secret")
        object.__setattr__(self.node, "answers", list(answers))
        object.__setattr__(self.node, "stranger", options.pop("stranger", [refused(401)]))
        self.folder, self.lines = folder, list[str]()
        self.launcher = FakeLauncher(options.pop("code", QUICK))
        longest = options.pop("longest_s", 60.0)
        self.executor = SiteExecutor(folder, self.node, self.launcher, self.lines.append, longest)

    def run(self, turns: int = 12, between: Callable[[int], None] = lambda _: None) -> Case:
        left = [turns]

        def ended(_: float) -> bool:
            for process in self.launcher.processes:
                if "sleep" not in self.launcher.code:
                    process.wait(30)
            between(turns - left[0])
            left[0] -= 1
            return left[0] < 0

        self.executor.run(ended)
        return self

    def book(self) -> list[tuple[int, str | None, str]]:
        lines = (self.folder / TASKS).read_text().splitlines()
        return [(entry["task"], entry["bundle"], entry["verdict"]) for entry in map(json.loads, lines)]


def kinds(case: Case) -> list[str]:
    """What was started, in order: a courier, or the reason of a refusal."""
    return [
        "courier" if isinstance(program.code, str) else program.arguments[2]
        for program, _ in case.launcher.started
    ]


def test_the_list_is_read_for_every_task_and_both_outcomes_are_booked(tmp_path: Path) -> None:
    approved = ApprovedBundles(tmp_path)
    changes = {1: lambda: approved.approve(GOOD), 3: lambda: approved.revoke(GOOD)}
    case = Case(tmp_path, task(1, GOOD), task(2, GOOD), task(3, BAD), task(4, GOOD))
    case.run(between=lambda turn: changes.get(turn, lambda: None)() and None)
    assert kinds(case) == ["unapproved", "courier", "unapproved", "unapproved"]
    assert case.book() == [
        (1, GOOD, "refused"), (2, GOOD, "approved"), (3, BAD, "refused"), (4, GOOD, "refused")
    ]  # fmt: skip


def test_the_token_is_handed_over_and_in_no_argument(tmp_path: Path) -> None:
    ApprovedBundles(tmp_path).approve(GOOD)
    case = Case(tmp_path, task(1, GOOD), task(2, BAD)).run()
    assert [token for _, token in case.launcher.started] == ["token-1", "token-2"]
    for program, token in case.launcher.started:
        assert TOKEN in program.arguments
        assert token not in " ".join(program.command(Path("python")))


def test_a_damaged_list_or_a_bundle_without_a_digest_is_refused(tmp_path: Path) -> None:
    ApprovedBundles(tmp_path).approve(GOOD)
    with (tmp_path / APPROVED).open("a") as file:
        file.write("nonsense\n")
    case = Case(tmp_path, task(1, GOOD), task(2, "")).run()
    assert kinds(case) == ["unapproved", "unapproved"]
    assert any("cannot be used" in line for line in case.lines)


def test_a_courier_that_fails_is_answered_for_once(tmp_path: Path) -> None:
    ApprovedBundles(tmp_path).approve(GOOD)
    case = Case(tmp_path, task(1, GOOD), code=FAILING).run()
    assert kinds(case) == ["courier", "failed"]
    assert case.launcher.started[1][1] == "token-1"


def test_no_task_runs_longer_than_it_may_or_outlives_the_executor(tmp_path: Path) -> None:
    ApprovedBundles(tmp_path).approve(GOOD)
    case = Case(tmp_path, task(1, GOOD), code=ENDLESS, longest_s=0.0).run(turns=4)
    assert kinds(case) == ["courier", "failed"]
    case = Case(tmp_path, task(1, GOOD), code=ENDLESS).run(turns=3)
    assert kinds(case) == ["courier"]
    assert case.launcher.processes[0].poll() is not None


def test_what_a_task_writes_cannot_look_like_the_executor_or_fill_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "MOST_WRITTEN", 100)
    ApprovedBundles(tmp_path).approve(GOOD)
    forged = "task 9: bundle 00 is refused"
    code = f"print({forged!r} + chr(27) + '[2J'); print('x' * 200); [print('more') for _ in range(500)]"
    case = Case(tmp_path, task(1, GOOD), code=code).run(between=lambda _: time.sleep(0.1))
    assert case.lines == [
        "task 1: bundle aaaaaaaaaaaaaaaa is approved, its courier starts",
        f"task 1| {forged}?[2J",
        f"task 1| {'x' * 200}",
        "task 1: writes more than 100 bytes, which is not kept",
    ]


def test_only_so_many_tasks_run_at_once(tmp_path: Path) -> None:
    ApprovedBundles(tmp_path).approve(GOOD)
    tasks = [task(number, GOOD) for number in range(1, MOST_AT_ONCE + 3)]
    case = Case(tmp_path, *tasks, code=ENDLESS).run(turns=MOST_AT_ONCE + 5)
    assert len(case.launcher.started) == MOST_AT_ONCE


def test_a_supernode_without_a_secret_is_refused_with_the_fix(tmp_path: Path) -> None:
    case = Case(tmp_path, task(1, GOOD), stranger=[None])
    with pytest.raises(ConfigError, match="--superexec-auth-secret-file"):
        case.run()
    assert not case.launcher.started


def test_a_supernode_that_is_away_is_waited_for_and_another_program_is_named(tmp_path: Path) -> None:
    away = httpx.ConnectError("refused")
    case = Case(tmp_path, away, task(1, BAD), stranger=[away, away, refused(401), away, refused(401)]).run()
    assert kinds(case) == ["unapproved"]
    # Said once each time, not at every look.
    assert [line[:13] for line in case.lines[:3]] == ["no SuperNode ", "the SuperNode", "no SuperNode "]
    with pytest.raises(FederationError, match="404"):
        Case(tmp_path, stranger=[refused(404)]).run()
    with pytest.raises(FederationError, match="503"):
        Case(tmp_path, refused(503)).run()
    with pytest.raises(ConfigError, match="another secret"):
        Case(tmp_path, refused(401)).run()
    with pytest.raises(ValueError, match="a defect"):
        Case(tmp_path, ValueError("a defect")).run()


def settings(folder: Path, **more: Any) -> Settings:
    return Settings(folder, **{"node": "127.0.0.1:1", "socket": folder / "door" / "guard.sock", **more})


def test_no_sandbox_is_refused_unless_asked_for_and_then_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    save_site(SiteFile("east", "data/manifest.csv", None), tmp_path / "site.yaml")
    monkeypatch.setattr(executing, "sandbox_faults", lambda: ["only root makes namespaces: be root"])
    with pytest.raises(ConfigError, match="--no-sandbox") as wrong:
        execute(settings(tmp_path), lines.append)
    assert len(wrong.value.faults) == 2  # and there is no folder for the socket: both at once
    monkeypatch.setattr(SiteExecutor, "run", lambda self, ended: None)
    execute(settings(tmp_path, no_sandbox=True), lines.append)
    warning = next(line for line in lines if line.startswith("warning"))
    assert "images" in warning
    assert "key" in warning


def test_a_site_that_couriers_would_see_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executing, "sandbox_faults", list)
    images = tmp_path / "images"
    images.mkdir()
    site = tmp_path / "site"
    site.mkdir()
    save_site(SiteFile("east", str(images / "manifest.csv"), None), site / "site.yaml")
    for door, seen in ((site, site), (tmp_path, site), (images, images)):
        with pytest.raises(ConfigError) as wrong:
            execute(settings(site, socket=door / "guard.sock"), print)
        assert f"{seen} lies in {door}, which couriers see: move one of the two" in wrong.value.faults
    monkeypatch.setattr(sys, "prefix", str(site))  # a virtual environment made in the site's folder itself
    (tmp_path / "door").mkdir()
    with pytest.raises(ConfigError) as wrong:
        execute(settings(site, socket=tmp_path / "door" / "guard.sock"), print)
    assert wrong.value.faults == (f"{site} lies in {site}, which couriers see: move one of the two",)


def test_a_link_that_leaves_the_machine_needs_tls(tmp_path: Path) -> None:
    for node in ("node.hospital.example:9094", "10.0.0.3:9094", "0.0.0.0:9094"):
        with pytest.raises(ConfigError, match="--root-certificates"):
            execute(settings(tmp_path, node=node, no_sandbox=True), print)


def test_the_secret_is_made_once_and_others_may_not_read_it(tmp_path: Path) -> None:
    made = executing._secret(settings(tmp_path))
    assert len(made) == 64
    assert executing._secret(settings(tmp_path)) == made
    assert (tmp_path / SECRET).stat().st_mode & 0o777 == 0o600
    (tmp_path / SECRET).chmod(0o644)
    with pytest.raises(ConfigError, match="chmod"):
        executing._secret(settings(tmp_path))
