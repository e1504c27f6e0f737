"""A run that is stopped, by kill -9, Ctrl-C or a full disk, goes on and ends with the same weights."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from functools import reduce
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import Result

from common.plan import Stage
from server.state import Checkpoint, StateStore
from tests.e2e import walks
from tests.e2e.conftest import FinishedRun

FULL = Path("/dev/full")  # Linux: every write to it finds the disk full


def start(*arguments: str) -> subprocess.Popen[str]:
    """The command in a process of its own, whose progress can be read while it runs."""
    return subprocess.Popen(
        [sys.executable, "-c", walks.AS_A_USER, *arguments],
        env=walks.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def read_until(process: subprocess.Popen[str], title: str) -> None:
    """Return when the run says that it begins the stage ``title``."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.endswith(f"] {title}\n"):
            return
    raise AssertionError(f"{title!r} was never said:\n{''.join(said)}")


def resume_line(stderr: str) -> str:
    """The one line of an interrupted command; the progress before it ends in whole lines."""
    (line,) = [line for line in stderr.splitlines() if line.startswith("Interrupted.")]
    assert line == stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    return line


def stop_in(target: str, call: int, *command: str) -> Result:
    """Run ``command`` with a Ctrl-C in the ``call``-th call of ``target`` (``module:name``)."""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    holder = reduce(getattr, owners, import_module(module))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holder, name, walks.raising(KeyboardInterrupt(), getattr(holder, name), call))
        return walks.invoke(*command)


def test_resume_after_kill_9_equals_an_uninterrupted_run(smoke_run: FinishedRun, elsewhere: Path) -> None:
    command = ["simulate", "smoke", walks.QUICK, "--out", "run"]
    with start(*command) as process:
        read_until(process, "teacher, round 2")  # round 1 is saved by then
        process.kill()
    assert process.returncode == -signal.SIGKILL
    kept = walks.finished_rounds(Path("run"))
    assert kept[:2] == [("propose", 0), ("adapt", 0)]
    assert ("student", 0) not in kept
    assert not Path("run/report.json").exists()

    resumed = walks.invoke(*command, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert "teacher, round 1\n" not in resumed.stderr, "a finished round is not run again"
    assert walks.digests(Path("run")) == walks.digests(smoke_run.run)
    resumptions = [event for event in walks.events_of(Path("run")) if event["event"] == "resumed"]
    assert [(event["rounds"], event["absent"]) for event in resumptions] == [(len(kept), [])]


# What is struck, in which of its calls, and the rounds that must be in the state by then. Each strike hits
# the run where the one before has left it.
STRIKES = [
    ("simulations.simulate:write_site", 2, None),  # the second hospital is not there yet
    ("client.guard:Guard.propose", 2, None),
    ("client.rounds:adapt", 4, [("propose", 0), ("adapt", 0)]),  # the second site in the second round
    ("client.guard:summarise_style", 2, [("propose", 0), ("adapt", 0), ("adapt", 1)]),
]
LATER_STRIKES = [
    ("client.measuring:evaluate_patients", 3, "student"),  # the second site
    ("simulations.crosstest:evaluate_patients", 3, "evaluate"),
    ("simulations.assemble:site_pictures", 2, "evaluate"),
    ("simulations.simulate:rebuild", 1, "evaluate"),
]


def test_ctrl_c_in_each_stage_keeps_the_state_and_resume_ends_with_the_same_weights(
    smoke_run: FinishedRun, elsewhere: Path
) -> None:
    """One run, struck in every stage in turn; in the students' by a real signal to a process of its own."""
    command = ["simulate", "smoke", walks.QUICK, "--out", "run"]
    again: list[str] = []
    for target, call, kept in STRIKES:
        struck = stop_in(target, call, *command, *again)
        again = ["--resume"]
        check_stopped(struck.exit_code, struck.stderr, target)
        assert (None if walks.state_of(Path("run")) is None else walks.finished_rounds(Path("run"))) == kept

    with start(*command, *again) as process:
        read_until(process, "students")
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read()
    check_stopped(process.returncode, said, "students")
    assert walks.finished_rounds(Path("run"))[-1] == ("style", 0)

    for target, call, last in LATER_STRIKES:
        struck = stop_in(target, call, *command, *again)
        check_stopped(struck.exit_code, struck.stderr, target)
        assert walks.finished_rounds(Path("run"))[-1][0] == last

    line = resume_line(struck.stderr)
    ended = walks.invoke(*shlex.split(line.partition("go on with: wardround ")[2]))
    assert ended.exit_code == 0, ended.stderr
    assert walks.digests(Path("run")) == walks.digests(smoke_run.run)
    benefit = {(cell.site, cell.model, cell.tested_on, cell.metric): cell.value
               for cell in walks.report_of(smoke_run.run).benefit}  # fmt: skip
    for cell in walks.report_of(Path("run")).benefit:
        assert cell.value == benefit[cell.site, cell.model, cell.tested_on, cell.metric]


def check_stopped(code: int, stderr: str, where: str) -> None:
    assert code == 130, f"{where}: {stderr}"
    line = resume_line(stderr)
    assert line.startswith("Interrupted. Every finished round is kept in run; go on with: wardround simulate")
    assert line.endswith("--out run --resume")


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_full_disk_while_saving_keeps_the_last_state_and_resume_works(
    smoke_run: FinishedRun, elsewhere: Path
) -> None:
    command = ["simulate", "smoke", walks.QUICK, "--out", "run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StateStore, "save", on_a_full_disk_after(Stage.adapt, StateStore.save))
        stopped = walks.invoke(*command)
    assert stopped.exit_code == 12
    assert "no space left in run/state" in stopped.stderr
    assert "MB on its disk, then run again with --resume" in stopped.stderr
    assert walks.finished_rounds(Path("run")) == [("propose", 0)]
    assert walks.events_of(Path("run"))[-1]["exit_code"] == 12

    resumed = walks.invoke(*command, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert walks.digests(Path("run")) == walks.digests(smoke_run.run)


def on_a_full_disk_after(stage: Stage, real):  # type: ignore[no-untyped-def]
    """The disk is full when the first round of ``stage`` is saved: the kernel itself says so."""

    def save(self: StateStore, checkpoint: Checkpoint) -> None:
        if checkpoint.outcome.has(stage, 0):
            self.path.with_name(f".{self.path.name}.part").symlink_to(FULL)
        real(self, checkpoint)

    return save


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["report.json", "report.html"])
def test_a_full_disk_while_writing_the_report_says_what_to_free(
    smoke_run: FinishedRun, elsewhere: Path, name: str
) -> None:
    run = smoke_run.copy(elsewhere)
    before = walks.digests(run)
    for partial in (f".{name}.part", f"{name}.partial"):
        (run / partial).unlink(missing_ok=True)
        (run / partial).symlink_to(FULL)
    stopped = walks.invoke("simulate", "smoke", "--out", run, "--resume")
    assert stopped.exit_code == 12, stopped.stderr
    assert f"no space left in {run}" in stopped.stderr
    assert walks.digests(run) == before, "the report before is still whole"
    assert walks.invoke("simulate", "smoke", "--out", run, "--resume").exit_code == 0
