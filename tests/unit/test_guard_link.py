"""Messages in frames, and the door that they come through."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.orders import OrderBook
from common import wire
from common.errors import ArtefactError, ConfigError, DiskFault, GuardUnreachable, PolicyRefusal
from common.guard_link import frames
from common.guard_link.guard_pb2 import Description, Frame, Head
from common.guard_link.service import LONGEST_PATH, Door, describe, served
from common.plan import Round, Stage
from common.wire import desk

ORDER = Round("0" * 64, Stage.style, 0, 5.0, "n1")
ABOUT = Description(site="east", version="1", code_sha256="c")


@given(st.binary(max_size=5000), st.integers(1, 700))
def test_a_message_comes_out_as_it_went_in(message: bytes, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "FRAME_BYTES", size)
        parts = list(frames.frames_of(message, "style"))
    assert len(parts) == 1 + -(-len(message) // size)
    assert frames.message_of(parts, len(message)) == ("style", message)


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [Frame(data=b"abc")],
        [Frame(head=Head(bytes=3)), Frame(data=b"ab")],
        [Frame(head=Head(bytes=3)), Frame(data=b"abcd")],
        [Frame(head=Head(bytes=3)), Frame(head=Head(bytes=3)), Frame(data=b"abc")],
        [Frame(head=Head(bytes=3)), Frame()],
    ],
)
def test_a_message_that_is_not_as_its_head_says_is_refused(parts: list[Frame]) -> None:
    with pytest.raises(ArtefactError):
        frames.message_of(parts, 10)


def test_what_is_too_long_is_refused_unread() -> None:
    def endless() -> object:
        yield Frame(head=Head(bytes=11))
        raise AssertionError("read on")

    with pytest.raises(ArtefactError, match="11 bytes"):
        frames.message_of(endless(), 10)  # type: ignore[arg-type]


@pytest.fixture
def door(tmp_path: Path) -> Door:
    tmp_path.chmod(0o750)
    return Door(tmp_path / "guard.sock", 1 << 20)


def refusing(stage: Stage, content: wire.Content) -> wire.Content:
    return wire.encode_refusal("REFUSED_POLICY", f"field_{stage}")


def asked(door: Door) -> wire.Content:
    return desk.ask(f"unix:{door.socket}", Stage.style, ORDER, wire.encode_request(ORDER))


def test_a_refusal_keeps_its_code_and_field_and_the_socket_is_its_groups(door: Door) -> None:
    with served(door, refusing, ABOUT):
        assert stat.S_IMODE(door.socket.stat().st_mode) == 0o770
        assert describe(door.socket) == ABOUT
        refused = wire.decode_refusal(asked(door))
    assert refused == wire.Refusal("REFUSED_POLICY", "field_style")
    assert not door.socket.exists()


def test_without_a_guard_the_courier_says_what_to_start(door: Door) -> None:
    with pytest.raises(GuardUnreachable, match="wardround site guard") as missing:
        asked(door)
    assert missing.value.border_code == "GUARD_UNREACHABLE"


def test_an_answer_that_is_too_long_or_no_message_breaks_off(door: Door) -> None:
    with served(Door(door.socket, 10), refusing, ABOUT), pytest.raises(ArtefactError, match="too long"):
        asked(door)


def test_a_guard_that_was_killed_leaves_its_place_to_the_next(door: Door) -> None:
    with served(door, refusing, ABOUT):
        with pytest.raises(ConfigError) as twice, served(door, refusing, ABOUT):
            pass
        assert any("another guard" in fault for fault in twice.value.faults)
        assert describe(door.socket) == ABOUT  # the first was not disturbed


def test_all_that_is_wrong_with_a_door_is_said_at_once(tmp_path: Path) -> None:
    missing = tmp_path / ("x" * LONGEST_PATH) / "guard.sock"
    with pytest.raises(ConfigError) as wrong, served(Door(missing, 1), refusing, ABOUT):
        pass
    assert len(wrong.value.faults) == 2
    tmp_path.chmod(0o755)
    (tmp_path / "file").touch()
    taken = Door(tmp_path / "file", 1)
    with pytest.raises(ConfigError, match="chmod 2750"), served(taken, refusing, ABOUT):
        pass
    tmp_path.chmod(0o750)
    with pytest.raises(ConfigError, match="no socket"), served(taken, refusing, ABOUT):
        pass
    assert (tmp_path / "file").exists()


def test_no_order_is_taken_twice_over_restarts_too(tmp_path: Path) -> None:
    book = OrderBook(tmp_path)
    book.take(ORDER)
    for again in (book, OrderBook(tmp_path)):
        with pytest.raises(PolicyRefusal) as replay:
            again.take(ORDER)
        assert replay.value.field == "order"
    OrderBook(tmp_path).take(Round("0" * 64, Stage.style, 0, 5.0, "n2"))
    with pytest.raises(PolicyRefusal):
        book.take(Round("0" * 64, Stage.style, 0, 5.0, ""))
    (tmp_path / "orders.jsonl").write_text("{")
    with pytest.raises(ArtefactError, match="damaged"):
        OrderBook(tmp_path)


def test_a_full_disk_takes_no_order_and_leaves_the_book_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = OrderBook(tmp_path)
    book.take(ORDER)
    before = (tmp_path / "orders.jsonl").read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    later = Round("0" * 64, Stage.style, 0, 5.0, "n2")
    with monkeypatch.context() as patch:
        patch.setattr("client.orders.os.fsync", full)
        with pytest.raises(DiskFault, match="no space left"):
            book.take(later)
    assert (tmp_path / "orders.jsonl").read_bytes() == before
    OrderBook(tmp_path).take(later)
