"""What teachers say of the images of a transfer set; asked once, and kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from client.painters import SyntheticSet
from client.transfer.sets import TransferSet, join
from common.probability import logits_of, probabilities
from common.teacher import Teacher

MIRRORED = 2  # views of an image whose mean probability is the teacher's word
teacher_calls = 0  # images that passed through a teacher here: tests assert none during a student's training


@dataclass(frozen=True)
class Outputs:
    """``logits`` (N, C, S, S), ``tokens`` (N, T, h, w) and ``features`` (N, 32, S/2, S/2) of N images."""

    logits: Tensor
    tokens: Tensor
    features: Tensor


@torch.inference_mode()
def teacher_logits(teacher: Teacher, images: Tensor, exclusive: bool, views: int = MIRRORED) -> Tensor:
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
def teacher_outputs(teacher: Teacher, images: Tensor, exclusive: bool) -> Outputs:
    """What ``teacher`` says of ``images`` (N, 3, S, S); each passes through it `MIRRORED` times."""
    global teacher_calls
    logits, tokens, features = [], [], []
    for part in images.split(16):
        output = teacher(part)
        teacher_calls += len(part)
        tokens.append(output.tokens.half())
        features.append(output.feature.half())
        mirrored = teacher(part.flip(3))
        teacher_calls += len(part)
        seen = [
            probabilities(output.logits, exclusive),
            probabilities(mirrored.logits, exclusive).flip(3),
        ]
        logits.append(logits_of(torch.stack(seen).mean(0), exclusive).half())
    return Outputs(torch.cat(logits), torch.cat(tokens), torch.cat(features))


def label_with_ensemble(
    teachers: Sequence[AbstractContextManager[Teacher]], unlabelled: TransferSet, exclusive: bool
) -> TransferSet:
    """``unlabelled`` with the mean of what ``teachers`` say, as in FedDF (Lin et al. 2020): outputs alone.

    Their probabilities are averaged, not their logits: a teacher that is sure should not outvote the rest.
    They are entered one after the other, for adapters that share one network (`SiteTeachers.visit`).
    """
    seen = []
    for visit in teachers:
        with visit as network:
            seen.append(teacher_logits(network, unlabelled.images, exclusive))
    return replace(unlabelled, logits=mean_logits(seen, exclusive))


def mean_logits(seen: Sequence[Tensor], exclusive: bool) -> Tensor:
    """The logits, float16, of the mean probability of several teachers' logits (N, C, S, S)."""
    total = torch.stack([probabilities(logits.float(), exclusive) for logits in seen])
    return logits_of(total.mean(0), exclusive).half()


def gather(
    real: tuple[Tensor, Tensor] | None, synthetic: SyntheticSet | None, masked: bool = False
) -> TransferSet | None:
    """Real crops and then synthetic images, without labels of a teacher; None where there is no image.

    ``masked``: only the images that have a mask to be learned from without a teacher, the synthetic ones.
    """
    parts = []
    if real is not None and not masked:
        parts.append(TransferSet(*real, torch.zeros(len(real[0]), dtype=torch.bool)))
    if synthetic is not None and len(synthetic):
        painted = torch.ones(len(synthetic), dtype=torch.bool)
        parts.append(TransferSet(synthetic.images, synthetic.masks, painted))
    return join(parts)
