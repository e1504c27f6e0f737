"""The site's executor: it alone starts couriers, and only of bundles that the site approved.

Flower ships the code of a run to a SuperNode, which hands each message of it to an executor as a task. With
``--isolation process`` that executor is this one, in place of Flower's. A SuperNode keeps a bundle under the
digest of its bytes and refuses another, so the digest that a task names is that of what would run.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from client.network import refusal
from client.network.approved import ApprovedBundles
from client.network.task import TOKEN, Program
from common.durable import append_line
from common.errors import ConfigError, FederationError

TASKS = "tasks.jsonl"
POLL_S = 1.0
AWAY_S = 5.0  # between two looks for a SuperNode that does not answer
MOST_AT_ONCE = 4
MOST_WRITTEN = 1 << 18  # bytes of a task's words that are kept
LONGEST_LINE = 1 << 14
COURIER = "from flwr.supernode.cli.flwr_clientapp import flwr_clientapp; flwr_clientapp()"
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_UNAUTHORIZED = 401


class Launcher(Protocol):
    """Where tasks run: `client.network.task`."""

    def start(self, program: Program, token: str) -> subprocess.Popen[bytes]: ...


@dataclass(frozen=True)
class Node:
    """The SuperNode's runtime API: ``address`` (host:port), the ``secret`` that it shares with its executor.

    ``certificates``: a PEM file that it is verified by; None: it is on this machine, without TLS.
    """

    address: str
    secret: bytes
    certificates: Path | None = None

    def client(self, authorised: bool = True) -> RuntimeHttpClient:
        interceptors: list[object] = [RuntimeVersionHttpInterceptor(component_name="SuperExec")]
        if authorised:
            interceptors.append(
                SuperExecAuthHttpInterceptor(master_secret=self.secret, protected_methods=[_ACQUIRE])
            )
        return RuntimeHttpClient.from_server_address(
            server_address=self.address,
            insecure=self.certificates is None,
            root_certificates=None if self.certificates is None else self.certificates.read_bytes(),
            interceptors=interceptors,
        )

    def options(self) -> tuple[str, ...]:
        return () if self.certificates is None else ("--root-certificates", str(self.certificates))

    def files(self) -> tuple[Path, ...]:
        return () if self.certificates is None else (self.certificates,)


@dataclass
class _Task:
    """A courier or a refusal that runs. ``answers`` no more once a refusal of it was started."""

    task_id: int
    token: str
    process: subprocess.Popen[bytes]
    started: float
    is_refusal: bool


class SiteExecutor:
    """Takes one task after another and starts a courier for it, or the refusal.

    Guarantees: of a bundle that is not on the site's list at that moment nothing runs, and the server hears
    an error with a text that names nothing of the site's; what was decided is in ``tasks.jsonl``; no process
    of a task outlives it, or this executor.

    Args:
        folder: the site's. say: takes a line for the site's people. longest_s: a task that takes longer ends.
    """

    def __init__(
        self, folder: Path, node: Node, launcher: Launcher, say: Callable[[str], None], longest_s: float
    ) -> None:
        self._approved = ApprovedBundles(folder)
        self._folder, self._node, self._launcher = folder, node, launcher
        self._say, self._longest_s = say, longest_s
        self._running: list[_Task] = []

    def run(self, ended: Callable[[float], bool]) -> None:
        """Until ``ended``, which waits so many seconds, says so. Every task is over then.

        Raises:
            ConfigError: the SuperNode gives tasks to whoever asks, or has another secret.
            FederationError: what answers there is no SuperNode of this Flower.
        """
        self.check_locked(ended)
        client = self._node.client()
        try:
            while not ended(POLL_S):
                self._reap()
                if len(self._running) < MOST_AT_ONCE:
                    self._take(client, ended)
        finally:
            client.close()
            for task in self._running:
                _end(task.process)

    def check_locked(self, ended: Callable[[float], bool]) -> None:
        """The SuperNode gives no task to one without the secret, or a courier could take the others'.

        Waits for one that does not answer yet. Raises ``ConfigError`` if it does.
        """
        client, said = self._node.client(authorised=False), False
        try:
            while self._nobody(client):
                if not said:
                    self._say(f"no SuperNode on {self._node.address} yet: start it with --isolation process")
                said = True
                if ended(AWAY_S):
                    return
        finally:
            client.close()

    def _nobody(self, client: RuntimeHttpClient) -> bool:
        """Whether nobody answers. Raises ``ConfigError`` if a SuperNode does that has no secret."""
        try:
            client.AcquireTask(AcquireTaskRequest())  # asks for no kind of task, so it gets none
        except Exception as error:
            status = _http_status(error)
            if status == _UNAUTHORIZED:
                return False
            if status is not None:
                raise _no_supernode(self._node, status) from error
            return True
        raise ConfigError(
            f"the SuperNode on {self._node.address} gives its tasks to whoever asks: start it with "
            "--superexec-auth-secret-file, the file that this executor names"
        )

    def _take(self, client: RuntimeHttpClient, ended: Callable[[float], bool]) -> None:
        """The next task, if there is one."""
        try:
            answer = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        except Exception as error:
            status = _http_status(error)
            if status == _UNAUTHORIZED:
                raise ConfigError(
                    f"the SuperNode on {self._node.address} has another secret than this executor: give both "
                    "the same file"
                ) from error
            if status is not None:
                raise _no_supernode(self._node, status) from error
            self._say(f"the SuperNode on {self._node.address} does not answer")
            self.check_locked(ended)  # it may come back without its secret
            return
        if answer.HasField("task") and answer.token:
            self._launch(answer.task.task_id, answer.task.fab_hash or None, answer.token)

    def _launch(self, task_id: int, fab_sha256: str | None, token: str) -> None:
        try:
            approved, why = self._approved.allow(fab_sha256), "not approved"
        except (ConfigError, OSError) as error:
            approved, why = False, f"the list of approved bundles cannot be used: {error}"
        self._note(task_id, fab_sha256, "approved" if approved else "refused")
        shown = (fab_sha256 or "of no digest")[:16]
        if approved:
            self._say(f"task {task_id}: bundle {shown} is approved, its courier starts")
            arguments = ("--runtime-api-address", self._node.address, "--token-file", TOKEN)
            secure = self._node.options() or ("--insecure",)
            self._start(task_id, token, Program(COURIER, (*arguments, *secure), self._node.files()))
        else:
            self._say(f"task {task_id}: bundle {shown} is refused: {why}")
            self._refuse(task_id, token, "unapproved")

    def _refuse(self, task_id: int, token: str, reason: str) -> None:
        arguments = (self._node.address, TOKEN, reason, *self._node.options())
        program = Program(Path(refusal.__file__), arguments, self._node.files())
        self._start(task_id, token, program, is_refusal=True)

    def _start(self, task_id: int, token: str, program: Program, is_refusal: bool = False) -> None:
        process = self._launcher.start(program, token)
        threading.Thread(target=self._repeat, args=(task_id, process), daemon=True).start()
        self._running.append(_Task(task_id, token, process, time.monotonic(), is_refusal))

    def _repeat(self, task_id: int, process: subprocess.Popen[bytes]) -> None:
        """What a task writes, as its own words: it can neither look like this executor nor fill a disk."""
        if process.stdout is None:
            return
        left = MOST_WRITTEN
        with process.stdout as written:
            while line := written.readline(LONGEST_LINE):
                if left > 0:
                    text = line.decode("utf-8", "replace").rstrip()
                    self._say(f"task {task_id}| {''.join(c if c.isprintable() else '?' for c in text)}")
                    if (left := left - len(line)) <= 0:
                        self._say(f"task {task_id}: writes more than {MOST_WRITTEN} bytes, which is not kept")

    def _reap(self) -> None:
        """Forget what has ended; a courier that failed without an answer is answered for."""
        before, self._running = self._running, []
        for task in before:
            if task.process.poll() is None and time.monotonic() - task.started > self._longest_s:
                self._say(f"task {task.task_id}: took longer than {self._longest_s:g} s, and was ended")
                _end(task.process)
            if task.process.poll() is None:
                self._running.append(task)
            elif task.process.returncode and not task.is_refusal:
                self._say(f"task {task.task_id}: its courier ended with {task.process.returncode}")
                self._refuse(task.task_id, task.token, "failed")  # not heard where there was an answer

    def _note(self, task_id: int, fab_sha256: str | None, verdict: str) -> None:
        entry = {
            "ts": datetime.now(UTC).isoformat(), "task": task_id, "bundle": fab_sha256, "verdict": verdict
        }  # fmt: skip
        append_line(self._folder / TASKS, json.dumps(entry, sort_keys=True))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Its namespace, and with it every process of the task, ends with it."""
    process.kill()
    process.wait()


def _http_status(error: Exception) -> int | None:
    """What the other end answered, or None where nobody did. Raises ``error`` if it is not of the link."""
    if type(error).__module__.partition(".")[0] != "httpx":  # Flower's client lets these through
        raise error
    return getattr(getattr(error, "response", None), "status_code", None)


def _no_supernode(node: Node, status: int) -> FederationError:
    return FederationError(
        f"what answers on {node.address} is no SuperNode of this Flower (HTTP {status}): check --node, and "
        "install the same release at both"
    )
