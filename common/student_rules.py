"""Which of a student's settings go together."""

from __future__ import annotations

from collections.abc import Iterator

from common.recipe import Distillation, StudentConfig
from common.schema_check import Fault


def student_faults(student: StudentConfig) -> Iterator[Fault]:
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
