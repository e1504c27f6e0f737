"""Which synthetic images are worth learning from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from client.transfer.sets import TransferSet
from common.probability import masks_of, probabilities


@dataclass(frozen=True)
class Curated:
    """The transfer set without the images that were dropped, and the counts."""

    transfer: TransferSet
    generated: int
    dropped_inconsistent: int

    @property
    def kept(self) -> int:
        return self.generated - self.dropped_inconsistent


def agreement(found: Tensor, mask: Tensor) -> Tensor:
    """Dice of the masks that were found with those painted, an image; both (N, C, S, S) -> (N,)."""
    found = found.float()
    both = (found * mask).sum((1, 2, 3))
    return (2 * both + 1) / (found.sum((1, 2, 3)) + mask.sum((1, 2, 3)) + 1)


def drop_inconsistent(transfer: TransferSet, keep_dice: float, exclusive: bool) -> Curated:
    """Drop the synthetic images on which the teacher does not find what they were painted from.

    Of images that are no patient's, on masks that are none's either, the filter looks at nobody. For those
    made of the site's own crops ``keep_dice`` is 0: all are kept, because how many are is told elsewhere.
    Without a teacher nothing can be judged and everything is kept. ``exclusive`` as in `common.probability`.
    """
    generated = int(transfer.synthetic.sum())
    if transfer.logits is None:
        return Curated(transfer, generated, 0)
    found = masks_of(probabilities(transfer.logits.float(), exclusive), exclusive)
    agrees = agreement(found, transfer.masks.nan_to_num()) >= keep_dice
    keep = agrees | ~transfer.synthetic
    return Curated(transfer.select(keep), generated, generated - int((keep & transfer.synthetic).sum()))


def synthetic_part(transfer: TransferSet) -> TransferSet:
    """The synthetic images alone."""
    return transfer.select(torch.nonzero(transfer.synthetic).flatten())
