"""The guard in a process of its own: the same federation, and a courier that finds nothing else there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from flwr.app import Message

from client.app import app as client_app
from client.orders import ORDERS
from common import wire
from common.config import load_recipe, save_run_config
from common.errors import ArtefactError
from common.guard_link.service import describe
from common.plan import Round, Stage
from common.privacy.keys import SiteKeys
from common.wire.signed import signer_of
from simulations import simulate
from simulations.loopback import LoopbackGrid, drive, task_identity
from tests.e2e import walks

START_S = 300.0
SITES = ("east", "west")


@contextmanager
def guards(homes: dict[str, Path], sockets: dict[str, Path]) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """A guard's process a site, from the command line; all of them are gone afterwards."""
    started = {}
    try:
        for site, home in homes.items():
            command = [sys.executable, "-m", "wardround", "site", "guard", home, "--socket", sockets[site]]
            started[site] = subprocess.Popen(
                command, env=walks.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        for site, process in started.items():
            wait_for(sockets[site], process)
        yield started
    finally:
        for process in started.values():
            process.terminate()
        for process in started.values():
            process.communicate(timeout=30)


def wait_for(socket: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + START_S
    while describe(socket, 1.0) is None:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < end, "no guard listens"
        time.sleep(0.2)


class GuardedGrid(LoopbackGrid):
    """Its nodes know their guards' sockets, as a SuperNode's configuration says."""

    def __init__(self, sockets: list[Path]) -> None:
        super().__init__(self._kept, len(sockets))
        for context, socket in zip(self._contexts.values(), sockets, strict=True):
            context.node_config = {"guard": f"unix:{socket}"}
        self.requests: list[Message] = []
        self.replies: list[tuple[str, Round, wire.Content]] = []

    def _kept(self, message: Message, context: object) -> Message:
        order = wire.decode_order(message.content)
        self.requests.append(message)
        reply = client_app(message, context)  # type: ignore[arg-type]
        self.replies.append((message.metadata.message_type, order, reply.content))
        return reply


@dataclass(frozen=True)
class Federation:
    """One run over guards in their own processes, and the same in one process."""

    run: Path
    homes: dict[str, Path]
    reference: Path
    again: wire.Content  # what a guard said to a message that it had answered before
    restarted: wire.Content  # and another guard in its place
    order: Round  # of that message
    signers: list[tuple[str, str]]  # (site, action) of every answer of the run whose signature holds
    out: dict[str, str]
    codes: dict[str, int]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    root = tmp_path_factory.mktemp("guarded")
    recipe = load_recipe("smoke", ["baselines=[]"])
    reference = simulate.simulate(recipe, root / "reference", resume=False)
    simulate.prepare_sites(recipe, root / "homes")
    run = root / "run"
    run.mkdir()
    save_run_config(recipe, run / "config.yaml")
    homes, doors = {site: root / "homes" / site for site in SITES}, {}
    for site in SITES:
        (folder := root / f"door-{site}").mkdir(mode=0o750)
        doors[site] = folder / "guard.sock"
    grid = GuardedGrid([doors[site] for site in SITES])
    with guards(homes, doors) as processes:
        drive(grid, run, root / "nowhere")
        keys = {site: SiteKeys.open(home).public for site, home in homes.items()}
        signers = [(signer_of(content, order, keys), action) for action, order, content in grid.replies]
        told = next(m for m in grid.requests if m.metadata.message_type == wire.ACTIONS[Stage.style])
        context = next(iter(grid._contexts.values()))
        again = client_app(told, context).content
        out, codes = {}, {}
        for site, process in processes.items():
            process.send_signal(signal.SIGTERM if site == "east" else signal.SIGKILL)
            out[site], _ = process.communicate(timeout=60)
            codes[site] = process.returncode
    with guards({"east": homes["east"]}, doors):
        restarted = client_app(told, context).content
    order = wire.decode_order(told.content)
    return Federation(run, homes, reference, again, restarted, order, signers, out, codes)


def test_a_federation_over_guards_of_their_own_is_the_simulation(federation: Federation) -> None:
    card = json.loads((federation.run / "teacher" / "card.json").read_text())
    assert card["adapter_sha256"] == walks.report_of(federation.reference).teacher.adapter_sha256
    for site, home in federation.homes.items():
        ours, theirs = (
            json.loads((folder / "student.json").read_text())["sha256"]
            for folder in (home, federation.reference / "sites" / site)
        )
        assert ours == theirs


def test_every_outgoing_payload_has_its_receipt_at_its_site(federation: Federation) -> None:
    for site, home in federation.homes.items():
        ours = [json.loads(line) for line in (home / "receipts.jsonl").read_text().splitlines()]
        taken = [json.loads(line) for line in (home / ORDERS).read_text().splitlines()]
        answered = dict.fromkeys((entry["stage"], entry["round"]) for entry in ours)
        assert list(answered) == [(entry["stage"], entry["index"]) for entry in taken]
        theirs = walks.receipts_of(federation.reference, site)
        assert [entry["name"] for entry in ours] == [entry["name"] for entry in theirs]


def test_an_order_is_answered_once_after_a_restart_too(federation: Federation) -> None:
    for content in (federation.again, federation.restarted):
        refused = wire.decode_refusal(content)
        assert refused is not None
        assert (refused.code, refused.field) == ("REFUSED_POLICY", "order")


def test_every_answer_is_signed_by_the_site_for_its_order(federation: Federation) -> None:
    keys = {site: SiteKeys.open(home).public for site, home in federation.homes.items()}
    assert keys["east"] in federation.out["east"]  # the guard says whom to trust
    assert set(federation.signers) == {(site, stage) for site in SITES for stage in wire.ACTIONS.values()} - {
        (site, wire.ACTIONS[stage]) for site in SITES for stage in (Stage.generator, Stage.shared_student)
    }
    for content in (federation.again, federation.restarted):  # a refusal too
        assert signer_of(content, federation.order, keys) == "east"
    order = replace(federation.order, nonce="another")
    with pytest.raises(ArtefactError):
        signer_of(federation.again, order, keys)


def test_a_guard_ends_when_it_is_told_to_and_says_who_it_is(federation: Federation) -> None:
    assert federation.codes == {"east": 0, "west": -signal.SIGKILL}
    assert federation.out["east"].startswith("guard of east on ")
    assert federation.out["east"].endswith("guard of east ended\n")


def test_without_its_guard_a_courier_refuses_with_a_code_alone(
    federation: Federation, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    grid = GuardedGrid([tmp_path / "nobody.sock"])
    order = wire.encode_request(Round("0" * 64, Stage.style, 0, 5.0, "n"))
    with task_identity():
        message = wire.request_message(order, 1000, Stage.style, 5.0)
        reply = client_app(message, next(iter(grid._contexts.values()))).content
    refused = wire.decode_refusal(reply)
    assert refused is not None
    assert refused.code == "GUARD_UNREACHABLE"
    assert str(tmp_path).encode() not in wire.pack_content(reply)
    assert "wardround site guard" in capfd.readouterr().err  # for the hospital's own people
