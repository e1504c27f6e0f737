"""Progress: a bar on a terminal, plain lines elsewhere, nothing when quiet, and never an exception."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterator

import pytest

from common import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class BrokenTerminal(Terminal):
    def write(self, text: str) -> int:
        raise UnicodeEncodeError("ascii", text, 0, 1, "no such letter")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    progress.configure()


def test_elsewhere_each_step_is_one_plain_line_with_the_time() -> None:
    stream = io.StringIO()
    progress.configure(stream=stream)
    progress.stage("adapt round 1", 2)
    progress.step("harbour")
    progress.step("southgate")
    progress.end()
    lines = stream.getvalue().splitlines()
    assert [re.sub(r"^\[ *\d+\.\d s\] ", "", line) for line in lines] == [
        "adapt round 1",
        "adapt round 1 1/2: harbour",
        "adapt round 1 2/2: southgate",
    ]
    assert all(re.match(r"^\[ *\d+\.\d s\] ", line) for line in lines)


def test_a_stage_of_unknown_length_counts_nothing() -> None:
    stream = io.StringIO()
    progress.configure(stream=stream)
    progress.stage("reading")
    progress.step("one")
    assert stream.getvalue().splitlines()[1].endswith("] reading: one")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    progress.configure(stream=stream)
    progress.stage("adapt", 2)
    progress.step("harbour")
    progress.step("southgate")
    progress.end()
    assert "adapt" in stream.getvalue()
    assert "2/2" in stream.getvalue()
    assert "southgate" in stream.getvalue()


@pytest.mark.parametrize("kind", ["", "dumb"])
def test_a_terminal_that_cannot_draw_gets_plain_lines(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("TERM", kind)
    stream = Terminal()
    progress.configure(stream=stream)
    progress.stage("adapt", 1)
    progress.step("harbour")
    assert stream.getvalue().splitlines()[1].endswith("adapt 1/1: harbour")


def test_quiet_shows_nothing() -> None:
    stream = io.StringIO()
    progress.configure(quiet=True, stream=stream)
    progress.stage("adapt", 1)
    progress.step("harbour")
    progress.end()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
def test_an_odd_terminal_never_fails_the_work(monkeypatch: pytest.MonkeyPatch, terminal: str) -> None:
    monkeypatch.setenv("TERM", terminal)
    closed = io.StringIO()
    closed.close()
    for stream in (BrokenTerminal(), closed):
        progress.configure(stream=stream)
        progress.stage("prüfen", 1)
        progress.step("Ω")
        progress.end()


def test_steps_without_a_stage_are_shown_too() -> None:
    stream = io.StringIO()
    progress.configure(stream=stream)
    progress.end()
    progress.step("alone")
    assert stream.getvalue().endswith("] alone\n")


def test_threads_lose_no_step() -> None:
    stream = io.StringIO()
    progress.configure(stream=stream)
    progress.stage("sites", 200)
    threads = [threading.Thread(target=lambda: [progress.step("done") for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = [int(re.findall(r"(\d+)/200", line)[0]) for line in stream.getvalue().splitlines()[1:]]
    assert counts == list(range(1, 201))
