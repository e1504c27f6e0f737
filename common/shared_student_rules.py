"""What a recipe must say whose students' weights are trained together: in the walk, or in a baseline."""

from __future__ import annotations

from collections.abc import Iterator

from common.names import POOLED_BASELINES, SHIPPED_STUDENTS
from common.recipe import Recipe, Start, StudentScope
from common.schema_check import Fault

ONE_STUDENT = ("fedavg", "fedprox", "fedbn", "centralised")  # pooled baselines of one network for all sites


def shared_student_faults(recipe: Recipe) -> Iterator[Fault]:
    """Sites of different students or starts, rounds without a step, and what a private run may not send."""
    settings = recipe.student
    pooled = [
        (f"baselines[{i}]", name) for i, name in enumerate(recipe.baselines) if name in POOLED_BASELINES
    ]
    averaged = [(key, name) for key, name in pooled if name in ONE_STUDENT]
    if settings.federated:
        averaged.insert(0, ("student.scope", "a federated student"))
        steps = round(settings.federated_share * settings.steps)
        if steps < settings.rounds:
            what = f"{settings.rounds} rounds share {steps} of the student's {settings.steps} steps"
            yield Fault("student.rounds", what, "lower it, or raise student.federated_share")
    if any(name in ("fedavg", "fedprox", "fedbn") for _, name in pooled) and settings.steps < settings.rounds:
        what = f"a federated baseline shares {settings.steps} steps over {settings.rounds} rounds"
        yield Fault("student.rounds", what, "lower it, or raise student.steps")
    others = [site for site in recipe.sites if site.student not in (None, settings.name)]
    for key, name in averaged if others else []:
        sites = ", ".join(f"{site.name} ({site.student})" for site in others)
        what = f"{name} is one network for all sites, and some have another than {settings.name}: {sites}"
        yield Fault(key, what, "leave sites.NAME.student out")
    if settings.start not in (None, Start.shipped) or settings.name not in SHIPPED_STUDENTS:
        for key, name in averaged:
            what = f"{name} starts from the same weights everywhere, which only a shipped student has"
            fix = f"leave student.start out and choose from {', '.join(SHIPPED_STUDENTS)}"
            yield Fault(key, what, fix)
    if recipe.privacy.asked:
        yield from _private_faults(settings.scope, pooled)


def deployment_faults(recipe: Recipe) -> Iterator[Fault]:
    """What a recipe asks for that no deployed consortium can have: everybody's images in one place."""
    for index, name in enumerate(recipe.baselines):
        if name in POOLED_BASELINES:
            what = f"{name} needs all sites' images or models in one place: only a simulation has them"
            yield Fault(f"baselines[{index}]", what, "leave it out")


def _private_faults(scope: StudentScope, pooled: list[tuple[str, str]]) -> Iterator[Fault]:
    if scope is StudentScope.federated:
        what = "a student's weights would leave without noise"
        yield Fault("student.scope", what, "take local: distillation costs no budget")
    for key, name in pooled:
        what = f"{name} is trained on all sites' patients without noise, and its metrics are not noised"
        yield Fault(key, what, "leave it out")
