"""Progress of long work: a bar on a terminal, plain lines elsewhere, nothing when quiet.

Everything goes to standard error, so that standard output holds only what a command answers. Showing
progress never fails the work: a terminal that cannot be written to is left alone from then on.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class _Display:
    """What is shown now. All methods are called under the module's lock."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.quiet = quiet
        self.stream = stream
        self.started = time.monotonic()
        self.title = ""
        self.total = 0
        self.done = 0
        self._bar: tuple[Progress, TaskID] | None = None

    def stage(self, title: str, total: int) -> None:
        self.end()
        self.title, self.total, self.done = title, total, 0
        if self._on_terminal():
            self._bar = self._start_bar()
        else:
            self._line(title)

    def step(self, text: str) -> None:
        self.done += 1
        if self._bar:
            bar, task = self._bar
            bar.update(task, completed=self.done, detail=text)
        else:
            self._line(f"{self._count()} {text}")

    def end(self) -> None:
        if self._bar:
            self._bar[0].stop()
            self._bar = None

    def _count(self) -> str:
        counted = f" {self.done}/{self.total}" if self.total else ""
        return f"{self.title}{counted}:" if self.title else ""

    def _on_terminal(self) -> bool:
        stream = self.stream or sys.stderr
        return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")

    def _line(self, text: str) -> None:
        elapsed = time.monotonic() - self.started
        print(f"[{elapsed:7.1f} s] {text.strip()}", file=self.stream or sys.stderr, flush=True)

    def _start_bar(self) -> tuple[Progress, TaskID]:
        # Imported here: rich costs a tenth of a second, and `--help` shows no progress.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        bar = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", style="dim"),
            console=Console(file=self.stream or sys.stderr),
        )
        task = bar.add_task(self.title, total=self.total or None, detail="")
        bar.start()
        return bar, task


_lock = threading.RLock()
_display = _Display()


def configure(quiet: bool = False, stream: TextIO | None = None) -> None:
    """Start afresh, time included: ``quiet`` shows nothing, ``stream`` replaces standard error."""
    global _display
    with _lock:
        _show("end")
        _display = _Display(quiet, stream)


def stage(title: str, total: int = 0) -> None:
    """Begin a stage of ``total`` steps (0: not known); a stage that is open ends."""
    with _lock:
        _show("stage", title, total)


def step(text: str = "") -> None:
    """One step of the stage is done; ``text`` says which."""
    with _lock:
        _show("step", text)


def end() -> None:
    """The stage is over."""
    with _lock:
        _show("end")


def _show(verb: str, *values: object) -> None:
    if _display.quiet:
        return
    try:
        getattr(_display, verb)(*values)
    except Exception:
        # A closed pipe, an encoding without our letters, a terminal that rich does not understand: the
        # work goes on, unseen.
        _display.quiet = True
