"""The Ray engine: the same two apps on Flower's simulation engine, one CPU an actor.

Flower runs the ServerApp in a thread, Ray the sites in processes of their own. All of them end with
`run_ray`, whatever ends it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from flwr.supercore.run import Run

from client.app import app as client_app
from common.config import load_run_config
from server.app import app as server_app
from simulations.loopback import environment

STOP_PATIENCE_S = 15.0
ACTOR = "ray::ClientAppA"  # how Linux shows an actor's process: 15 characters of its title
TOKEN = "WARDROUND_RAY_TOKEN"  # in the environment of every process of one call, and of no other
DEPRECATED = "The `run_simulation` function is deprecated"


class Stopped(BaseException):
    """Ends the server's thread when the engine below it has ended. No `Exception`: nothing may retry it."""


class WindowedGrid(Grid):
    """Flower's grid, for as many sites at once as there are actors, and with an end.

    A site's deadline runs from its push; with more messages out than actors it would run while they queue.
    """

    def __init__(self, inner: Grid, window: int, stop: threading.Event) -> None:
        self._inner = inner
        self._stop = stop
        self.window = window

    def set_run(self, run: Run) -> None:
        self._inner.set_run(run)

    @property
    def run(self) -> Run:
        return self._inner.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return self._inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        self._check()
        return self._inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self._check()
        return self._inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self._check()
        return self._inner.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        self._check()
        return self._inner.send_and_receive(messages, timeout=timeout)

    def _check(self) -> None:
        if self._stop.is_set():
            raise Stopped


class _Server:
    """The real ServerApp in Flower's thread; keeps how it ended, for Flower drops part of that."""

    def __init__(self, window: int) -> None:
        self.error: BaseException | None = None
        self.stop = threading.Event()
        self.ended = threading.Event()
        self.app = ServerApp()

        @self.app.main()
        def main(grid: Grid, context: Context) -> None:
            try:
                server_app(WindowedGrid(grid, window, self.stop), context)
            except BaseException as error:
                self.error = error
            finally:
                self.ended.set()


def run_ray(run_dir: Path, sites_dir: Path) -> None:
    """Run, or resume, what ``run_dir/config.yaml`` says, with one node a folder below ``sites_dir``.

    Raises the `WardroundError` that ended the run.
    """
    recipe = load_run_config(run_dir / "config.yaml")
    nodes = sum(folder.is_dir() for folder in sites_dir.iterdir())
    actors = min(os.cpu_count() or 1, nodes)
    server = _Server(actors)
    token = secrets.token_hex(16)
    # A short path: Ray's sockets lie below it, and a socket's path has 107 characters at most.
    with (
        environment(_variables(run_dir, sites_dir, recipe.run.threads) | {TOKEN: token}),
        _quiet_flower(),
        tempfile.TemporaryDirectory(prefix="wr-", dir="/tmp") as folder,
    ):
        init = {"num_cpus": actors, "_temp_dir": folder, "log_to_driver": False, "logging_level": "error"}
        resources = {"num_cpus": 1, "num_gpus": 0.0}
        config = {"init_args": init, "client_resources": resources}
        try:
            with _ctrl_c(server, token):
                run_simulation(server.app, client_app, nodes, backend_config=config)
        finally:
            server.stop.set()
            ray.shutdown()
            server.ended.wait(STOP_PATIENCE_S)
            _see_off(token)
    if server.error is not None:
        raise server.error


def _variables(run_dir: Path, sites_dir: Path, threads: int) -> dict[str, str]:
    """What the server's thread and the actors' processes find in their environment."""
    return {
        "WARDROUND_RUN": str(run_dir.resolve()),
        "WARDROUND_SITES": str(sites_dir.resolve()),
        "OMP_NUM_THREADS": str(threads),  # torch in the actors takes its threads from this
        "OMP_WAIT_POLICY": "passive",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),  # Flower changes it for its actors
    }


@contextmanager
def _ctrl_c(server: _Server, token: str) -> Iterator[None]:
    """Turn Ctrl-C into an orderly end, and raise it afterwards; a second Ctrl-C strikes at once.

    Struck inside Flower it would shut Ray down under threads that wait for an actor, and they never return.
    Here the actors are killed first, which ends those waits, and the server's thread ends at its next step.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    struck = threading.Event()

    def strike(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        struck.set()
        server.stop.set()
        _kill(process for process in _marked(token) if _title(process) == ACTOR)

    signal.signal(signal.SIGINT, strike)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if struck.is_set():
            raise KeyboardInterrupt


def _see_off(token: str) -> None:
    """Wait for the processes of this call, which Ray only asks to end, and kill what stays. Linux only."""
    until = time.monotonic() + STOP_PATIENCE_S
    while (alive := _marked(token)) and time.monotonic() < until:
        time.sleep(0.1)
    _kill(alive)


def _kill(processes: Iterable[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _title(process: int) -> str:
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        return ""


def _marked(token: str) -> list[int]:
    """Ids of the live processes that carry ``token`` in the environment they were started with."""
    mark = f"{TOKEN}={token}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended while we looked, or is another user's
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


@contextmanager
def _quiet_flower() -> Iterator[None]:
    """Flower's log from WARNING on, without the one warning that is about this call itself."""
    logger = logging.getLogger("flwr")
    level = logger.level

    def other(record: logging.LogRecord) -> bool:
        return DEPRECATED not in record.getMessage()

    logger.setLevel(logging.WARNING)
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)
        logger.setLevel(level)
