"""Distil the teacher into a student, on real crops and synthetic images, from outputs cached once.

After the task-specific distillation of Vemulapalli et al. 2024 and its use with a LoRA-tuned SAM (arXiv
2503.06976): labels, softened outputs, and encoder and decoder features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from client.deadline import Deadline
from client.fitting import Schedule, fit
from client.losses import feature_loss, segmentation_loss, soft_dice_loss, softened_logit_loss
from client.patients import Patient
from client.sampling import PatchSampler
from client.students import Student
from client.transfer.sets import TransferSet
from common.plan import RunPlan
from common.probability import probabilities
from common.recipe import SyntheticLabels


class _Alignment(nn.Module):
    """1 x 1 projections of the student's features to the teacher's width; thrown away after training."""

    def __init__(self, student: Student, tokens: Tensor, features: Tensor) -> None:
        super().__init__()
        self.deep = nn.Conv2d(student.deep_channels, tokens.shape[1], 1)
        self.late = nn.Conv2d(student.late_channels, features.shape[1], 1)


def _alignment(student: Student, transfer: TransferSet | None) -> _Alignment | None:
    """For the channels that the teacher of ``transfer`` has; None where no teacher said anything."""
    if transfer is None or transfer.tokens is None or transfer.features is None:
        return None
    return _Alignment(student, transfer.tokens, transfer.features)


def distil(
    student: Student,
    patients: Sequence[Patient],
    transfer: TransferSet | None,
    plan: RunPlan,
    seed: int,
    deadline: Deadline,
) -> list[float]:
    """Train ``student`` in place for ``plan.student.steps`` steps; the loss of each step.

    Each step takes ``batch_size`` labelled crops, the same ones for every variant, and beside them
    ``transfer_batch_size`` of the transfer set. Guarantee: no teacher is called here; its outputs come from
    ``transfer``.
    """
    settings = plan.student
    sampler = PatchSampler(patients, plan.data.image_size, seed, labelled=True)
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        aligned = _alignment(student, transfer)

    def loss_at() -> Tensor:
        batch = sampler.batch(settings.batch_size)
        loss = settings.supervised_weight * segmentation_loss(
            student(batch.images), batch.masks, plan.data.exclusive
        )
        if transfer is not None:
            chosen = _draw(transfer, settings.transfer_batch_size, settings.synthetic_share, rng)
            loss = loss + _transfer_loss(student, aligned, transfer, chosen, plan, rng)
        return loss

    student.train()
    schedule = Schedule(settings.learning_rate, settings.steps, warm_up=10)
    parameters = [*student.parameters(), *([] if aligned is None else aligned.parameters())]
    losses = fit(parameters, schedule, loss_at, deadline, "distilling the student")
    student.eval()
    return losses


def _draw(transfer: TransferSet, count: int, share: float, rng: np.random.Generator) -> Tensor:
    """``count`` indices, a ``share`` of them synthetic where both kinds exist."""
    synthetic = np.flatnonzero(transfer.synthetic.numpy())
    real = np.flatnonzero(~transfer.synthetic.numpy())
    if not len(synthetic) or not len(real):
        return torch.from_numpy(rng.integers(len(transfer), size=count))
    painted = round(count * share)
    parts = [rng.choice(synthetic, painted), rng.choice(real, count - painted)]
    return torch.from_numpy(np.concatenate(parts))


def _transfer_loss(
    student: Student,
    aligned: _Alignment | None,
    transfer: TransferSet,
    chosen: Tensor,
    plan: RunPlan,
    rng: np.random.Generator,
) -> Tensor:
    settings, exclusive = plan.student, plan.data.exclusive
    flips = [axis for axis in (2, 3) if rng.random() < 0.5]
    turn = bool(rng.random() < 0.5)

    def view(stored: Tensor) -> Tensor:  # the same symmetry for an image and for all that is cached of it
        part = stored[chosen].float()
        return (part.transpose(2, 3) if turn else part).flip(flips)

    image = view(transfer.images)
    gamma = torch.from_numpy(np.exp(rng.normal(0, 0.15, (len(image), 1, 1, 1)))).float()
    output = student.outputs(image**gamma)
    masks = view(transfer.masks)
    if transfer.logits is None or transfer.tokens is None or transfer.features is None:
        return settings.supervised_weight * segmentation_loss(output.logits, masks, exclusive)
    logits = view(transfer.logits)
    targets = _targets(logits, masks, transfer.synthetic[chosen], plan)
    loss = settings.logit_weight * (
        softened_logit_loss(output.logits, logits, settings.temperature, exclusive)
        + soft_dice_loss(probabilities(output.logits, exclusive), targets)
    )
    if settings.feature_weight and aligned is not None:
        deep, late = aligned.deep(output.deep), aligned.late(output.late)
        tokens = F.interpolate(view(transfer.tokens), deep.shape[-2:], mode="bilinear", align_corners=False)
        both = feature_loss(deep, tokens) + feature_loss(late, view(transfer.features))
        loss = loss + settings.feature_weight * both
    return loss


def _targets(logits: Tensor, masks: Tensor, synthetic: Tensor, plan: RunPlan) -> Tensor:
    """The teacher's probabilities, or on synthetic images the conditioning mask, or their mean."""
    soft = probabilities(logits, plan.data.exclusive)
    kind = plan.student.synthetic_labels
    if kind == SyntheticLabels.soft:
        return soft
    hard = masks if kind == SyntheticLabels.mask else (masks + soft) / 2
    return torch.where(synthetic.view(-1, 1, 1, 1), hard, soft)
