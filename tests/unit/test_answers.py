"""Answers on the disk: exact, read tensor by tensor, gone when dropped, and nothing else is ever read."""

from __future__ import annotations

import errno
import gc
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import server.answers
from common.adapter import Adapter, AdapterUpdate
from common.errors import ArtefactError
from server.answers import Answers
from server.collect import LiveUpdates


def update(seed: int = 0, weight: float = 3.0) -> AdapterUpdate:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "l.lora_A": torch.randn(2, 3, generator=generator),
        "head": torch.randn(4, generator=generator),
    }
    return AdapterUpdate(Adapter(tensors, "ab" * 32, 2, "base"), weight, "cd" * 32, "none", (1.5, math.pi))


def test_an_answer_comes_back_exactly(tmp_path: Path) -> None:
    answers = Answers(tmp_path / "new" / "folder")
    given = update(weight=0.1 + 0.2)
    answers.add("site-1", given)
    found = answers.update("site-1")
    assert found.adapter.digest == given.adapter.digest
    assert (found.weight, found.started_from, found.mechanism, found.losses) == (
        given.weight, given.started_from, given.mechanism, given.losses,
    )  # fmt: skip
    assert answers.weight("site-1") == given.weight
    assert answers.elements("site-1") == {"head": 4, "l.lora_A": 6}
    assert torch.equal(answers.tensor("site-1", "head"), given.adapter.tensors["head"])


def test_sites_are_sorted_whatever_the_order_of_arrival(tmp_path: Path) -> None:
    answers = Answers(tmp_path)
    for site in ("c", "a", "b.1"):
        answers.add(site, update())
    assert answers.sites() == ["a", "b.1", "c"]


def test_added_updates_are_not_kept_in_memory(tmp_path: Path) -> None:
    answers, live = Answers(tmp_path), LiveUpdates()
    for index in range(5):
        each = update(index)
        live.watch(each)
        answers.add(f"site-{index}", each)
        del each
    gc.collect()
    assert (live.now, live.peak) == (0, 1)


def test_dropped_and_cleared_answers_are_gone(tmp_path: Path) -> None:
    answers = Answers(tmp_path)
    for site in "abc":
        answers.add(site, update())
    answers.drop("b")
    assert answers.sites() == ["a", "c"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "c.safetensors"]
    with pytest.raises(ArtefactError, match="no answer"):
        answers.update("b")
    answers.add("b", update())
    answers.clear()
    assert answers.sites() == []
    assert not list(tmp_path.iterdir())


def test_what_an_interrupted_round_left_is_not_read(tmp_path: Path) -> None:
    Answers(tmp_path).add("a", update(1))
    answers = Answers(tmp_path)
    assert answers.sites() == []
    answers.add("a", update(2))
    assert answers.update("a").adapter.digest == update(2).adapter.digest


@pytest.mark.parametrize("site", ["../a", "a/b", "", "a b", "\u00e4", "a\n"])
def test_a_name_that_is_no_files_name_is_refused(tmp_path: Path, site: str) -> None:
    answers = Answers(tmp_path / "here")
    with pytest.raises(ArtefactError, match="cannot name a file"):
        answers.add(site, update())
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_second_answer_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    answers = Answers(tmp_path)
    answers.add("a", update(1))
    with pytest.raises(ArtefactError, match="already"):
        answers.add("a", update(2))
    assert answers.update("a").adapter.digest == update(1).adapter.digest


def test_a_full_disk_is_named_with_what_to_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    answers = Answers(tmp_path)
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ArtefactError, match="Free at least"):
        answers.add("a", update())
    assert answers.sites() == []
    assert not list(tmp_path.iterdir())


def test_small_answers_stay_open_and_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, opened = Answers(tmp_path), []

    def opening(path: Path, framework: str) -> object:
        opened.append(path.stem)
        return safe_open(path, framework=framework)

    monkeypatch.setattr(server.answers, "safe_open", opening)
    for site in ("a", "b"):
        answers.add(site, update())
    for _ in range(3):
        answers.tensor("a", "head")
    assert opened == ["a"]
    monkeypatch.setattr(server.answers, "MOST_OPEN", 1)
    for _ in range(2):
        answers.tensor("b", "head")
    assert opened == ["a", "b", "b"]
    answers.drop("a")
    answers.add("a", update(2))
    assert answers.update("a").adapter.digest == update(2).adapter.digest


def test_an_answer_that_was_damaged_is_named(tmp_path: Path) -> None:
    answers = Answers(tmp_path)
    answers.add("a", update())
    (tmp_path / "a.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ArtefactError, match="--resume"):
        answers.update("a")
    with pytest.raises(ArtefactError, match="--resume"):
        answers.tensor("a", "head")
