"""Whole runs with the real apps, for the tests that look at what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

import client.guard
import client.site
from common import progress
from common.plan import Stage
from server.report.schema import RunReport
from server.state import Checkpoint, StateStore
from tests.architecture.sources import ROOT
from wardround import main

QUICK = "baselines=[]"  # the same teacher and students, and half the time
# SIGINT as on a terminal, even where these tests run in the background of a shell that ignores it.
AS_A_USER = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('wardround', run_name='__main__', alter_sys=True)"
)


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def wardround(*arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; ``more`` is added to its environment."""
    command = [sys.executable, "-m", "wardround", *map(str, arguments)]
    return subprocess.run(
        command, env=environment(**more), capture_output=True, text=True, timeout=500, check=False
    )


def invoke(*arguments: str | Path) -> Result:
    """The same command in this process, where a fault can be planted; it saves the import of torch."""
    client.guard.open_guard.cache_clear()  # another process would read every site's files anew
    client.site._patients.cache_clear()
    try:
        return CliRunner().invoke(main, list(map(str, arguments)))
    finally:
        progress.configure()


def report_of(run: Path) -> RunReport:
    return RunReport.load(run / "report.json")


def digests(run: Path) -> dict[str, str]:
    """The digest of the teacher's adapter and of each site's student."""
    report = report_of(run)
    students = {f"student of {site}": entry.sha256 for site, entry in report.students.items()}
    return {"teacher": report.teacher.adapter_sha256, **students}


def events_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def receipts_of(run: Path, site: str) -> list[dict[str, Any]]:
    path = run / "sites" / site / "receipts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def state_of(run: Path) -> Checkpoint | None:
    return StateStore(run / "state").load()


def finished_rounds(run: Path) -> list[tuple[str, int]]:
    """(stage, index) of every round in the saved state."""
    state = state_of(run)
    return [] if state is None else [(record.stage, record.index) for record in state.outcome.rounds]


def rejected(run: Path, stage: Stage, index: int = 0) -> dict[str, str]:
    """Site -> cause, as the report has it."""
    record = next(entry for entry in report_of(run).rounds if (entry.stage, entry.index) == (stage, index))
    return {rejection.site: rejection.reason for rejection in record.rejected}


def fault_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("  - ")]


def raising(error: BaseException, real: Callable[..., Any], call: int = 1) -> Callable[..., Any]:
    """``real``, but its ``call``-th call raises ``error`` half-way: after the work, before the answer."""
    calls = 0

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        answer = real(*arguments, **named)
        if calls == call:
            raise error
        return answer

    return wrapped
