"""A SuperLink, one SuperNode, the site's guard and its executor, each a process, on loopback.

A run's bundle is the release's own with a server in it that is a post office: whatever the test puts into its
folder goes to the site, and the site's reply lies beside it.
"""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import Message
from flwr.cli.build import build_fab_from_disk

from common import wire
from common.canonical import sha256_of
from common.guard_link.service import describe
from common.plan import Stage
from common.release import build_bundle
from tests.e2e import walks

START_S = 240.0  # on a busy machine; an idle one needs a tenth
ANSWER_S = 240.0
END_S = 15.0

POST_OFFICE = '''
"""Sends what the test asks for, and keeps what comes back. Without torch, which takes seconds to import."""
import time
from pathlib import Path
from flwr.app import Message
from flwr.common.serde import message_to_proto, recorddict_from_proto
from flwr.proto.recorddict_pb2 import RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    folder, out = Path(context.run_config["folder"]), {}
    until = time.monotonic() + 500
    while not (folder / "stop").exists() and time.monotonic() < until:
        for request in sorted(folder.glob("*.request")):
            nodes = list(grid.get_node_ids())
            if nodes:
                content = recorddict_from_proto(RecordDict.FromString(request.read_bytes()))
                action = request.stem.partition("-")[2]
                (number,) = grid.push_messages([Message(content, nodes[0], action, ttl=300.0)])
                out[number] = request.stem
                request.unlink()
        for number, name in list(out.items()):
            for reply in grid.pull_messages([number]):
                (folder / "part").write_bytes(message_to_proto(reply).SerializeToString())
                (folder / "part").rename(folder / (name + ".reply"))
                del out[number]
        time.sleep(0.1)
'''

# A SuperNode looks for messages every three seconds, which no setting changes: a test looks more often.
QUICK_SUPERNODE = """
import time, types
from importlib.metadata import version
import flwr.supernode.start_client_internal as client
assert version("flwr").startswith("1.41."), "see whether this is still how a SuperNode waits"
client.time = types.SimpleNamespace(sleep=lambda s: time.sleep(min(s, 0.2)), time=time.time)
from flwr.supernode.cli.flower_supernode import flower_supernode
flower_supernode()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Bundle:
    """A run's source folder, the digest of what Flower makes of it, and its post office."""

    app: Path
    post: Path
    sha256: str
    sent: int = 0

    def ask(self, stage: Stage, content: wire.Content) -> Message:
        """The site's reply, or Flower's error in its place."""
        self.sent += 1
        name = f"{self.sent:03d}-{wire.ACTIONS[stage]}"
        part = self.post / f"{name}.part"
        part.write_bytes(wire.pack_content(content))
        part.rename(self.post / f"{name}.request")
        reply = self.post / f"{name}.reply"
        wait_until(reply.exists, ANSWER_S, f"no reply to {name}")
        return wire.unpack_message(reply.read_bytes())


@dataclass
class Network:
    """What runs. ``log(NAME)`` is what a process has written so far."""

    root: Path
    home: Path
    door: Path
    port: int
    node_port: int
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        return walks.environment(
            # Flower starts its own programs by their bare names.
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            FLWR_HOME=str(self.root / "flwr"), FLWR_SUPEREXEC_TASK_POLL_INTERVAL="0.1",
            FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1", FLWR_TELEMETRY_ENABLED="0",
            FLWR_DISABLE_UPDATE_CHECK="1", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive",
        )  # fmt: skip

    def start(self, name: str, *command: str | Path) -> subprocess.Popen[bytes]:
        with (self.root / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                list(map(str, command)), env=self.environment(), stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, cwd=self.root, start_new_session=True,
            )  # fmt: skip
        self.processes[name] = process
        return process

    def log(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text(errors="replace")

    def ended(self, name: str) -> bool:
        """Never returns True: says what it wrote instead."""
        assert self.processes[name].poll() is None, self.log(name)
        return False

    def end(self, name: str) -> int:
        """Its exit code after SIGTERM; whatever is left of its session is killed."""
        process = self.processes.pop(name)
        process.terminate()
        try:
            return process.wait(END_S)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own group: started by us
            process.wait()

    def run(self, bundle: Bundle) -> None:
        """Hand the run of ``bundle`` to the SuperLink."""
        done = subprocess.run(
            [str(Path(sys.executable).with_name("flwr")), "run", str(bundle.app), "veto"],
            env=self.environment(), capture_output=True, text=True, timeout=START_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def approve(self, bundle: Bundle) -> None:
        done = walks.wardround("site", "bundle", "approve", self.home, bundle.sha256, "--note", "a test")
        assert done.returncode == 0, done.stderr

    def revoke(self, bundle: Bundle) -> None:
        done = walks.wardround("site", "bundle", "revoke", self.home, bundle.sha256)
        assert done.returncode == 0, done.stderr


def wait_until(true: Callable[[], bool], seconds: float, otherwise: str) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, otherwise
        time.sleep(0.05)


def make_bundle(root: Path, name: str, client_code: str = "", more: dict[str, str] | None = None) -> Bundle:
    """The release's bundle with a post office, and what a test adds to its courier."""
    app, post = root / name, root / f"{name}-post"
    post.mkdir()
    with zipfile.ZipFile(io.BytesIO(build_bundle())) as release:
        release.extractall(app)
    (app / ".info" / "CONTENT").unlink()
    (app / ".info").rmdir()
    (app / "server" / "app.py").write_text(POST_OFFICE)
    with (app / "client" / "app.py").open("a") as courier:
        courier.write(client_code)
    for file, text in (more or {}).items():
        (app / file).write_text(text)
    project = app / "pyproject.toml"
    text = project.read_text().replace('"client/app.py"', '"client/**/*.py"')
    text = text.replace("fab-exclude = [", "fab-exclude-not = [")  # of files that are not there any more
    table = "[tool.flwr.app.config]\n"
    assert table in text
    project.write_text(text.replace(table, f'{table}folder = "{post}"\n'))
    return Bundle(app, post, sha256_of(build_fab_from_disk(app)))


@contextmanager
def network(root: Path, home: Path, door: Path, courier: str) -> Iterator[Network]:
    """All of it, ended afterwards. ``home``: the site's folder."""
    net = Network(root, home, door, free_port(), free_port())
    python = sys.executable
    (root / "flwr").mkdir()
    link = f'[superlink.veto]\naddress = "127.0.0.1:{net.port}"\ninsecure = true\n'
    (root / "flwr" / "config.toml").write_text(f'[superlink]\ndefault = "veto"\n{link}')
    guard_socket = door / "guard.sock"
    with ExitStack() as stack:
        stack.callback(lambda: [net.end(name) for name in reversed(list(net.processes))])
        net.start(
            "superlink", Path(python).with_name("flower-superlink"), "--insecure", "--host", "127.0.0.1",
            "--port", str(net.port), "--disable-runtime-dependency-installation",
        )  # fmt: skip
        net.start("guard", python, "-m", "wardround", "site", "guard", home, "--socket", guard_socket)
        net.start(
            "executor", python, "-m", "wardround", "site", "executor", home, "--node",
            f"127.0.0.1:{net.node_port}", "--socket", guard_socket, "--courier-user", courier,
        )  # fmt: skip
        wait_until((home / "executor.secret").exists, START_S, "the executor made no secret")
        wait_until(lambda: reached(net.port) or net.ended("superlink"), START_S, "no SuperLink listens")
        net.start(
            "supernode", python, "-c", QUICK_SUPERNODE, "--insecure", "--superlink", f"127.0.0.1:{net.port}",
            "--isolation", "process", "--host", "127.0.0.1", "--port", str(net.node_port),
            "--superexec-auth-secret-file", home / "executor.secret",
            "--node-config", f'guard="unix:{guard_socket}"',
        )  # fmt: skip
        wait_until(lambda: describe(guard_socket, 1.0) is not None, START_S, "no guard listens")
        yield net


def reached(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0
