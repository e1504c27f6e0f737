"""A consortium of hospitals that all are this machine: every part a process of its own, over TLS on loopback.

What hospitals do at different places is done here one after the other: keys, requests and kits, the word of
each on the job. Then the run goes its whole way: nginx, SuperLink, SuperNodes, executors, couriers, guards.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from client.egress import RECEIPTS
from client.network.approved import ApprovedBundles
from client.network.joining import REQUEST, SITE_FILE, prepare_site, take_kit
from client.network.task import sandbox_faults
from client.site import Site
from client.steward import Steward
from common.canonical import sha256_of
from common.config import load_site, save_site
from common.errors import DeadlinePassed
from common.guard_link.service import describe
from common.network.children import Child, wait_until
from common.network.documents import read_request
from common.plan import RunPlan
from common.recipe import Consent, Recipe
from common.release import build_bundle, bundle_code_sha256
from server.network.consortium import Consortium, Settings
from server.network.membership import add_member
from server.network.runs import roster_of, work
from server.network.service import attend, online, served
from server.submission import Asked, submit
from simulations.simulate import prepare_sites

START_S = 180.0
FIRST_GROUP = 61000  # of the sites' sockets: numbers that no user of an ordinary machine has
STEWARD = "the demonstration"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Left:
    """What left one hospital: ``payloads`` of ``stage``, ``bytes`` in all."""

    site: str
    stage: str
    payloads: int
    bytes: int


@dataclass(frozen=True)
class Outcome:
    run_dir: Path
    adapter_sha256: str
    left: list[Left]


def run_network(recipe: Recipe, folder: Path, say: Say, stopped: Callable[[float], bool]) -> Outcome:
    """Run ``recipe`` between processes; ``folder`` is empty and keeps a folder for each of them.

    Guarantee: every process that was started has ended when this returns or raises.

    Raises:
        ConfigError: nginx is missing, a port is taken, or the recipe cannot run between hospitals.
        DeadlinePassed: a part did not start. RunEnded: what the run ended with.
    """
    now = datetime.now(UTC)
    names = prepare_sites(recipe, folder)
    settings = Settings(host="localhost", port=_free_port(), listen="127.0.0.1", superlink_port=_free_port())
    consortium = Consortium.create(folder / "coordinator", settings, 90, 825, now)
    for name in names:
        _join(folder / name, consortium, now)
    say(f"{len(names)} hospitals made their keys, sent a request each, and got a kit")
    bundle = build_bundle()
    digest = sha256_of(bundle)
    for name in names:
        ApprovedBundles(folder / name).approve(digest, STEWARD)
    asked = Asked(roster_of(consortium), 1, digest, bundle_code_sha256(bundle))
    run_dir = folder / "run"
    run_dir.mkdir()
    plan = submit(recipe, run_dir, asked, now.date())
    with ExitStack() as stack:
        programs = stack.enter_context(served(consortium, lambda _: None, now))
        say(f"the SuperLink and nginx serve localhost:{settings.port}")
        doors = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wardround-")))
        for index, name in enumerate(names):
            programs += _hospital(stack, folder / name, doors / name, (index, recipe.run.threads))
        _wait_for_nodes(consortium, len(names), programs, stopped)
        say(f"{len(names)} hospitals are connected, each with a node, an executor and a guard")
        work(consortium, run_dir, "ask", stopped)
        _approve(plan, [folder / name for name in names])
        say(f"each hospital approved job {plan.digest[:12]}; the sites are asked again, and it runs")
        work(consortium, run_dir, "ask", stopped)
        work(consortium, run_dir, "run", stopped)
    card = json.loads((run_dir / "teacher" / "card.json").read_text())
    return Outcome(
        run_dir, str(card["adapter_sha256"]), [row for name in names for row in _left(folder / name)]
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _join(home: Path, consortium: Consortium, now: datetime) -> None:
    """The hospital in ``home`` becomes a member, and asks a person about every job."""
    said = load_site(home / SITE_FILE)
    save_site(replace(said, consent=Consent.ask), home / SITE_FILE)
    home.chmod(0o700)
    prepare_site(home, said.name, None)
    kit, _ = add_member(consortium, read_request(home / REQUEST), now)
    take_kit(home, kit, now)


def _hospital(stack: ExitStack, home: Path, door: Path, about: tuple[int, int]) -> Iterator[Child]:
    """The guard, the executor and the SuperNode of ``home``; ended with ``stack``.

    Args:
        door: where the guard's socket will be. about: the hospital's number, and the threads that its guard
            trains on; on another number sums are rounded otherwise than in a simulation.
    """
    (index, threads), port = about, _free_port()
    door.mkdir()
    confined = not sandbox_faults()
    if confined:
        os.chown(door, -1, FIRST_GROUP + index)
        door.chmod(0o2750)
        door.parent.chmod(0o711)

    def started(name: str, *arguments: str) -> Child:
        log = stack.enter_context((home / f"{name}.log").open("a", encoding="utf-8", buffering=1))
        command = [sys.executable, "-m", "wardround", "site", name, str(home), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        child = Child(f"the {name} of {home.name}", command, lambda line: print(line, file=log), environment)
        stack.callback(child.stop)
        return child

    sock = ("--socket", str(door / "guard.sock"))
    guard = started("guard", *sock)
    wait_until(lambda: describe(door / "guard.sock", 1.0) is not None, guard, START_S)
    yield guard
    loose = () if confined else ("--no-sandbox",)
    yield started("executor", "--node", f"127.0.0.1:{port}", *sock, *loose)
    yield started("node", *sock, "--port", str(port))


def _wait_for_nodes(
    consortium: Consortium, count: int, programs: list[Child], stopped: Callable[[float], bool]
) -> None:
    """Until ``count`` nodes are connected. Raises ``FederationError`` if a program ends before."""
    end = time.monotonic() + START_S

    def over(wait_s: float) -> bool:
        there = list((online(consortium) or {}).values()).count("online")
        if there < count and time.monotonic() > end:
            raise DeadlinePassed(f"{there} of {count} nodes are connected after {START_S:g} s: see node.log")
        return there == count or stopped(wait_s)

    attend(consortium, programs, over, lambda _: None)


def _approve(plan: RunPlan, homes: list[Path]) -> None:
    """What a person does with `site approve`, once the plan has come."""
    for home in homes:
        steward = Steward(Site.open(home))
        steward.approve(steward.find(plan.digest).plan, STEWARD)


def _left(home: Path) -> list[Left]:
    """From the site's own receipts."""
    found: dict[str, list[int]] = {}
    for line in (home / RECEIPTS).read_text(encoding="utf-8").splitlines():
        receipt = json.loads(line)
        found.setdefault(str(receipt["stage"]), []).append(int(receipt["bytes"]))
    return [Left(home.name, stage, len(sizes), sum(sizes)) for stage, sizes in found.items()]


@contextmanager
def folder_of(out: Path | None) -> Iterator[Path]:
    """``out``, or one that is gone afterwards."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        yield out.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="wardround-consortium-") as made:
        yield Path(made)
