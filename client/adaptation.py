"""One site's work in one round: LoRA-tune the shared teacher on its own labelled patients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from client.deadline import Deadline
from client.losses import segmentation_loss
from client.patients import Patient
from client.sampling import PatchSampler
from common.adapter import Adapter
from common.errors import DataError
from common.plan import RunPlan
from common.teacher import ResidentTeacher


@dataclass(frozen=True)
class Adaptation:
    """The trained adapter, and the mean loss of the first and the last tenth of the steps."""

    adapter: Adapter
    losses: tuple[float, float]


def learning_rate_share(step: int, total: int) -> float:
    """Cosine from 1 to 0.1 over the whole run, so that late rounds average small, settled updates."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * step / max(total, 1)))


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
    losses: list[float] = []
    with teacher.visit(adapter, train=True) as network:
        parameters = list(teacher.slots.trainable().values())
        optimiser = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.01)
        for step in range(settings.steps):
            deadline.check("adapting the teacher")
            share = learning_rate_share(round_index * settings.steps + step, plan.rounds * settings.steps)
            optimiser.param_groups[0]["lr"] = settings.learning_rate * share * min(1.0, (step + 1) / 5)
            batch = sampler.batch(settings.batch_size)
            loss = segmentation_loss(network(batch.images).logits, batch.masks)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            losses.append(loss.item())
        trained = teacher.slots.read()
    if not all(math.isfinite(loss) for loss in losses):
        raise DataError("the training loss is not finite: lower teacher.learning_rate or check the images")
    tenth = max(1, len(losses) // 10)
    return Adaptation(trained, (sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth))
