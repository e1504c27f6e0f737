"""Losses of adaptation and distillation; every function returns a scalar."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from common.probability import background, beside_background, excludes, probabilities


def soft_dice_loss(probability: Tensor, target: Tensor) -> Tensor:
    """1 - Dice over the batch, a class (Milletari et al. 2016); both (B, C, S, S) in [0, 1].

    Over the batch, not an image: a crop without foreground would otherwise dominate.
    """
    both = (probability * target).sum((0, 2, 3))
    total = probability.sum((0, 2, 3)) + target.sum((0, 2, 3))
    return (1 - (2 * both + 1) / (total + 1)).mean()


def segmentation_loss(logits: Tensor, target: Tensor, exclusive: bool) -> Tensor:
    """Cross-entropy plus Dice against labels or probabilities; both (B, C, S, S).

    ``exclusive``: classes exclude each other, as in `common.probability`; the targets of a pixel then sum
    to at most 1. The cross-entropy is a mean over pixels; for independent classes, over pixels and classes.
    """
    if excludes(logits, exclusive):
        shares = torch.cat([background(target), target], 1)
        cross = F.cross_entropy(beside_background(logits), shares)
    else:
        cross = F.binary_cross_entropy_with_logits(logits, target)
    return cross + soft_dice_loss(probabilities(logits, exclusive), target)


def image_losses(logits: Tensor, target: Tensor, exclusive: bool) -> Tensor:
    """(B,): what `segmentation_loss` is of each image alone; both (B, C, S, S).

    For gradients taken image by image, where the Dice of a whole batch has no meaning.
    """
    if excludes(logits, exclusive):
        shares = torch.cat([background(target), target], 1)
        cross = F.cross_entropy(beside_background(logits), shares, reduction="none").mean((1, 2))
    else:
        cross = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((1, 2, 3))
    probability = probabilities(logits, exclusive)
    both = (probability * target).sum((2, 3))
    total = probability.sum((2, 3)) + target.sum((2, 3))
    return cross + (1 - (2 * both + 1) / (total + 1)).mean(1)


def softened_logit_loss(student: Tensor, teacher: Tensor, temperature: float, exclusive: bool) -> Tensor:
    """T^2 KL(teacher || student) of the softened outputs (Hinton et al. 2015).

    Both are logits (B, C, S, S); ``exclusive`` and the mean as in `segmentation_loss`. Zero when equal.
    """
    if excludes(teacher, exclusive):
        given, wanted = (
            F.log_softmax(beside_background(logits) / temperature, 1) for logits in (student, teacher)
        )
        return temperature**2 * F.kl_div(given, wanted, reduction="none", log_target=True).sum(1).mean()
    target = (teacher / temperature).sigmoid()
    cross = F.binary_cross_entropy_with_logits(student / temperature, target)
    own = F.binary_cross_entropy_with_logits(teacher / temperature, target)
    return temperature**2 * (cross - own)


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine over positions; both (B, D, h, w), the student's already projected to D channels."""
    return (1 - F.cosine_similarity(student, teacher, dim=1)).mean()
