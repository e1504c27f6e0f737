"""What a recipe may say of students together: a start that every one of them has."""

from __future__ import annotations

from collections.abc import Iterator

from common.recipe import SHIPPED_STUDENTS, STUDENTS, Recipe, Start
from common.schema_check import Fault


def student_faults(recipe: Recipe) -> Iterator[Fault]:
    """Students that are to start from shipped weights and ship none, each by its own key."""
    if recipe.student.start is not Start.shipped:
        return
    asked = [("student.start", recipe.student.name)]
    asked += [(f"sites[{index}].student", site.student or "") for index, site in enumerate(recipe.sites)]
    for key, kind in asked:
        if kind in STUDENTS and kind not in SHIPPED_STUDENTS:
            fix = f"set student.start=mae, moco or random, or choose from {', '.join(SHIPPED_STUDENTS)}"
            yield Fault(key, f"{kind} ships no weights to start from", fix)
