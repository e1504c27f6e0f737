"""Programs that run beside a command: started, listened to, waited for with a deadline, and ended with it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from common.errors import ConfigError, DeadlinePassed, FederationError
from common.network.proxies import loopback_unproxied

KEPT_LINES = 200
GRACE_S = 10.0
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# Flower's programs call nobody but whom they are told to, and write their lines at once.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "PYTHONUNBUFFERED": "1",
    "NO_COLOR": "1",
}


def flower_program(name: str) -> str:
    """A program of this installation's Flower. Raises ``ConfigError`` if it is not there."""
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.is_file():
        raise ConfigError(f"{path} is missing: install Wardround again, its Flower is not complete")
    return str(path)


def flower_environment(home: Path) -> dict[str, str]:
    """The environment of Flower's programs: what they write goes to ``home`` and not to the user's own.

    They start each other by bare name, so this installation comes first on the path.
    """
    programs = sysconfig.get_path("scripts")
    path = os.pathsep.join([programs, os.environ.get("PATH", os.defpath)])
    return {**os.environ, **QUIET, **loopback_unproxied(), "FLWR_HOME": str(home), "PATH": path}


class Child:
    """A program in a process group of its own, so that Ctrl-C reaches us alone and nothing of it is left.

    Args:
        name: what messages call it. sink: gets each line that it writes, without its end and without colours.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        sink: Callable[[str], None],
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._sink = sink
        self._kept: deque[str] = deque(maxlen=KEPT_LINES)
        try:
            self._process = subprocess.Popen(
                list(command), env=None if env is None else dict(env), stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise ConfigError(f"{name} cannot be started ({error.strerror}): {command[0]}") from error
        self._reader = threading.Thread(target=self._read, name=f"{name}-output", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> int | None:
        """Its exit code, or None while it runs."""
        return self._process.poll()

    def lines(self) -> list[str]:
        """The last of what it wrote; complete once it has `ended`."""
        if self.ended is not None:
            self._reader.join(timeout=GRACE_S)
        return list(self._kept)

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Its exit code, or None if it still runs after ``timeout_s``."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def stop(self, grace_s: float = GRACE_S) -> None:
        """Ask it to end, then make it, and whatever it has started."""
        if self.ended is None:
            self._process.terminate()
            self.wait(grace_s)
        with suppress(ProcessLookupError):  # its own group: nobody else is in it
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(timeout=GRACE_S)

    def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        with stream:
            for raw in stream:
                line = _COLOUR.sub("", raw.decode("utf-8", "replace")).rstrip()
                self._kept.append(line)
                try:
                    self._sink(line)
                except Exception:  # a full disk, a closed terminal: who is no longer read would stand still
                    self._sink = lambda _: None


def wait_until(ready: Callable[[], bool], child: Child, deadline_s: float) -> None:
    """Returns once ``ready()`` is true.

    Raises:
        FederationError: ``child`` ended first; its last lines are the faults.
        DeadlinePassed: it is not ready after ``deadline_s`` seconds.
    """
    end = time.monotonic() + deadline_s
    while not ready():
        if (code := child.ended) is not None:
            last = [line for line in child.lines() if line][-8:]
            raise FederationError(f"{child.name} ended at its start with {code}", last)
        if time.monotonic() > end:
            raise DeadlinePassed(
                f"{child.name} is not ready after {deadline_s:g} s: look at its log; is this machine busy?"
            )
        time.sleep(0.1)
