"""What a run that is interrupted leaves behind, for whoever prints the last line."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

_run: tuple[Path, Sequence[str]] | None = None


def set_resume(run_dir: Path, command: Sequence[str]) -> None:
    """From now on an interrupt speaks of ``run_dir``, which ``command`` goes on with."""
    global _run
    _run = run_dir, tuple(command)


def clear_resume() -> None:
    """The run is over: an interrupt has nothing to say of it any more."""
    global _run
    _run = None


def resume_hint() -> str:
    """One line: what was kept, and the command that goes on with it."""
    if _run is None:
        return "Nothing was being saved."
    run_dir, command = _run
    if not (run_dir / "config.yaml").is_file():
        return f"Nothing had been saved yet in {run_dir}."
    return f"Every finished round is kept in {run_dir}; go on with: {shlex.join(command)}"
