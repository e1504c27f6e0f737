"""Synthetic images that show something else than what they were painted from are dropped."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from client.transfer.sets import TransferSet
from common.probability import masks_of, probabilities


@dataclass(frozen=True)
class Curated:
    """The transfer set without the images that were dropped, and the counts.

    Attributes:
        passed_over: images that are in order and of which others are more worth learning from.
    """

    transfer: TransferSet
    generated: int
    dropped_inconsistent: int
    passed_over: int = 0

    @property
    def kept(self) -> int:
        return self.generated - self.dropped_inconsistent - self.passed_over

    def only(self, keep: Tensor) -> Curated:
        """With the rows that ``keep`` (bool) names; the synthetic ones among the others are passed over."""
        more = int((~keep & self.transfer.synthetic).sum())
        return replace(self, transfer=self.transfer.select(keep), passed_over=self.passed_over + more)


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
