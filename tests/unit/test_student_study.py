"""The benchmark of students: who is timed, against whom, and what the table says."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from client.students import STUDENTS, load_student
from simulations.benchmark import students
from simulations.benchmark.students import EMBEDDED, SAM, Row, fresh_students, interleaved, table


def test_all_networks_take_turns_and_the_first_turn_does_not_count() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    found = interleaved(runs, 3)
    assert order == ["a", "b"] * 4
    assert {name: len(values) for name, values in found.items()} == {"a": 3, "b": 3}


def test_a_slower_network_has_the_larger_time() -> None:
    def work(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    found = interleaved({"slow": lambda: work(0.03), "quick": lambda: work(0.003)}, 2)
    assert min(found["slow"]) >= 30
    assert max(found["quick"]) < min(found["slow"])


def test_there_is_one_fresh_student_of_every_kind(tmp_path: Path) -> None:
    found = fresh_students(64, tmp_path)
    assert [load_student(path).card.name for path in found] == list(STUDENTS)


def test_the_sam_of_the_comparison_is_the_full_vit_b(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(students, "shipped_teacher", lambda name, size: torch.nn.Identity())
    with torch.device("meta"):
        large = students.teachers(256)[SAM]
    encoder = sum(parameter.numel() for parameter in large.encoder.parameters())
    assert encoder == pytest.approx(86.7e6, rel=0.01)


def test_the_table_says_how_many_times_faster_a_student_is() -> None:
    row = Row("unet-xs", "onnx", 256, 178626, 732725, 7.04, {SAM: 0.02, EMBEDDED: 0.25}, 0.8125)
    line = table([row]).splitlines()[-1]
    assert line == "| unet-xs | onnx | 256 | 178,626 | 733 | 7.0 | 1/50.0 | 1/4.0 | 0.8125 |"
