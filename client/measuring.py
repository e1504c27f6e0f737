"""A site's models on its own test patients, and where the site keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from client.deadline import Deadline
from client.dp.randomness import SystemRandomness
from client.evaluation import evaluate_patients, release_metrics
from client.patients import Patient
from client.personal import PERSONAL_FILE, PERSONAL_TEACHER, personalises
from client.publishing import TEACHER, noised_dice
from client.site import Site
from client.students import load_student
from client.teachers import LOCAL_TEACHER
from common.adapter import Adapter
from common.guard_api import Metric
from common.plan import RunPlan
from common.privacy.published import PublishedMetrics
from common.teacher import ResidentTeacher, Teacher, resident_teacher, teacher_for

Forward = Callable[[Tensor], Tensor]


def model_path(site: Site, name: str) -> Path:
    """Where a site keeps the model ``name``."""
    at_top = {"student": "student.safetensors", PERSONAL_TEACHER: PERSONAL_FILE}
    return site.folder / at_top.get(name, f"baselines/{name}.safetensors")


@contextmanager
def opened_models(
    site: Site, plan: RunPlan, adapter: Adapter, beside: Sequence[str] = ()
) -> Iterator[dict[str, Callable[[], Forward]]]:
    """Name -> a function that makes the model ready: teachers may share one network, so use one at a time.

    Args:
        beside: students in the site's folder that the plan does not name.

    Raises ``ArtefactError``, when the model is made ready, for an adapter that is none of the plan's.
    """

    def with_adapter(teacher: ResidentTeacher, given: Adapter) -> Forward:
        teacher.slots.write(given)
        network: Teacher = teacher.network
        return lambda image: network(image).logits

    own = resident_teacher(site.teacher(plan), plan.data)
    ready: dict[str, Callable[[], Forward]] = {
        TEACHER: lambda: with_adapter(teacher_for(adapter, plan), adapter)
    }
    personal = [PERSONAL_TEACHER] if personalises(plan) else []
    for name in (*personal, "student", *plan.baselines, *beside):
        path = model_path(site, name)
        if not path.exists():
            continue
        if name in (LOCAL_TEACHER, PERSONAL_TEACHER):
            ready[name] = lambda path=path: with_adapter(own, Adapter.load(path))
        else:
            ready[name] = lambda path=path: load_student(path).module
    yield ready


def evaluate_models(
    site: Site, plan: RunPlan, adapter: Adapter, test: Sequence[Patient], deadline: Deadline
) -> list[Metric]:
    """Each model on this site's own test patients; the policy's smallest cell decides what is released."""
    seed = site.draw_seed(plan, "bootstrap")
    released: list[Metric] = []
    with opened_models(site, plan, adapter) as models:
        for name, make_ready in models.items():
            deadline.check("evaluating")
            values = evaluate_patients(make_ready(), test, plan.data, plan.evaluation)
            released += release_metrics(name, values, plan.evaluation, site.policy, seed)
    return released


def noised_metrics(
    site: Site, plan: RunPlan, adapter: Adapter, test: Sequence[Patient], published: PublishedMetrics
) -> list[Metric]:
    """What of `evaluate_models` leaves a private run: the teacher's mean Dice, with the system's noise."""
    with opened_models(site, plan, adapter) as models:
        values = evaluate_patients(models[TEACHER](), test, plan.data, plan.evaluation)
    return noised_dice(values["dice"], published, SystemRandomness())
