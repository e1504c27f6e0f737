"""What a run between hospitals finds of its code and weights, and how it tells of its end."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import checkpoints
from common.canonical import sha256_of
from common.code_digest import code_sha256
from common.errors import DEFECT_EXIT_CODE, INTERRUPTED_EXIT_CODE, PolicyRefusal
from common.release import build_bundle, bundle_code_sha256
from server import ending
from server.network import runs
from server.network.consortium import Consortium, Settings


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    with zipfile.ZipFile(io.BytesIO(build_bundle())) as bundle:
        bundle.extractall(folder)
    return folder


def test_a_submitted_plan_names_the_code_that_the_bundle_will_find(unpacked: Path) -> None:
    assert bundle_code_sha256(build_bundle()) == code_sha256(unpacked)
    assert code_sha256(unpacked) != code_sha256()  # a checkout has the guard and the commands too


def test_the_bundles_server_finds_the_weights_of_the_installation_and_code_with_weights_its_own(
    unpacked: Path, tmp_path: Path
) -> None:
    def folder(code: Path, told: Path) -> str:
        program = "from common import checkpoints; print(checkpoints.FOLDER)"
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=code, capture_output=True, text=True, timeout=60, check=True,
            env={"PYTHONPATH": str(code), checkpoints.SHIPPED: str(told), "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        return done.stdout.strip()

    assert folder(unpacked, checkpoints.FOLDER) == str(checkpoints.FOLDER)
    assert folder(Path(checkpoints.__file__).parents[2], tmp_path) == str(checkpoints.FOLDER)


def test_the_command_ends_as_the_run_did(tmp_path: Path) -> None:
    with pytest.raises(PolicyRefusal), ending.told_in(tmp_path):
        raise PolicyRefusal("too few sites have approved the plan", field="approval")
    with pytest.raises(ending.RunEnded, match="too few sites") as told:
        ending.raise_for(tmp_path, tmp_path / "log")
    assert told.value.exit_code == 20
    with pytest.raises(ZeroDivisionError), ending.told_in(tmp_path):
        _ = 1 / 0
    with pytest.raises(ending.RunEnded, match="ZeroDivisionError") as told:
        ending.raise_for(tmp_path, tmp_path / "log")
    assert told.value.exit_code == DEFECT_EXIT_CODE
    with ending.told_in(tmp_path):
        pass
    ending.raise_for(tmp_path, tmp_path / "log")
    ending.forget(tmp_path)
    with pytest.raises(ending.RunEnded, match="without a word"):
        ending.raise_for(tmp_path, tmp_path / "log")


def test_a_run_that_is_stopped_is_stopped_at_the_superlink_and_says_what_goes_on_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done: list[object] = []
    plan = SimpleNamespace(bundle_sha256=sha256_of(build_bundle()))

    @contextmanager
    def control(_: Consortium) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(
            start_run=lambda _, config: done.append(config["mode"]) or 7,  # type: ignore[func-returns-value]
            run_is_over=lambda number: False,
            stop_run=done.append,
        )

    monkeypatch.setattr(runs, "control_of", control)
    monkeypatch.setattr(runs, "superlink_answers", lambda _: True)
    monkeypatch.setattr(runs.Submission, "load", lambda _: SimpleNamespace(plan=plan))
    consortium = Consortium(tmp_path, Settings(host="localhost"))
    with pytest.raises(ending.RunEnded, match=f"wardround consortium run {tmp_path}") as told:
        runs.work(consortium, tmp_path / "run", "run", lambda _: True)
    assert told.value.exit_code == INTERRUPTED_EXIT_CODE
    assert done == ["run", 7]
