"""The checkpoint: whole or as before, and only for the plan that made it."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.durable import append_line
from common.errors import ArtefactError
from common.guard_api import Metric, SiteCounts, SiteMetrics, StudentNote
from common.plan import RunPlan
from common.style import StyleGroup, StyleSummary
from server.outcome import RunOutcome, SiteRefusal
from server.report.schema import Rejection, RoundRecord
from server.state import CHECKPOINT, Checkpoint, StateStore


def checkpoint(plan: RunPlan, value: float = 1.0, size: int = 3) -> Checkpoint:
    record = RoundRecord(
        0, "adapt", ["a"], {"a": 10}, {"a": 20}, 1.5, 0.01, [Rejection("b", "DEADLINE")], {"a": [1.0, 0.5]}
    )
    outcome = RunOutcome(
        plan.run_id, plan.digest, ["a", "b"], [SiteRefusal("c", "REFUSED_POLICY", "rounds")], [record],
        {"a": StyleSummary([StyleGroup(0.5, [0.1], [0.2])])},
        {"a": StudentNote("a", "unet-xs", 10, "ab", 1.0, 2.0, 3, 2, 1)},
        {"a": SiteMetrics("a", SiteCounts(1, 2, 3, 4, 5), [Metric("m", "dice", "x", None, None, 1, "few")])},
        "ab" * 32,
    )  # fmt: skip
    tensors = {"adapt/x": torch.full((size,), value, dtype=torch.float64), "generator/x": torch.ones(1)}
    return Checkpoint(plan, outcome, tensors)


def test_a_checkpoint_comes_back_exactly(smoke_plan: RunPlan, tmp_path: Path) -> None:
    store = StateStore(tmp_path / "state")
    assert store.load() is None
    saved = checkpoint(smoke_plan)
    store.save(saved)
    found = store.load_for(smoke_plan)
    assert found is not None
    assert found.plan == smoke_plan
    assert found.outcome == saved.outcome
    assert torch.equal(found.rule_state("adapt")["x"], saved.tensors["adapt/x"])
    assert found.rule_state("adapt").keys() == {"x"}


def test_the_outcome_comes_back_exactly(smoke_plan: RunPlan, tmp_path: Path) -> None:
    outcome = checkpoint(smoke_plan).outcome
    outcome.save(tmp_path)
    assert RunOutcome.load(tmp_path) == outcome
    with pytest.raises(ArtefactError, match="--resume"):
        RunOutcome.load(tmp_path / "elsewhere")


def test_a_state_of_another_plan_is_refused_with_the_difference_and_the_fix(
    smoke_plan: RunPlan, tmp_path: Path
) -> None:
    store = StateStore(tmp_path)
    store.save(checkpoint(smoke_plan))
    other = replace(
        smoke_plan,
        rounds=smoke_plan.rounds + 1,
        teacher=replace(smoke_plan.teacher, learning_rate=0.5),
    )
    with pytest.raises(ArtefactError, match=r"another plan.*undo.*another folder") as caught:
        store.load_for(other)
    assert caught.value.faults == (
        f"rounds: {smoke_plan.rounds} in the state, {other.rounds} now",
        f"teacher.learning_rate: {smoke_plan.teacher.learning_rate} in the state, 0.5 now",
    )


@pytest.mark.parametrize("damage", [b"", b"not a state", None])
def test_a_damaged_state_is_refused(smoke_plan: RunPlan, tmp_path: Path, damage: bytes | None) -> None:
    store = StateStore(tmp_path)
    store.save(checkpoint(smoke_plan))
    whole = store.path.read_bytes()
    store.path.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    with pytest.raises(ArtefactError, match="remove the folder"):
        store.load()


@pytest.mark.parametrize("step", ["fsync", "replace", "write"])
def test_the_last_good_state_is_kept_when_saving_fails(
    smoke_plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    store = StateStore(tmp_path)
    store.save(checkpoint(smoke_plan, 1.0))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "fsync":
        monkeypatch.setattr("common.durable.os.fsync", full)
    else:
        monkeypatch.setattr(Path, "replace" if step == "replace" else "open", full)
    with pytest.raises(ArtefactError) as caught:
        store.save(checkpoint(smoke_plan, 2.0))
    monkeypatch.undo()
    assert caught.value.exit_code == 12
    for needed in (str(tmp_path), "no space left", "Free at least", "--resume"):
        assert needed in str(caught.value)
    found = store.load()
    assert found is not None
    assert found.tensors["adapt/x"][0] == 1.0
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT], "nothing half written stays"


def test_a_crash_while_writing_leaves_the_state_before(
    smoke_plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = StateStore(tmp_path)
    store.save(checkpoint(smoke_plan, 1.0))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("common.durable.os.fsync", die)
    with pytest.raises(KeyboardInterrupt):
        store.save(checkpoint(smoke_plan, 2.0))
    monkeypatch.undo()
    found = store.load()
    assert found is not None
    assert found.tensors["adapt/x"][0] == 1.0
    store.save(checkpoint(smoke_plan, 3.0))
    again = store.load()
    assert again is not None
    assert again.tensors["adapt/x"][0] == 3.0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_last_good_state(smoke_plan: RunPlan, small_disk: Path) -> None:
    store = StateStore(small_disk / "state")
    store.save(checkpoint(smoke_plan, 1.0))
    with pytest.raises(ArtefactError, match="no space left"):
        store.save(checkpoint(smoke_plan, 2.0, size=1 << 20))
    found = store.load()
    assert found is not None
    assert found.tensors["adapt/x"][0] == 1.0
    with pytest.raises(ArtefactError, match="no space left"):
        append_line(small_disk / "events.jsonl", "x" * (1 << 20))


def test_a_disk_that_refuses_for_another_reason_says_which(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match=r"Not a directory|File exists"):
        append_line(tmp_path / "file" / "events.jsonl", "x")
