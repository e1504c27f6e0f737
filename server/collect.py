"""Collection: push, pull one by one, take each answer as it arrives, drop. Memory does not grow with sites.

Every reply has its own deadline, counted on this machine from its push. Whoever takes the answers must not
care for their order, which is that of the network. Flower's pull can block for minutes on a half-uploaded
reply; each pull therefore runs in a thread of its own, which the loop stops waiting for.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from flwr.app import Message
from flwr.serverapp import Grid

from common import progress, wire
from common.adapter import AdapterUpdate
from common.errors import ArtefactError, DeadlinePassed, DiskFault
from common.plan import Round, Stage
from common.wire.sealed import sealed_most
from common.wire.sizes import is_larger, message_bytes
from server.events import EventLog
from server.report.schema import Rejection

POLL_S = 0.1
PULL_PATIENCE_S = 0.2  # how long the loop stands beside a pull; a longer one goes on in its thread
STUCK_S = 10.0  # a pull older than this no longer counts as one of the two that may run
PULLS_AT_ONCE = 2
TTL_SLACK_S = 60.0
DEADLINE = DeadlinePassed.border_code
NOT_SENT = "NOT_SENT"
TOO_LARGE = "TOO_LARGE"

monotonic: Callable[[], float] = time.monotonic
Write: TypeAlias = Callable[[str], wire.Content]
Take: TypeAlias = Callable[[str, wire.Content], None]
Unseal: TypeAlias = Callable[[wire.Content, Round], wire.Content]


@dataclass(frozen=True)
class Errand:
    """One message to each site and what to do with the answer.

    Attributes:
        deadline_s: for each site's reply, from its push.
        max_bytes: of a reply; a larger one is dropped before anything looks into it.
        write: site -> the request. Called just before the push, so that requests do not pile up.
        take: site, reply -> None. Decodes, screens and keeps; raises ``ArtefactError`` to reject.
    """

    stage: Stage
    index: int
    deadline_s: float
    write: Write
    take: Take
    max_bytes: int


@dataclass
class Collection:
    """What came of an errand. ``sites`` answered and were taken; sorted by site, as ``rejected`` is."""

    sites: list[str] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    refusals: dict[str, wire.Refusal] = field(default_factory=dict)
    bytes_up: dict[str, int] = field(default_factory=dict)
    bytes_down: dict[str, int] = field(default_factory=dict)
    late: int = 0


class LiveUpdates:
    """Counts the decoded updates that are still in memory: `watch` each, read ``now`` and ``peak``."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0

    def watch(self, update: AdapterUpdate) -> None:
        """Count ``update`` until it and the last of its tensors are gone."""
        token = _Token()
        for part in (update, *update.adapter.tensors.values()):
            weakref.finalize(part, _release, token)
        weakref.finalize(token, self._forget)
        self.now += 1
        self.peak = max(self.peak, self.now)

    def _forget(self) -> None:
        self.now -= 1


class _Token:
    """Dies with the last finalizer that holds it."""


def _release(_: _Token) -> None:
    """Nothing to do: that the finalizer lets go of its token is the point."""


class _Pull:
    """One call of ``grid.pull_messages`` for one id, in a thread that may hang without harm."""

    def __init__(self, grid: Grid, message_id: str) -> None:
        self.started = monotonic()
        self._done = threading.Event()
        self._replies: list[Message] = []
        self._error: BaseException | None = None
        threading.Thread(target=self._run, args=(grid, message_id), daemon=True).start()

    def _run(self, grid: Grid, message_id: str) -> None:
        try:
            self._replies = list(grid.pull_messages([message_id]))
        except BaseException as error:  # carried over to the loop's thread
            self._error = error
        self._done.set()

    def finished(self) -> bool:
        return self._done.wait(PULL_PATIENCE_S)

    def reply(self) -> Message | None:
        """The reply, or None where there is none yet or the link failed: the deadline decides then."""
        if self._error is not None and not isinstance(self._error, Exception):
            raise self._error
        return self._replies[0] if self._replies else None


@dataclass
class _Pending:
    message_id: str
    pushed: float
    order: Round | None  # of an answer that comes sealed
    pull: _Pull | None = None


class Collector:
    """Runs errands over ``grid``.

    Args:
        window: how many sites may have a message at once; None: all. An engine that works on few sites at a
            time says so, or the last sites' deadlines would pass while they queue.
        unseal: opens an answer to an order; None: answers come as they are.

    Guarantee: with ``unseal`` no answer counts that it does not open, but a refusal and the word on a plan.
    """

    def __init__(
        self, grid: Grid, events: EventLog, window: int | None = None, unseal: Unseal | None = None
    ) -> None:
        self.grid = grid
        self.events = events
        self.window = window
        self.unseal = unseal
        self.live = LiveUpdates()

    def online(self, expected: int, wait_s: float) -> list[int]:
        """Ids of the nodes, sorted: as soon as ``expected`` are there, or after ``wait_s`` seconds."""
        until = monotonic() + wait_s
        while len(node_ids := sorted(self.grid.get_node_ids())) < expected and monotonic() < until:
            time.sleep(POLL_S)
        return node_ids

    def run(self, errand: Errand, nodes: Mapping[str, int]) -> Collection:
        """One message to every site of ``nodes`` (site -> node id), and its answer or its drop.

        Raises whatever ``errand`` raises other than ``ArtefactError``, and ``DiskFault``.
        """
        return _Loop(self, errand, nodes).run()


class _Loop:
    """One errand under way. Each site is settled once: taken, or dropped with a cause."""

    def __init__(self, collector: Collector, errand: Errand, nodes: Mapping[str, int]) -> None:
        self.owner = collector
        self.errand = errand
        self.nodes = nodes
        self.to_push = sorted(nodes)
        self.pending: dict[str, _Pending] = {}
        self.result = Collection()

    def run(self) -> Collection:
        window = self.owner.window or len(self.nodes)
        while self.to_push or self.pending:
            while self.to_push and len(self.pending) < window:
                self._push(self.to_push.pop(0))
            settled = [self._poll(site) for site in sorted(self.pending)]
            if not any(settled) and self.pending:
                time.sleep(POLL_S)
        self.result.sites.sort()
        self.result.rejected.sort(key=lambda rejection: rejection.site)
        return self.result

    def _push(self, site: str) -> None:
        errand, pushed = self.errand, monotonic()
        content = errand.write(site)
        order = wire.decode_order(content) if self._sealed else None
        message = wire.request_message(
            content, self.nodes[site], errand.stage, errand.deadline_s + TTL_SLACK_S
        )
        size = message_bytes(message)
        message_ids = list(self.owner.grid.push_messages([message]))
        if not message_ids or not message_ids[0]:
            self._drop(site, NOT_SENT)
            return
        self.result.bytes_down[site] = size
        self._event("message", site, direction="down", bytes=size)
        self.pending[site] = _Pending(message_ids[0], pushed, order)

    def _poll(self, site: str) -> bool:
        """Look for the site's reply; whether the site's turn of waiting is over."""
        pending = self.pending[site]
        reply = self._try_pull(pending)
        if monotonic() - pending.pushed > self.errand.deadline_s:
            del self.pending[site]
            self.result.late += 1
            self._drop(site, DEADLINE)
        elif reply is not None:
            del self.pending[site]
            self._arrive(site, reply, pending.order)
        return site not in self.pending

    def _try_pull(self, pending: _Pending) -> Message | None:
        if pending.pull is None:
            if self._pulls_running() >= PULLS_AT_ONCE:
                return None
            pending.pull = _Pull(self.owner.grid, pending.message_id)
        if not pending.pull.finished():
            return None
        pull, pending.pull = pending.pull, None
        return pull.reply()

    def _pulls_running(self) -> int:
        pulls = [entry.pull for entry in self.pending.values() if entry.pull is not None]
        return sum(monotonic() - pull.started < STUCK_S for pull in pulls)

    @property
    def _sealed(self) -> bool:
        return self.owner.unseal is not None and self.errand.stage is not Stage.propose

    def _arrive(self, site: str, reply: Message, order: Round | None) -> None:
        most = sealed_most(self.errand.max_bytes) if self._sealed else self.errand.max_bytes
        if reply.has_content() and is_larger(reply.content, most):
            self._drop(site, TOO_LARGE)
            return
        size = message_bytes(reply)
        self.result.bytes_up[site] = size
        self._event("message", site, direction="up", bytes=size)
        if reply.has_error():
            # Its reason may hold an exception's text from inside the site: only the number is kept.
            self._drop(site, f"FLOWER_ERROR_{reply.error.code}")
        elif refusal := wire.decode_refusal(reply.content):
            self.result.refusals[site] = refusal
            self.result.late += refusal.code == DEADLINE
            self._drop(site, f"{refusal.code} ({refusal.field})" if refusal.field else refusal.code)
        else:
            self._take(site, reply.content, order)

    def _opened(self, content: wire.Content, order: Round | None) -> wire.Content:
        """What the site said. Raises ``ArtefactError`` if it is not sealed as it should be."""
        if not self._sealed or self.owner.unseal is None or order is None:
            return content
        said = self.owner.unseal(content, order)
        if is_larger(said, self.errand.max_bytes):
            raise ArtefactError(TOO_LARGE)
        return said

    def _take(self, site: str, content: wire.Content, order: Round | None) -> None:
        try:
            self.errand.take(site, self._opened(content, order))
        except DiskFault:
            raise  # this machine's fault, no site's
        except ArtefactError as error:
            self._drop(site, "; ".join(error.faults) or error.message)
            return
        self.result.sites.append(site)
        self._event("taken", site)
        progress.step(site)

    def _drop(self, site: str, cause: str) -> None:
        self.result.rejected.append(Rejection(site, cause))
        self._event("dropped", site, reason=cause)
        progress.step(f"{site}: dropped, {cause}")

    def _event(self, event: str, site: str, **facts: object) -> None:
        self.owner.events.write(event, stage=self.errand.stage, round=self.errand.index, site=site, **facts)
