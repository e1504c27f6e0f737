"""Distil the teacher into a student, on real crops and synthetic images, from outputs cached once.

After the task-specific distillation of Vemulapalli et al. 2024 and its use with a LoRA-tuned SAM (arXiv
2503.06976): labels, softened outputs, and encoder and decoder features. `VARIANTS` names every way in which
this project trains a student, so that each ingredient can be credited on its own; all take the same steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from client.deadline import Deadline
from client.fitting import Schedule, fit
from client.generation import SyntheticSet
from client.losses import feature_loss, segmentation_loss, soft_dice_loss, softened_logit_loss
from client.patients import Patient
from client.sampling import PatchSampler
from client.students import UNetXS
from common.plan import RunPlan
from common.probability import logits_of, probabilities
from common.recipe import SyntheticLabels
from common.teacher import Teacher

MOST_CROPS = 192

teacher_calls = 0  # images that passed through a teacher here: tests assert none during a student's training


@dataclass(frozen=True)
class Variant:
    """How one model of the benefit matrix is trained.

    Attributes:
        pretrained: start from the shipped weights rather than at random.
        teacher: whose outputs it learns from: "federated", "local" (this site's alone) or None.
        styles: whose appearance the synthetic images have: "all" sites, "own", or None for no such image.
    """

    pretrained: bool = True
    teacher: str | None = None
    styles: str | None = None


VARIANTS: dict[str, Variant] = {
    "student": Variant(teacher="federated", styles="all"),
    "local_only": Variant(),
    "local_only_scratch": Variant(pretrained=False),
    "no_synthetic": Variant(teacher="federated"),
    "no_distillation": Variant(styles="all"),
    "no_federation": Variant(teacher="local", styles="own"),
}


@dataclass(frozen=True)
class TransferSet:
    """Images to learn from beside the labelled ones, with everything the teacher said of them.

    ``images`` (N, 3, S, S); ``logits`` (N, C, S, S) float16 or None where no teacher is used; ``tokens``
    (N, T, h, w) and ``features`` (N, 32, S/2, S/2) float16; ``masks`` (N, C, S, S), NaN where there is
    none; ``synthetic`` (N,) bool.
    """

    images: Tensor
    masks: Tensor
    synthetic: Tensor
    logits: Tensor | None = None
    tokens: Tensor | None = None
    features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def select(self, keep: Tensor) -> TransferSet:
        """The rows that ``keep`` (bool or indices) names."""
        rest = [None if part is None else part[keep] for part in (self.logits, self.tokens, self.features)]
        return TransferSet(self.images[keep], self.masks[keep], self.synthetic[keep], *rest)


def join(parts: Sequence[TransferSet | None]) -> TransferSet | None:
    """One set of ``parts`` in their order, all labelled by a teacher; None where there is none."""
    found = [part for part in parts if part is not None]
    if not found:
        return None
    columns = zip(*(vars(part).values() for part in found), strict=True)
    return TransferSet(*(torch.cat(column) for column in columns))


@torch.inference_mode()
def teacher_logits(teacher: Teacher, images: Tensor, exclusive: bool, views: int = 2) -> Tensor:
    """Logits (N, C, S, S) of the mean probability over ``views`` (1, 2 or 4) mirrored views.

    ``exclusive``: what logits mean, see `common.probability`.
    """
    global teacher_calls
    flips = [(), (3,), (2,), (2, 3)][:views]
    parts = []
    for part in images.split(16):
        seen = [probabilities(teacher(part.flip(flip)).logits, exclusive).flip(flip) for flip in flips]
        parts.append(logits_of(torch.stack(seen).mean(0), exclusive))
        teacher_calls += len(part) * len(flips)
    return torch.cat(parts)


@torch.inference_mode()
def label_with_teacher(teacher: Teacher, unlabelled: TransferSet, exclusive: bool) -> TransferSet:
    """``unlabelled`` with what the student is aligned with: the teacher runs over the set once."""
    global teacher_calls
    tokens, features = [], []
    for part in unlabelled.images.split(16):
        output = teacher(part)
        tokens.append(output.tokens.half())
        features.append(output.feature.half())
        teacher_calls += len(part)
    logits = teacher_logits(teacher, unlabelled.images, exclusive).half()
    return replace(unlabelled, logits=logits, tokens=torch.cat(tokens), features=torch.cat(features))


def real_crops(patients: Sequence[Patient], plan: RunPlan, seed: int) -> tuple[Tensor, Tensor]:
    """A fixed set of the site's training crops, labelled or not: images, masks (NaN: unlabelled)."""
    size = plan.data.image_size
    areas = [sample.valid.numel() / size**2 for patient in patients for sample in patient.samples]
    # An image no larger than a crop is taken once; a larger one so often that it is covered twice over.
    wanted = sum(1 if area <= 1 else round(2 * area) for area in areas)
    crops = PatchSampler(patients, size, seed, labelled=None).crops(min(wanted, MOST_CROPS))
    blank = torch.full((len(plan.data.classes), size, size), float("nan"))
    masks = [blank if crop.mask is None else crop.mask.float() for crop in crops]
    return torch.stack([crop.image for crop in crops]), torch.stack(masks)


def assemble_transfer_set(
    real: tuple[Tensor, Tensor] | None,
    synthetic: SyntheticSet | None,
    teacher: Teacher | None,
    exclusive: bool,
) -> TransferSet | None:
    """Join real crops and synthetic images and label both; without a teacher only masked ones are usable."""
    images, masks, flags = [], [], []
    if real is not None and teacher is not None:
        images.append(real[0])
        masks.append(real[1])
        flags.append(torch.zeros(len(real[0]), dtype=torch.bool))
    if synthetic is not None and len(synthetic):
        images.append(synthetic.images)
        masks.append(synthetic.masks)
        flags.append(torch.ones(len(synthetic), dtype=torch.bool))
    if not images:
        return None
    joined = TransferSet(torch.cat(images), torch.cat(masks), torch.cat(flags))
    return joined if teacher is None else label_with_teacher(teacher, joined, exclusive)


class _Alignment(nn.Module):
    """1 x 1 projections of the student's features to the teacher's width; thrown away after training."""

    def __init__(self, student: UNetXS, tokens: Tensor, features: Tensor) -> None:
        super().__init__()
        self.deep = nn.Conv2d(student.deep_channels, tokens.shape[1], 1)
        self.late = nn.Conv2d(student.late_channels, features.shape[1], 1)


def _alignment(student: UNetXS, transfer: TransferSet | None) -> _Alignment | None:
    """For the channels that the teacher of ``transfer`` has; None where no teacher said anything."""
    if transfer is None or transfer.tokens is None or transfer.features is None:
        return None
    return _Alignment(student, transfer.tokens, transfer.features)


def distil(
    student: UNetXS,
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
    student: UNetXS,
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
