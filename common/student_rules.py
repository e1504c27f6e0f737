"""What a recipe may say of students: settings that go together, and a start that every one of them has."""

from __future__ import annotations

from collections.abc import Iterator

from common.names import SHIPPED_STUDENTS, STUDENTS
from common.recipe import Distillation, Recipe, Start, StudentConfig
from common.schema_check import Fault


def student_faults(recipe: Recipe) -> Iterator[Fault]:
    """All that is wrong with the students of ``recipe``."""
    yield from _setting_faults(recipe.student)
    yield from _start_faults(recipe)


def _setting_faults(student: StudentConfig) -> Iterator[Fault]:
    """Stages that together are longer than the training, and a teacher without anything to teach by."""
    if student.warmup_share + student.finetune_share > 1:
        yield Fault(
            "student.finetune_share",
            f"{student.finetune_share} and student.warmup_share={student.warmup_share} are more than 1",
            "lower one of the two: together at most 1",
        )
    if student.distillation == Distillation.agnostic and not student.feature_weight:
        yield Fault(
            "student.feature_weight",
            "student.distillation=agnostic teaches by features alone, and their weight is 0",
            "raise it, or set student.distillation=none",
        )


def _start_faults(recipe: Recipe) -> Iterator[Fault]:
    """Students that are to start from shipped weights and ship none, each by its own key."""
    if recipe.student.start is not Start.shipped:
        return
    asked = [("student.start", recipe.student.name)]
    asked += [(f"sites[{index}].student", site.student or "") for index, site in enumerate(recipe.sites)]
    for key, kind in asked:
        if kind in STUDENTS and kind not in SHIPPED_STUDENTS:
            fix = f"set student.start=mae, moco or random, or choose from {', '.join(SHIPPED_STUDENTS)}"
            yield Fault(key, f"{kind} ships no weights to start from", fix)
