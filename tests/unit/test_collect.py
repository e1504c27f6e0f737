"""Collection over grids that misbehave: late, silent, stuck, out of order, in error."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import ConfigRecord, Error, Message

import server.collect
from common import wire
from common.adapter import Adapter, AdapterUpdate
from common.errors import ArtefactError, DiskFault
from common.guard_api import StudentNote
from common.plan import Round, Stage
from common.privacy.keys import public_key
from common.wire.sealed import seal, unseal
from common.wire.signed import sign_reply
from server.collect import Collection, Collector, Errand, LiveUpdates
from server.events import EventLog
from simulations.loopback import LoopbackGrid, task_identity

SITES = {"a": 1, "b": 2, "c": 3}
ORDER = Round("ab" * 32, Stage.student, 0, 60.0, "n")


class ScriptedGrid(LoopbackGrid):
    """``script``: node id -> what its n-th pull gives: content, an `Error`, None (not yet) or a call."""

    window = None  # type: ignore[assignment]

    def __init__(self, script: dict[int, list[object]]) -> None:
        super().__init__(client=None, nodes=0)  # type: ignore[arg-type]
        self.script = script
        self.sent: dict[str, Message] = {}
        self.out = 0
        self.most_out = 0

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            node_id = message.metadata.dst_node_id
            if not self.script[node_id]:
                ids.append(None)
                continue
            message.metadata.__dict__["_message_id"] = f"message-{node_id}"
            self.sent[f"message-{node_id}"] = message
            self.out += 1
            self.most_out = max(self.most_out, self.out)
            ids.append(f"message-{node_id}")
        return ids  # type: ignore[return-value]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        (message_id,) = message_ids
        request = self.sent[message_id]
        script = self.script[request.metadata.dst_node_id]
        step = script.pop(0) if len(script) > 1 else script[0]
        if callable(step):
            step = step()
        if step is None:
            return []
        self.out -= 1
        return [Message(step, reply_to=request)]  # type: ignore[call-overload]


def note(site: str) -> wire.Content:
    return wire.encode_numbers(StudentNote(site, "s", 1, "ab", 1.0, 1.0, 1, 1, 0))


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    with task_identity():
        yield


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.collect, "POLL_S", 0.005)
    monkeypatch.setattr(server.collect, "PULL_PATIENCE_S", 0.02)


class Case:
    """One collection over a scripted grid; ``taken`` is the order in which answers were taken."""

    def __init__(self, folder: Path, script: dict[int, list[object]], **options: Any) -> None:
        self.folder = folder
        self.grid = ScriptedGrid(script)
        self.collector = Collector(self.grid, EventLog(folder / "events.jsonl"), **options)
        self.taken: list[str] = []
        self.reject: dict[str, str] = {}
        self.full = False

    def run(self, deadline_s: float = 60.0) -> Collection:
        def take(site: str, content: wire.Content) -> None:
            assert wire.decode_note(content).site == site
            if self.full:
                raise DiskFault("/var/lib/wardround is full")
            if site in self.reject:
                raise ArtefactError("rejected", [self.reject[site]])
            self.taken.append(site)

        errand = Errand(Stage.student, 0, deadline_s, lambda _: wire.encode_request(ORDER), take, 1 << 20)
        return self.collector.run(errand, SITES)

    def events(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in (self.folder / "events.jsonl").read_text().splitlines()]


def reasons(collection: Collection) -> dict[str, str]:
    return {rejection.site: rejection.reason for rejection in collection.rejected}


def test_answers_are_taken_as_they_come_and_listed_by_site(tmp_path: Path) -> None:
    def once(*others: str) -> Callable[[], wire.Content | None]:
        return lambda: note(min(SITES.keys() - others)) if set(others) <= set(case.taken) else None

    case = Case(tmp_path, {1: [once("b", "c")], 2: [lambda: note("b") if "c" in case.taken else None],
                           3: [note("c")]})  # fmt: skip
    collection = case.run()
    assert case.taken == ["c", "b", "a"]
    assert collection.sites == ["a", "b", "c"]
    assert not collection.rejected


def test_an_answer_that_is_too_large_is_dropped_unread(tmp_path: Path) -> None:
    large = wire.Content({"body": ConfigRecord({"json": "{" * (2 << 20)})})
    listed = wire.Content({"body": ConfigRecord({"json": [0.0] * (1 << 18)})})
    case = Case(tmp_path, {1: [large], 2: [note("b")], 3: [listed]})
    assert reasons(case.run()) == {"a": "TOO_LARGE", "c": "TOO_LARGE"}


def test_where_answers_are_sealed_no_other_counts_but_a_refusal(tmp_path: Path) -> None:
    key = X25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw().hex()
    script: dict[int, list[object]] = {
        1: [seal(note("a"), ORDER, public)], 2: [note("b")], 3: [wire.encode_refusal("REFUSED_LOCAL")]
    }  # fmt: skip
    case = Case(tmp_path, script, unseal=lambda content, order: unseal(content, order, key))
    assert reasons(case.run()) == {"b": "an answer that is not sealed", "c": "REFUSED_LOCAL"}
    assert case.taken == ["a"]


def test_what_is_sealed_wrongly_or_too_large_inside_is_dropped_with_the_reason(tmp_path: Path) -> None:
    key = X25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw().hex()
    stranger = X25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    large = wire.Content({"body": ConfigRecord({"json": "{" * ((1 << 20) + 2000)})})
    script: dict[int, list[object]] = {
        1: [seal(note("a"), ORDER, stranger)],
        2: [seal(note("b"), replace(ORDER, nonce="another"), public)],
        3: [seal(large, ORDER, public)],
    }
    case = Case(tmp_path, script, unseal=lambda content, order: unseal(content, order, key))
    wrong = "sealed to another key or for another order, or changed on its way"
    assert reasons(case.run()) == {"a": wrong, "b": wrong, "c": "TOO_LARGE"}
    assert not case.taken


def test_bytes_are_those_of_the_messages(tmp_path: Path) -> None:
    case = Case(tmp_path, {1: [note("a")], 2: [note("b")], 3: [note("c")]})
    collection = case.run()
    reply = Message(note("a"), reply_to=case.grid.sent["message-1"])
    # Neither message has its own id yet when it is counted here; a request gets it in the push.
    assert collection.bytes_up["a"] == len(wire.pack_message(reply))
    id_bytes = len("message-1") + 2
    assert collection.bytes_down["a"] + id_bytes == len(wire.pack_message(case.grid.sent["message-1"]))


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (Error(7, "not approved: /srv/site"), "REFUSED_BUNDLE"),
        (Error(2, "<class 'RuntimeError'>:<'/data/patient_17'>"), "FLOWER_ERROR_2"),
        (wire.encode_refusal("REFUSED_POLICY", "allow_style"), "REFUSED_POLICY (allow_style)"),
        (wire.encode_refusal("SITE_FAILED"), "SITE_FAILED"),
    ],
)
def test_a_site_that_fails_is_dropped_with_its_code(tmp_path: Path, step: object, reason: str) -> None:
    case = Case(tmp_path, {1: [note("a")], 2: [step], 3: [note("c")]})
    collection = case.run()
    assert collection.sites == ["a", "c"]
    assert reasons(collection) == {"b": reason}
    assert "patient" not in (tmp_path / "events.jsonl").read_text(), "Flower's reason is not kept"


def test_a_rejected_answer_is_dropped_with_the_reason(tmp_path: Path) -> None:
    case = Case(tmp_path, {1: [note("a")], 2: [note("b")], 3: [note("c")]})
    case.reject = {"a": "an extra tensor"}
    collection = case.run()
    assert reasons(collection) == {"a": "an extra tensor"}
    assert case.taken == ["b", "c"]
    dropped = [event for event in case.events() if event["event"] == "dropped"]
    assert [(event["site"], event["reason"]) for event in dropped] == [("a", "an extra tensor")]


def test_a_full_disk_of_the_server_is_no_fault_of_the_site(tmp_path: Path) -> None:
    case = Case(tmp_path, {1: [note("a")], 2: [note("b")], 3: [note("c")]})
    case.full = True
    with pytest.raises(DiskFault):
        case.run()


def test_an_answer_that_cannot_be_decoded_is_dropped(tmp_path: Path) -> None:
    case = Case(tmp_path, {1: [note("a")], 2: [wire.encode_request(ORDER)], 3: [note("c")]})
    assert reasons(case.run()) == {"b": "the message carries no body"}


def test_a_message_that_could_not_be_sent_drops_the_site(tmp_path: Path) -> None:
    case = Case(tmp_path, {1: [], 2: [note("b")], 3: [note("c")]})
    collection = case.run()
    assert reasons(collection) == {"a": "NOT_SENT"}
    assert collection.sites == ["b", "c"]


def test_a_silent_site_is_dropped_at_its_deadline(tmp_path: Path) -> None:
    case = Case(tmp_path, {1: [None], 2: [note("b")], 3: [note("c")]})
    collection = case.run(deadline_s=1.0)
    assert reasons(collection) == {"a": "DEADLINE"}
    assert collection.late == 1
    assert collection.sites == ["b", "c"], "what came in time while it was waited for is kept"


def test_a_reply_after_the_deadline_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(server.collect, "monotonic", lambda: now)

    def late() -> wire.Content:
        nonlocal now
        now += 61
        return note("c")

    case = Case(tmp_path, {1: [note("a")], 2: [note("b")], 3: [late]})
    assert reasons(case.run(deadline_s=60)) == {"c": "DEADLINE"}


@pytest.mark.parametrize("stuck", [(1,), (1, 2)])
def test_a_pull_that_hangs_does_not_hang_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stuck: tuple[int, ...]
) -> None:
    """A half-uploaded reply can block Flower's pull for minutes."""
    monkeypatch.setattr(server.collect, "STUCK_S", 0.1)
    release = threading.Event()

    def hang() -> None:
        release.wait(60)

    script: dict[int, list[object]] = {1: [note("a")], 2: [note("b")], 3: [None, None, note("c")]}
    case = Case(tmp_path, script | {node: [hang] for node in stuck})
    try:
        collection = case.run(deadline_s=2.0)
    finally:
        release.set()
    assert reasons(collection) == {site: "DEADLINE" for site, node in SITES.items() if node in stuck}
    assert "c" in collection.sites


def test_a_pull_that_fails_is_tried_again(tmp_path: Path) -> None:
    def broken() -> None:
        raise ConnectionError("the link is down")

    case = Case(tmp_path, {1: [broken, broken, note("a")], 2: [note("b")], 3: [note("c")]})
    assert case.run().sites == ["a", "b", "c"]


def test_an_engine_that_stops_ends_the_loop(tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Case(tmp_path, {1: [stop], 2: [None], 3: [None]}).run()


@pytest.mark.parametrize(("window", "most"), [(None, 3), (1, 1), (2, 2)])
def test_no_more_messages_are_out_than_the_window_allows(tmp_path: Path, window: int, most: int) -> None:
    script: dict[int, list[object]] = {node: [None, note(site)] for site, node in SITES.items()}
    case = Case(tmp_path, script, window=window)
    assert case.run().sites == ["a", "b", "c"]
    assert case.grid.most_out == most


def test_a_deadline_runs_from_its_own_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(server.collect, "monotonic", lambda: now)

    def slow(site: str) -> Callable[[], wire.Content]:
        def answer() -> wire.Content:
            nonlocal now
            now += 50
            return note(site)

        return answer

    case = Case(tmp_path, {node: [slow(site)] for site, node in SITES.items()}, window=1)
    assert case.run(deadline_s=60).sites == ["a", "b", "c"]


def test_live_updates_counts_an_update_until_its_last_tensor_is_gone() -> None:
    live = LiveUpdates()

    def update() -> AdapterUpdate:
        found = AdapterUpdate(Adapter({"x": torch.ones(3), "y": torch.ones(2)}, "ab", 1, "lite"), 1.0, "cd")
        live.watch(found)
        return found

    first, second = update(), update()
    assert (live.now, live.peak) == (2, 2)
    kept = first.adapter.tensors["x"]
    del first
    assert live.now == 2, "a rule that keeps a tensor keeps the update"
    del kept
    assert live.now == 1
    del second
    assert (live.now, live.peak) == (0, 2)


def test_nodes_are_waited_for_until_all_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path, {})
    seen = iter([[], [7], [9, 7], [9, 7, 8]])
    monkeypatch.setattr(case.grid, "get_node_ids", lambda: next(seen))
    assert case.collector.online(2, 60.0) == [7, 9]


def test_the_wait_for_nodes_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path, {})
    monkeypatch.setattr(case.grid, "get_node_ids", lambda: [7])
    assert case.collector.online(2, 0.05) == [7]


def test_with_keys_only_what_its_site_signed_for_this_order_is_taken(tmp_path: Path) -> None:
    keys = {site: Ed25519PrivateKey.generate() for site in SITES}
    public = {site: public_key(key) for site, key in keys.items()}
    earlier = replace(ORDER, nonce="an earlier one")

    def run(first: wire.Content, second: wire.Content, third: wire.Content) -> tuple[Case, Collection]:
        case = Case(tmp_path, {1: [first], 2: [second], 3: [third]}, keys=public)
        return case, case.run()

    case, collection = run(
        sign_reply(note("a"), "a", ORDER, keys["a"]),
        sign_reply(note("b"), "b", earlier, keys["b"]),
        note("c"),
    )
    assert case.taken == collection.sites == ["a"]
    assert reasons(collection) == {
        "b": "a reply that its site did not sign, or that was changed or answers another order",
        "c": "a reply that nobody signed",
    }
    case, collection = run(
        sign_reply(note("a"), "b", ORDER, keys["b"]),  # b's word in a's place
        sign_reply(wire.encode_refusal("REFUSED_BUDGET"), "b", ORDER, keys["b"]),
        wire.encode_refusal("REFUSED_BUDGET"),
    )
    assert not case.taken
    assert reasons(collection) == {
        "a": "a reply that another site signed",
        "b": "REFUSED_BUDGET",
        "c": "REFUSED_BUDGET, not signed by its site",
    }
    assert set(collection.refusals) == {"b"}  # only a site's own word is its refusal
