"""The guard's end: listens on a Unix socket in a folder of the hospital's, and on nothing else.

gRPC tells no server who is at the other end of a Unix socket, so the file system is the lock: the socket is
its owner's and its group's, and its folder is closed to everybody else.
"""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from common import wire
from common.errors import ConfigError
from common.guard_link.frames import FRAME_BYTES, frames_of, message_of
from common.guard_link.guard_pb2 import DescribeRequest, Description, Frame
from common.guard_link.guard_pb2_grpc import GuardServicer, GuardStub, add_GuardServicer_to_server
from common.plan import Stage

LONGEST_PATH = 100  # bytes; the system's own limit for a socket is 107
GRACE_S = 2.0
Answer = Callable[[Stage, wire.Content], wire.Content]


@dataclass(frozen=True)
class Door:
    """Where a guard listens and what it lets in.

    Attributes:
        socket: the path. max_bytes: of one message; a longer one is refused unread.
    """

    socket: Path
    max_bytes: int


class _Service(GuardServicer):  # type: ignore[misc]
    """One message at a time: a second waits, for a site has one set of models and one ledger."""

    def __init__(self, answer: Answer, about: Description, max_bytes: int) -> None:
        self._answer, self._about, self._max_bytes = answer, about, max_bytes
        self._turn = threading.Lock()

    def Describe(self, request: DescribeRequest, context: Any) -> Description:
        return self._about

    def Ask(self, request: Iterator[Frame], context: Any) -> Iterator[Frame]:
        try:
            stage, packed = message_of(request, self._max_bytes)
            content, asked = wire.unpack_content(packed), Stage(stage)
        except Exception:  # whatever a courier sends: nothing of it is repeated
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "this is no message of the wire")
        with self._turn:
            reply = self._answer(asked, content)
        yield from frames_of(wire.pack_content(reply))


@contextmanager
def served(door: Door, answer: Answer, about: Description) -> Iterator[None]:
    """A guard listens on ``door`` until the block ends; the socket is gone afterwards.

    Raises:
        ConfigError: the socket cannot be there: its folder is missing or open to everybody, its path is too
            long, or another guard listens on it.
    """
    _check(door.socket)
    limits = [("grpc.max_receive_message_length", 2 * FRAME_BYTES)]
    server = grpc.server(ThreadPoolExecutor(max_workers=4), options=limits)
    add_GuardServicer_to_server(_Service(answer, about, door.max_bytes), server)
    mask = os.umask(0o007)
    try:
        if not server.add_insecure_port(f"unix:{door.socket}"):
            raise ConfigError(f"no socket can be made at {door.socket}: choose another path")
        server.start()
    finally:
        os.umask(mask)
    try:
        yield
    finally:
        server.stop(GRACE_S).wait()
        door.socket.unlink(missing_ok=True)


def wait_for_signal() -> None:
    """Returns when this process is told to end (SIGTERM, Ctrl-C)."""
    with told_to_end() as told:
        told.wait()


@contextmanager
def told_to_end() -> Iterator[threading.Event]:
    """An event that is set when this process is told to end (SIGTERM, Ctrl-C)."""
    told = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: told.set()) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def describe(socket: Path, timeout_s: float = 2.0) -> Description | None:
    """Who listens on ``socket``, or None."""
    try:
        with grpc.insecure_channel(f"unix:{socket}") as channel:
            about: Description = GuardStub(channel).Describe(DescribeRequest(), timeout=timeout_s)
            return about
    except grpc.RpcError:
        return None


def _check(socket: Path) -> None:
    folder, faults = socket.parent, []
    if len(os.fsencode(socket)) > LONGEST_PATH:
        faults.append(f"its path is longer than {LONGEST_PATH} bytes: choose a shorter one")
    if not folder.is_dir():
        faults.append(f"there is no folder {folder}: make it, for the guard's user and the courier's group")
    elif stat.S_IMODE(folder.stat().st_mode) & 0o007:
        faults.append(f"everybody may enter {folder}: chmod 2750 it, and give it the courier's group")
    if not faults and socket.exists():
        if not stat.S_ISSOCK(socket.stat().st_mode):
            faults.append("there is a file of that name that is no socket: choose another path")
        elif describe(socket) is not None:
            faults.append("another guard listens there: end it first, or choose another path")
        else:
            socket.unlink()  # of a guard that was killed
    if faults:
        raise ConfigError(f"no guard can listen on {socket}", faults)
