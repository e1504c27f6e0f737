"""One site's work in one round: LoRA-tune the shared teacher on its own labelled patients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from client.deadline import Deadline
from client.fitting import Schedule, ends, fit
from client.losses import segmentation_loss
from client.patients import Patient
from client.prefix_cache import training_views
from client.sampling import PatchSampler
from common.adapter import Adapter
from common.plan import RunPlan
from common.teacher import ResidentTeacher, Teacher
from common.tuning.halves import BOTH, Halves


@dataclass(frozen=True)
class Adaptation:
    """The adapter after training.

    Attributes:
        losses: mean of the first and of the last tenth of the steps.
        halves: those of the factors that were trained; the others are as they were sent.
    """

    adapter: Adapter
    losses: tuple[float, float]
    halves: Halves = BOTH
    site: str = ""


class Visit(NamedTuple):
    """One round at one site.

    ``round_index`` decides the learning rate, ``seed`` every batch. ``folder`` is the site's own, where the
    frozen prefix is kept between rounds if the plan has fixed views; None keeps none. ``halves``: the
    factors that are trained in this round, as far as the preset trains them at all. ``site``: by name, for a
    generator that tells sites apart.
    """

    round_index: int
    seed: int
    folder: Path | None = None
    halves: Halves = BOTH
    site: str = ""


def adapt(
    teacher: ResidentTeacher,
    adapter: Adapter,
    patients: Sequence[Patient],
    plan: RunPlan,
    order: tuple[int, int] | Visit,
    deadline: Deadline,
) -> Adaptation:
    """Train for ``plan.teacher.steps`` steps from ``adapter``.

    Args:
        order: (round index, seed), where a frozen prefix may be kept, and what is trained; see `Visit`.

    Raises:
        ArtefactError: the adapter does not fit.
        ConfigError: ``plan.teacher.cached_views``, and the adapter leaves no prefix frozen.
        DataError: the loss is no longer finite.
        DeadlinePassed: between two steps.
    """
    settings, visit = plan.teacher, Visit(*order)
    steps = settings.steps
    schedule = Schedule(settings.learning_rate, steps, visit.round_index * steps, plan.rounds * steps)
    with teacher.visit(adapter, train=True, halves=visit.halves) as network:
        if settings.cached_views:
            loss_at = training_views(network, adapter, patients, plan, (visit.seed, visit.folder))
        else:
            loss_at = _fresh_crops(network, patients, plan, visit.seed)
        trained = list(teacher.slots.trainable(visit.halves).values())
        losses = fit(trained, schedule, loss_at, deadline, "adapting the teacher")
        return Adaptation(teacher.slots.read(), ends(losses), visit.halves)


def _fresh_crops(
    network: Teacher, patients: Sequence[Patient], plan: RunPlan, seed: int
) -> Callable[[], Tensor]:
    """The loss of the next batch of freshly drawn and augmented crops."""
    sampler = PatchSampler(patients, plan.data.image_size, seed, labelled=True)

    def loss_at() -> Tensor:
        batch = sampler.batch(plan.teacher.batch_size)
        return segmentation_loss(network(batch.images).logits, batch.masks, plan.data.exclusive)

    return loss_at
