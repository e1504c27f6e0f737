"""A site lets run what it approved, and what it approved by mistake learns nothing and changes nothing.

One SuperLink, one SuperNode, the site's guard and executor, all real; their story is lived once, and each
test looks at a part of it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from client.network.executor import TASKS
from client.orders import ORDERS
from common import wire
from common.canonical import sha256_of_file
from common.config import load_recipe
from common.errors import ArtefactError
from common.plan import Round, RunPlan, Stage
from common.privacy.keys import SiteKeys
from common.wire.signed import signer_of
from server.planning import build_plan
from simulations import simulate
from tests.e2e.malicious_bundle import ATTACK, FAKE_GUARD
from tests.e2e.veto_network import Bundle, Network, make_bundle, network, wait_until
from tests.namespaces import need_sandbox, user

MARKER = "THE BUNDLE'S CODE RAN"
DAEMON_S = 2.0  # in which a daemon that lives says something eight times


@dataclass
class Story:
    """What was asked and what came back, in order, and what the processes left."""

    plan: RunPlan
    home: Path
    door: Path
    good: Bundle
    bad: Bundle
    orders: dict[str, Round] = field(default_factory=dict)
    replies: dict[str, Message] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)  # of the executor, after each chapter
    before: dict[str, str] = field(default_factory=dict)  # digests of the site's files
    after: dict[str, str] = field(default_factory=dict)
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)
    daemon: tuple[int, int] = (0, 0)
    codes: dict[str, int] = field(default_factory=dict)
    executor_pids: list[int] = field(default_factory=list)
    key: str = ""

    def propose(self, net: Network, chapter: str, bundle: Bundle) -> None:
        order = Round(self.plan.digest, Stage.propose, 0, 60.0, secrets.token_hex(16))
        started = time.monotonic()
        self.orders[chapter] = order
        self.replies[chapter] = bundle.ask(Stage.propose, wire.encode_proposal(order, self.plan))
        self.seconds[chapter] = time.monotonic() - started
        self.logs[chapter] = net.log("executor")
        self.executor_pids.append(net.processes["executor"].pid)

    def said(self, chapter: str, before: str = "") -> str:
        """What the executor and its couriers wrote in ``chapter``."""
        return self.logs[chapter].removeprefix(self.logs[before] if before else "")


def digests(folder: Path) -> dict[str, str]:
    """Of every file that is the site's own and no run adds to."""
    found = (path for path in folder.rglob("*") if path.is_file())
    growing = {ORDERS, TASKS, "receipts.jsonl", "faults.log", "plan.json"}
    return {str(p.relative_to(folder)): sha256_of_file(p) for p in found if p.name not in growing}


def target(net: Network, approved: str) -> str:
    """What the attacker knows of the hospital: all of it, but no secret."""
    home, python = net.home, Path(sys.prefix).resolve()
    image = next(path for path in sorted((home / "data").rglob("*")) if path.suffix == ".png")
    read = {
        "manifest": home / "data" / "manifest.csv", "image": image, "key": home / "ledger.key",
        "patients": home / "patients.key", "site": home / "site.yaml", "secret": home / "executor.secret",
        "shadow": "/etc/shadow", "first process": "/proc/1/environ",
    }  # fmt: skip
    lists = {"home": home, "data": home / "data", "parent": net.root, "root": "/root"}
    packages = next((python / "lib").glob("python3*")) / "site-packages"
    opens = {"packages": packages / "flwr" / "__init__.py", "system": "/usr/bin/env"}
    appends = {
        "approved": home / "approved-bundles.txt", "orders": home / ORDERS, "door": net.door / "left-behind"
    }  # fmt: skip
    facts = {
        "READ": {name: str(path) for name, path in read.items()},
        "LIST": {name: str(path) for name, path in lists.items()},
        "OPEN": {name: str(path) for name, path in opens.items()},
        "APPEND": {name: str(path) for name, path in appends.items()},
        "GUARD": net.processes["guard"].pid, "EXECUTOR": net.processes["executor"].pid,
        "HOME": str(home), "NODE": f"127.0.0.1:{net.node_port}", "SOCKET": str(net.door / "guard.sock"),
        "APPROVED": approved, "SUPERLINK": net.port,
    }  # fmt: skip
    return "".join(f"{name} = {value!r}\n" for name, value in facts.items())


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    need_sandbox()
    root = tmp_path_factory.mktemp("veto")
    simulate.prepare_sites(load_recipe("smoke", ["baselines=[]"]), root / "homes")
    home, door = root / "homes" / "east", root / "door"
    plan = build_plan(load_recipe("smoke", ["baselines=[]"]), "veto")
    door.mkdir()
    # Not by its permissions is the site's data shut to a courier: all of it may be read by everybody.
    for path in (root, home, *home.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    with user(f"wr-courier-{os.getpid()}") as courier:
        shutil.chown(door, group=courier)
        door.chmod(0o2750)
        with network(root, home, door, courier) as net:
            yield live(net, plan, door)


def live(net: Network, plan: RunPlan, door: Path) -> Story:
    good = make_bundle(net.root, "good", f"\nprint({MARKER!r}, flush=True)\n")
    more = {
        "client/attack.py": ATTACK,
        "client/guard.py": FAKE_GUARD,
        "client/target.py": target(net, good.sha256),
    }
    bad = make_bundle(net.root, "bad", "\nimport client.attack\n", more)
    story = Story(plan, net.home, door, good, bad)
    story.key = SiteKeys.open(net.home).public
    net.run(good)
    net.run(bad)
    story.propose(net, "unapproved", good)
    net.approve(good)
    story.propose(net, "approved", good)
    net.approve(bad)
    story.before = digests(net.home)
    story.propose(net, "malicious", bad)
    wait_until(lambda: "PROBE" in net.log("executor"), 10.0, "the malicious bundle never ran")
    story.propose(net, "afterwards", good)
    story.after = digests(net.home)
    first = net.log("executor").count("DAEMON")
    time.sleep(DAEMON_S)
    story.daemon = first, net.log("executor").count("DAEMON")
    net.revoke(good)
    story.propose(net, "revoked", good)
    for line in net.log("executor").splitlines():
        if "| PROBE " in line:
            story.probes |= json.loads(line.partition("| PROBE ")[2])
    for bundle in (good, bad):
        (bundle.post / "stop").touch()
    story.codes = {name: net.end(name) for name in ("executor", "guard")}
    story.logs["end"] = net.log("executor")
    return story


def denied(story: Story, *names: str) -> None:
    for name in names:
        assert story.probes[name].keys() == {"denied"}, f"{name}: {story.probes[name]}"


def test_an_unapproved_bundle_is_answered_in_seconds_and_none_of_its_code_ran(story: Story) -> None:
    reply = story.replies["unapproved"]
    assert reply.has_error()
    assert (reply.error.code, reply.error.reason) == (7, "this site has not approved the bundle of this run")
    assert MARKER not in story.said("unapproved")
    assert "Successfully installed" not in story.said("unapproved")  # not even unpacked
    assert story.seconds["unapproved"] < 60  # on a busy machine too


def test_an_approved_bundle_runs_without_a_restart_and_brings_the_sites_signed_word(story: Story) -> None:
    assert MARKER in story.said("approved", "unapproved")
    content = story.replies["approved"].content
    assert signer_of(content, story.orders["approved"], {"east": story.key}) == "east"
    answer = wire.decode_answer(content)
    assert (answer.site, answer.agrees, answer.plan_sha256) == ("east", True, story.plan.digest)
    assert len(set(story.executor_pids)) == 1


def test_a_revoked_bundle_is_refused_without_a_restart(story: Story) -> None:
    assert story.replies["revoked"].has_error()
    assert story.replies["revoked"].error.code == 7
    assert MARKER not in story.said("revoked", "afterwards")


def test_what_was_decided_is_in_the_sites_own_book(story: Story) -> None:
    entries = [json.loads(line) for line in (story.home / TASKS).read_text().splitlines()]
    good, bad = story.good.sha256, story.bad.sha256
    assert [(entry["bundle"], entry["verdict"]) for entry in entries] == [
        (good, "refused"), (good, "approved"), (bad, "approved"), (good, "approved"), (good, "refused")
    ]  # fmt: skip


def test_no_text_that_leaves_names_a_path_of_the_site(story: Story) -> None:
    for chapter in ("unapproved", "revoked"):
        assert "/" not in story.replies[chapter].error.reason


def test_a_fake_guard_in_the_bundle_finds_no_data(story: Story) -> None:
    denied(story, "fake guard", "read manifest", "read image", "list data", "list home")
    assert story.probes["list parent"] == {"got": "['door']"}  # of all that is there, the way to the socket


def test_no_key_secret_or_password_can_be_read(story: Story) -> None:
    denied(story, "read key", "read patients", "read secret", "read site", "read shadow")
    names = story.probes["environment"]["got"]
    assert "SECRET" not in names.upper()
    assert "TOKEN" not in names.upper()


def test_the_guards_process_cannot_be_seen_traced_or_signalled(story: Story) -> None:
    denied(story, "guard memory", "guard environment", "guard files", "ptrace", "signal the guard")
    denied(story, "signal the executor", "be root", "chroot", "mounts", "end the socket")
    seen = story.probes["processes"]["got"]
    assert "site\\x00guard" not in seen
    assert "flower-supernode" not in seen


def test_an_order_is_answered_once_and_the_bundles_own_orders_never(story: Story) -> None:
    assert story.probes["replay"] == {"refused": ["REFUSED_POLICY", "order"]}
    assert story.probes["replay as another stage"] == {"refused": ["ARTEFACT_MISMATCH", ""]}
    assert story.probes["order of its own"] == {"refused": ["REFUSED_POLICY", "plan"]}


def test_an_answer_that_the_courier_changed_is_not_the_sites_word(story: Story) -> None:
    content = story.replies["malicious"].content
    assert wire.decode_answer(content).rank != wire.decode_answer(story.replies["approved"].content).rank
    with pytest.raises(ArtefactError, match="did not sign"):
        signer_of(content, story.orders["malicious"], {"east": story.key})
    earlier = story.replies["approved"].content  # nor is an old word of the site's a new one
    with pytest.raises(ArtefactError, match="another order"):
        signer_of(earlier, story.orders["afterwards"], {"east": story.key})


def test_what_a_bundle_writes_into_flowers_installed_bundles_is_gone_with_its_task(story: Story) -> None:
    assert story.good.sha256[:8] in story.probes["poison"]["got"]  # it did lay the trap
    assert "POISONED" not in story.logs["end"]
    assert MARKER in story.said("afterwards", "malicious")  # the approved bundle's own code ran
    content = story.replies["afterwards"].content
    assert signer_of(content, story.orders["afterwards"], {"east": story.key}) == "east"


def test_nothing_of_the_site_or_the_installation_can_be_written(story: Story) -> None:
    denied(story, "append approved", "append orders", "append door", "open packages", "open system")
    assert story.after == story.before
    assert [path.name for path in story.door.iterdir()] in ([], ["guard.sock"])


def test_a_daemon_ends_with_its_task(story: Story) -> None:
    assert story.daemon[0] > 0  # it did start
    assert story.daemon[0] == story.daemon[1]


def test_another_task_of_the_supernode_cannot_be_taken(story: Story) -> None:
    denied(story, "another task")


def test_of_the_network_a_bundle_reaches_the_supernode_alone(story: Story) -> None:
    assert story.probes["network"] == {"got": "[(1, 'lo')]"}
    denied(story, "superlink", "hospital network")


def test_guard_and_executor_end_when_told(story: Story) -> None:
    assert story.codes == {"executor": 0, "guard": 0}
    assert story.logs["end"].rstrip().endswith("executor ended")
