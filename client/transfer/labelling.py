"""What the teacher says of the images of a transfer set; asked once, and kept."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from client.painters import SyntheticSet
from client.transfer.sets import TransferSet
from common.probability import logits_of, probabilities
from common.teacher import Teacher

teacher_calls = 0  # images that passed through a teacher here: tests assert none during a student's training


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
