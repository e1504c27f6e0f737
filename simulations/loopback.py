"""The loopback engine: the real ServerApp and ClientApp in one process, no network, no Ray.

Every message is serialized and read again in both directions, so its bytes are those of a network and
nothing is shared by reference. The sites work one after another, in the order of their folders.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from client.app import app as client_app
from common import wire
from server.app import app as server_app

RUN_ID = 1
SERVER_NODE_ID = 1
FIRST_NODE_ID = 1000
Courier: TypeAlias = Callable[[Message, Context], Message]  # a ClientApp, or what stands before one


class LoopbackGrid(Grid):
    """Drives ``client`` for ``nodes`` nodes in `push_messages`; `pull_messages` hands over the replies."""

    window = 1  # one site at a time: a message is pushed when its site starts to work on it

    def __init__(self, client: Courier, nodes: int, keys: Sequence[str] = ()) -> None:
        """``keys``: the fingerprints of the nodes' keys, in order, for a run that was submitted."""
        self._client = client
        self._replies: dict[str, bytes] = {}
        self._contexts = {
            FIRST_NODE_ID + number: Context(
                run_id=RUN_ID,
                node_id=FIRST_NODE_ID + number,
                node_config={"partition-id": number, "num-partitions": nodes},
                state=RecordDict(),
                run_config={},
            )
            for number in range(nodes)
        }
        self._run = Run.create_empty(run_id=RUN_ID)
        self.fingerprints = dict(zip(keys, self._contexts, strict=False))

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Serialize, run the client, serialize the reply. Ctrl-C goes through."""
        return [self._deliver(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]
        return [wire.unpack_message(packed) for packed in found]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _deliver(self, message: Message) -> str:
        message_id = str(uuid4())
        message.metadata.__dict__["_message_id"] = message_id
        received = wire.unpack_message(wire.pack_message(message))
        try:
            reply = self._client(received, self._contexts[message.metadata.dst_node_id])
        except Exception as error:
            # What Flower's own engines answer for a client that raised.
            fault = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(error)}:<{str(error)!r}>")
            reply = Message(fault, reply_to=received)
        reply.metadata.__dict__["_message_id"] = str(uuid4())
        self._replies[message_id] = wire.pack_message(reply)
        return message_id


def run_loopback(run_dir: Path, sites_dir: Path) -> None:
    """Run, or resume, what ``run_dir/config.yaml`` says, with one node a folder below ``sites_dir``.

    Raises the `WardroundError` that ended the run.
    """
    drive(
        LoopbackGrid(client_app, sum(folder.is_dir() for folder in sites_dir.iterdir())), run_dir, sites_dir
    )


def drive(grid: LoopbackGrid, run_dir: Path, sites_dir: Path, mode: str = "run") -> None:
    """As `run_loopback`, over ``grid``; ``mode`` as `server.app` takes it."""
    context = Context(RUN_ID, SERVER_NODE_ID, {}, RecordDict(), {"mode": mode})
    with environment({"WARDROUND_RUN": str(run_dir), "WARDROUND_SITES": str(sites_dir)}), task_identity():
        server_app(grid, context)


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """``variables`` in the environment, and what was there before afterwards."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def task_identity() -> Iterator[None]:
    """Flower makes a message only for a process that is a task of a run."""
    before = vars(TaskIdentity).copy()
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SERVER_NODE_ID, 1
    try:
        yield
    finally:
        for name in ("_run_id", "_node_id", "_task_id"):
            setattr(TaskIdentity, name, before[name])
