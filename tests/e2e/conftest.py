"""One plain run of the smoke recipe, which most of these tests only look at."""

from __future__ import annotations

import fcntl
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e import walks


@dataclass(frozen=True)
class FinishedRun:
    """``run`` is the run's folder, never to be changed: `copy` it first."""

    run: Path
    stdout: str
    stderr: str

    def copy(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.run, folder / "run"))


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """``wardround simulate smoke`` in a process of its own; once, however many workers pytest has."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "smoke"
    with (base / "smoke.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            made = base / "smoke-making"
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            done = walks.wardround("simulate", "smoke", "--out", made / "run")
            assert done.returncode == 0, done.stderr
            (made / "stdout").write_text(done.stdout)
            (made / "stderr").write_text(done.stderr)
            made.rename(folder)
    return FinishedRun(folder / "run", (folder / "stdout").read_text(), (folder / "stderr").read_text())


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
