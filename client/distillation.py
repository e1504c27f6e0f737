"""Distil the teacher into a student, on real crops and synthetic images, from outputs cached once.

After the task-specific distillation of Vemulapalli et al. 2024 and its use with a LoRA-tuned SAM (arXiv
2503.06976): labels, softened outputs, and encoder and decoder features. Beside these a boundary term, and
weights for pixels. A term whose weight is 0 is not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from client.deadline import Deadline
from client.fitting import Schedule, fit
from client.losses import (
    boundary_loss,
    certainty_weights,
    feature_loss,
    segmentation_loss,
    signed_distances,
    soft_dice_loss,
    softened_logit_loss,
)
from client.patients import Patient
from client.sampling import PatchSampler
from client.students import Student, StudentOutput
from client.transfer.sets import TransferSet
from common.plan import RunPlan
from common.probability import probabilities
from common.recipe import StudentConfig, SyntheticLabels


@dataclass(frozen=True)
class Symmetry:
    """One of the square's symmetries, the same for an image and for all that is kept of it.

    ``turn`` exchanges rows and columns, then each of ``flips`` (2: rows, 3: columns) turns round.
    """

    flips: tuple[int, ...] = ()
    turn: bool = False

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Symmetry:
        flips = tuple(axis for axis in (2, 3) if rng.random() < 0.5)
        return cls(flips, bool(rng.random() < 0.5))

    def __call__(self, stored: Tensor) -> Tensor:
        """``stored`` (N, C, S, S) as the student sees it; float32."""
        part = stored.float()
        return (part.transpose(2, 3) if self.turn else part).flip(self.flips)

    def every(self, stride: int, row: int, column: int, side: int) -> tuple[slice, slice]:
        """Rows and columns of a stored map of ``side`` that the student sees from (row, column) on.

        Guarantee: ``self(stored[..., rows, columns])`` is ``self(stored)[..., row::stride, column::stride]``,
        and only the named positions are read.
        """
        starts = [
            (side - 1 - start) % stride if axis in self.flips else start
            for axis, start in ((2, row), (3, column))
        ]
        first, second = reversed(starts) if self.turn else starts
        return slice(first, None, stride), slice(second, None, stride)


class _Alignment(nn.Module):
    """1 x 1 projections of the student's features to the teacher's width; thrown away after training."""

    def __init__(self, student: Student, tokens: Tensor, features: Tensor) -> None:
        super().__init__()
        self.deep = nn.Conv2d(student.deep_channels, tokens.shape[1], 1)
        self.late = nn.Conv2d(student.late_channels, features.shape[1], 1)


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
    ``transfer_batch_size`` of the transfer set. In the first ``warmup_share`` of the steps the transfer set
    stands alone, in the last ``finetune_share`` the labels do, as in the two stages of Vemulapalli et al.
    2024. Guarantee: no teacher is called here; its outputs come from ``transfer``.
    """
    settings = plan.student
    sampler = PatchSampler(patients, plan.data.image_size, seed, labelled=True)
    rng = np.random.default_rng(seed)
    lesson = None if transfer is None else _Lesson.prepare(student, transfer, plan, seed)
    stages = _Stages.of(settings, lesson is not None)
    numbers = count()

    def loss_at() -> Tensor:
        step, terms = next(numbers), []
        if stages.labels(step):
            batch = sampler.batch(settings.batch_size)
            loss = segmentation_loss(student(batch.images), batch.masks, plan.data.exclusive)
            terms.append(settings.supervised_weight * loss)
        if lesson is not None and stages.transfer(step):
            terms.append(lesson.loss(rng))
        return sum(terms[1:], terms[0])

    student.train()
    schedule = Schedule(settings.learning_rate, settings.steps, warm_up=10)
    parameters = [*student.parameters(), *([] if lesson is None else lesson.parameters())]
    losses = fit(parameters, schedule, loss_at, deadline, "distilling the student")
    student.eval()
    return losses


@dataclass(frozen=True)
class _Stages:
    """Steps before ``first`` do not learn from labels, steps from ``last`` on from nothing else."""

    first: int
    last: int

    @classmethod
    def of(cls, settings: StudentConfig, transfer: bool) -> _Stages:
        """Without a transfer set the labels stand alone in every step."""
        warm_up = round(settings.steps * settings.warmup_share) if transfer else 0
        return cls(warm_up, max(warm_up, settings.steps - round(settings.steps * settings.finetune_share)))

    def labels(self, step: int) -> bool:
        return step >= self.first

    def transfer(self, step: int) -> bool:
        return step < self.last


@dataclass(frozen=True)
class _Lesson:
    """What one student learns from a transfer set.

    Attributes:
        aligned: to the features of the teacher; None where they are not learned.
        distances: `signed_distances` of what the student should draw; None where there is no boundary term.
    """

    student: Student
    transfer: TransferSet
    plan: RunPlan
    aligned: _Alignment | None
    distances: Tensor | None

    @classmethod
    def prepare(cls, student: Student, transfer: TransferSet, plan: RunPlan, seed: int) -> _Lesson | None:
        """None where the settings leave nothing to learn from ``transfer``."""
        settings, aligned, distances = plan.student, None, None
        if settings.feature_weight and transfer.tokens is not None and transfer.features is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed % 2**63)
                aligned = _Alignment(student, transfer.tokens, transfer.features)
        if settings.boundary_weight and (transfer.logits is not None or transfer.tokens is None):
            distances = signed_distances(_targets(transfer, plan) >= 0.5)
        taught = settings.logit_weight if transfer.logits is not None else transfer.tokens is None
        if not taught and aligned is None and distances is None:
            return None
        return cls(student, transfer, plan, aligned, distances)

    def parameters(self) -> list[nn.Parameter]:
        return [] if self.aligned is None else list(self.aligned.parameters())

    def loss(self, rng: np.random.Generator) -> Tensor:
        """Of the next ``transfer_batch_size`` images, mirrored, turned and with another gamma."""
        settings, exclusive = self.plan.student, self.plan.data.exclusive
        chosen = _draw(self.transfer, settings.transfer_batch_size, settings.synthetic_share, rng)
        view = Symmetry.draw(rng)
        part = replace(self.transfer, features=None).select(chosen)
        image = view(part.images)
        gamma = torch.from_numpy(np.exp(rng.normal(0, 0.15, (len(image), 1, 1, 1)))).float()
        output = self.student.outputs(image**gamma)
        terms = []
        if part.logits is not None:
            if settings.logit_weight:
                terms.append(settings.logit_weight * self._output_loss(output.logits, part, view))
        elif part.tokens is None:  # no teacher: the masks that the images were painted from
            loss = segmentation_loss(output.logits, view(part.masks), exclusive)
            terms.append(settings.supervised_weight * loss)
        if self.aligned is not None:
            loss = self._deep_loss(output, part, view) + self._late_loss(output, chosen, view, rng)
            terms.append(settings.feature_weight * loss)
        if self.distances is not None:
            found = probabilities(output.logits, exclusive)
            terms.append(settings.boundary_weight * boundary_loss(found, view(self.distances[chosen])))
        return sum(terms[1:], terms[0])

    def _output_loss(self, logits: Tensor, part: TransferSet, view: Symmetry) -> Tensor:
        """Softened outputs pixel by pixel, and their overlap."""
        assert part.logits is not None
        settings, exclusive = self.plan.student, self.plan.data.exclusive
        teacher, weight = view(part.logits), None
        if settings.entropy_weight:
            weight = certainty_weights(probabilities(teacher, exclusive), exclusive, settings.entropy_weight)
        softened = softened_logit_loss(logits, teacher, settings.temperature, exclusive, weight)
        return softened + soft_dice_loss(probabilities(logits, exclusive), view(_targets(part, self.plan)))

    def _deep_loss(self, output: StudentOutput, part: TransferSet, view: Symmetry) -> Tensor:
        """The encoder's features."""
        assert self.aligned is not None
        assert part.tokens is not None
        deep, tokens = self.aligned.deep(output.deep), view(part.tokens)
        if tokens.shape[-2:] != deep.shape[-2:]:
            tokens = F.interpolate(tokens, deep.shape[-2:], mode="bilinear", align_corners=False)
        return feature_loss(deep, tokens)

    def _late_loss(
        self, output: StudentOutput, chosen: Tensor, view: Symmetry, rng: np.random.Generator
    ) -> Tensor:
        """The decoder's features, on every ``feature_stride``-th row and column of a moving grid."""
        assert self.aligned is not None
        assert self.transfer.features is not None
        features, stride = self.transfer.features, self.plan.student.feature_stride
        row, column = rng.integers(stride, size=2).tolist() if stride > 1 else (0, 0)
        rows, columns = view.every(stride, row, column, features.shape[-1])
        late = self.aligned.late(output.late[..., row::stride, column::stride])
        return feature_loss(late, view(features[chosen, :, rows, columns]))


def _draw(transfer: TransferSet, count: int, share: float, rng: np.random.Generator) -> Tensor:
    """``count`` indices, a ``share`` of them synthetic where both kinds exist."""
    synthetic = np.flatnonzero(transfer.synthetic.numpy())
    real = np.flatnonzero(~transfer.synthetic.numpy())
    if not len(synthetic) or not len(real):
        return torch.from_numpy(rng.integers(len(transfer), size=count))
    painted = round(count * share)
    parts = [rng.choice(synthetic, painted), rng.choice(real, count - painted)]
    return torch.from_numpy(np.concatenate(parts))


def _targets(part: TransferSet, plan: RunPlan) -> Tensor:
    """The teacher's probabilities, or the masks, or their mean, as the recipe says of each kind of image.

    Of synthetic images the conditioning mask, of labelled crops the label; an image without one, and every
    image without a teacher, has no choice.
    """
    if part.logits is None:
        return part.masks
    soft = probabilities(part.logits.float(), plan.data.exclusive)
    labelled = ~part.masks.isnan().flatten(1).any(1) & ~part.synthetic
    for rows, kind in (
        (part.synthetic, plan.student.synthetic_labels),
        (labelled, plan.student.real_labels),
    ):
        if kind != SyntheticLabels.soft:
            hard = part.masks if kind == SyntheticLabels.mask else (part.masks + soft) / 2
            soft = torch.where(rows.view(-1, 1, 1, 1), hard, soft)
    return soft
