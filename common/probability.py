"""From logits to probabilities and masks, for classes that exclude each other and for those that do not.

The class dimension is the third from the end everywhere: (C, H, W) and (B, C, H, W) are both welcome. The
background has no logit of its own: where classes exclude each other it is a further class with logit 0, so
that a model has the same outputs in both cases, and with one class the two are the same function.
"""

from __future__ import annotations

import torch
from torch import Tensor

CLASS_DIM = -3
FAINTEST = 1e-4  # probabilities nearer to 0 or 1 are drawn back here before a logarithm is taken


def excludes(values: Tensor, exclusive: bool) -> bool:
    """Whether softmax applies: with one class it is the sigmoid, which is then taken as it stands."""
    return exclusive and values.shape[CLASS_DIM] > 1


def probabilities(logits: Tensor, exclusive: bool) -> Tensor:
    """Of each class: one sigmoid a class, or the softmax over a background of logit 0 and the classes.

    Guarantee: with one class ``exclusive`` changes no bit. Same shape as ``logits``.
    """
    if not excludes(logits, exclusive):
        return logits.sigmoid()
    return beside_background(logits).softmax(CLASS_DIM).narrow(CLASS_DIM, 1, logits.shape[CLASS_DIM])


def beside_background(logits: Tensor) -> Tensor:
    """(.., 1 + C, H, W): the background's logit, which is 0, before those of the classes."""
    return torch.cat([torch.zeros_like(logits.narrow(CLASS_DIM, 0, 1)), logits], CLASS_DIM)


def background(probability: Tensor) -> Tensor:
    """(.., 1, H, W): what classes that exclude each other leave over; at least 0."""
    return (1 - probability.sum(CLASS_DIM, keepdim=True)).clamp(min=0)


def logits_of(probability: Tensor, exclusive: bool) -> Tensor:
    """The inverse of `probabilities`, for probabilities between `FAINTEST` and 1 - `FAINTEST`."""
    bounded = probability.clamp(FAINTEST, 1 - FAINTEST)
    if not excludes(probability, exclusive):
        return bounded.logit()
    return bounded.log() - background(probability).clamp(min=FAINTEST).log()


def masks_of(probability: Tensor, exclusive: bool, threshold: float = 0.5) -> Tensor:
    """Bool masks. Independent classes: a probability of at least ``threshold``.

    Classes that exclude each other: the most probable one, where it outweighs the background at the odds
    ``threshold : 1 - threshold``. At 0.5 that is the largest of background and classes, and with one class
    it is the rule for independent ones. Guarantee: such masks never overlap.
    """
    if not excludes(probability, exclusive):
        return probability >= threshold
    best, index = probability.max(CLASS_DIM, keepdim=True)
    wins = best * (1 - threshold) >= background(probability) * threshold
    return torch.zeros_like(probability, dtype=torch.bool).scatter(CLASS_DIM, index, wins)
