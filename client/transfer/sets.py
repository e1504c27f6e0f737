"""The transfer set: images to learn from beside the labelled ones, real crops and synthetic images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from client.patients import Patient
from client.sampling import PatchSampler
from common.plan import RunPlan

MOST_CROPS = 192


@dataclass(frozen=True)
class TransferSet:
    """Images to learn from beside the labelled ones, with everything the teacher said of them.

    ``images`` (N, 3, S, S); ``logits`` (N, C, S, S) float16 or None where no teacher's outputs are learned;
    ``tokens`` (N, T, h, w) and ``features`` (N, 32, S/2, S/2) float16 or bfloat16, or None where no features
    are; ``masks`` (N, C, S, S), NaN where there is none; ``synthetic`` (N,) bool; ``views`` (N,) seeds of
    `client.transfer.views`, or None where every image is as it is.
    """

    images: Tensor
    masks: Tensor
    synthetic: Tensor
    logits: Tensor | None = None
    tokens: Tensor | None = None
    features: Tensor | None = None
    views: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def select(self, keep: Tensor) -> TransferSet:
        """The rows that ``keep`` (bool or indices) names."""
        return TransferSet(*(None if part is None else part[keep] for part in vars(self).values()))


def join(parts: Sequence[TransferSet | None]) -> TransferSet | None:
    """One set of ``parts`` in their order, of which a teacher said the same kinds of things; None of none."""
    found = [part for part in parts if part is not None]
    if not found:
        return None
    columns = zip(*(vars(part).values() for part in found), strict=True)
    return TransferSet(*(None if column[0] is None else torch.cat(column) for column in columns))


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
