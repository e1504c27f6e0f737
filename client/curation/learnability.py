"""Of the synthetic images, those from which a student has most to learn.

The idea is the learnability score of DSFedMed (arXiv 2601.16073): an image on which the teacher is right and
the student is not yet like the teacher teaches more than one that both know, or that confuses both. Theirs
weighs a loss against a divergence; here each is first put on the scale of its own spread over the set,
because the two have no common unit. Only synthetic images are scored: no patient's image is looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from client.curation.consistency import Curated
from client.losses import image_losses, softened_logit_loss
from client.students import Student
from client.transfer.sets import TransferSet

RIGHT = 0.5  # weight of the teacher being right; the rest is that of the student's being apart from it
AT_ONCE = 32


def keep_learnable(curated: Curated, student: Student, share: float, exclusive: bool) -> Curated:
    """Keep the ``share`` of the synthetic images with the highest score; real ones stay.

    Args:
        student: as it is before it learns; only asked.
        share: above 0, at most 1, which keeps all; of one or more images at least one is kept.

    Without a teacher nothing can be scored and everything is kept. Of equal scores the earlier image stays.
    """
    transfer = curated.transfer
    places = torch.nonzero(transfer.synthetic).flatten()
    if share >= 1 or transfer.logits is None or not len(places):
        return curated
    scores = learnability(transfer.select(places), student, exclusive)
    kept = scores.argsort(descending=True, stable=True)[: max(1, round(share * len(places)))]
    keep = ~transfer.synthetic
    keep[places[kept]] = True
    return curated.only(keep)


@torch.inference_mode()
def learnability(images: TransferSet, student: Student, exclusive: bool) -> Tensor:
    """(N,): how much the student, as it is, can learn of each; ``images`` are labelled by a teacher."""
    assert images.logits is not None, "nobody labelled them"
    teacher = images.logits.float()
    loss = image_losses(teacher, images.masks, exclusive)
    mode = student.training
    student.eval()
    own = torch.cat([student(part) for part in images.images.split(AT_ONCE)])
    student.train(mode)
    pairs = zip(own.split(1), teacher.split(1), strict=True)
    apart = torch.stack([softened_logit_loss(said, told, 1.0, exclusive) for said, told in pairs])
    return RIGHT * _scaled(-loss) + (1 - RIGHT) * _scaled(apart)


def _scaled(values: Tensor) -> Tensor:
    return (values - values.mean()) / values.std(correction=0).clamp_min(1e-6)
