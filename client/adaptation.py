"""One site's work in one round: LoRA-tune the shared teacher on its own labelled patients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from client.deadline import Deadline
from client.fitting import Schedule, ends, fit
from client.losses import segmentation_loss
from client.patients import Patient
from client.sampling import PatchSampler
from common.adapter import Adapter
from common.plan import RunPlan
from common.teacher import ResidentTeacher


@dataclass(frozen=True)
class Adaptation:
    """The trained adapter, and the mean loss of the first and the last tenth of the steps."""

    adapter: Adapter
    losses: tuple[float, float]


def adapt(
    teacher: ResidentTeacher,
    adapter: Adapter,
    patients: Sequence[Patient],
    plan: RunPlan,
    order: tuple[int, int],
    deadline: Deadline,
) -> Adaptation:
    """Train for ``plan.teacher.steps`` steps from ``adapter``.

    Args:
        order: (round index, seed). The seed decides every batch; the round index the learning rate.

    Raises:
        ArtefactError: the adapter does not fit.
        DataError: the loss is no longer finite.
        DeadlinePassed: between two steps.
    """
    settings, (round_index, seed) = plan.teacher, order
    sampler = PatchSampler(patients, plan.data.image_size, seed, labelled=True)
    steps = settings.steps
    schedule = Schedule(settings.learning_rate, steps, round_index * steps, plan.rounds * steps)
    with teacher.visit(adapter, train=True) as network:

        def loss_at() -> Tensor:
            batch = sampler.batch(settings.batch_size)
            return segmentation_loss(network(batch.images).logits, batch.masks)

        losses = fit(
            list(teacher.slots.trainable().values()), schedule, loss_at, deadline, "adapting the teacher"
        )
        return Adaptation(teacher.slots.read(), ends(losses))
