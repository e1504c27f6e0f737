"""The study of the student's settings, and the benchmark of its epochs: rows, tables and verdicts."""

from __future__ import annotations

import pytest

from common.errors import ConfigError, UsageError
from common.recipe import TeacherCache
from simulations.benchmark.distillation import Job, Timing, as_text, measure, summarise
from simulations.benchmark.distillation_terms import RECIPE, TEACHER, Cell, Row, parse, table


def test_a_row_is_settings_of_the_student_and_a_variant() -> None:
    row = Row("steps=360, boundary_weight=0.5,variant=local_only")
    assert row.overrides == ["student.steps=360", "student.boundary_weight=0.5"]
    assert row.variant == "local_only"
    for text in (RECIPE, TEACHER):
        assert (Row(text).overrides, Row(text).variant) == ([], "student")


def test_a_row_that_cannot_be_trained_is_refused_before_anything_is() -> None:
    assert parse(["steps=3"], "smoke", []) == [Row("steps=3")]
    with pytest.raises(UsageError, match="nobody"):
        parse(["variant=nobody"], "smoke", [])
    with pytest.raises(ConfigError, match="boundary_weight"):
        parse(["boundary_weight=-1"], "smoke", [])


def test_the_table_says_what_a_row_is_over_the_recipe_with_the_same_seed() -> None:
    def cell(text: str, seed: int, value: float) -> Cell:
        return Cell(Row(text), seed, {"all": value, "own": value - 0.1, "worst": value - 0.2}, 10.0)

    lines = table([cell(RECIPE, 0, 0.8), cell(RECIPE, 1, 0.7), cell("steps=9", 1, 0.75)]).splitlines()
    assert len(lines) == 4
    assert "0.750 (0.800 0.700)" in lines[2]
    assert lines[3].split(" | ")[1:5] == ["0.750", "0.050", "0.650", "0.050"]


def test_a_verdict_needs_both_ratios_and_no_call_of_a_teacher() -> None:
    good = Timing(plain=1.0, labels=1.0, kept=1.02, read=0.01, build=1.0, passes=1.0)
    slow = Timing(plain=1.0, labels=1.0, kept=1.2, read=0.01, build=1.0, passes=1.0)
    assert summarise(Job(), "uint8", [good, good, slow], 0).reached
    assert not summarise(Job(), "uint8", [good, slow, slow], 0).reached
    assert not summarise(Job(), "uint8", [good], 1).reached
    assert summarise(Job(), "uint8", [good, good, slow], 0).epoch == pytest.approx(1.02)


def test_an_epoch_from_what_was_kept_calls_no_teacher() -> None:
    outcome = measure(Job(images=8, size=32, batch=4, repetitions=1), TeacherCache.uint8)
    assert outcome.calls == 0
    assert min(vars(outcome.timings[0]).values()) > 0
    assert "teacher calls in the kept epochs: 0" in as_text(outcome)
