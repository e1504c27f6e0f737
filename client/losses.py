"""Losses of adaptation and distillation; every function returns a scalar."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def soft_dice_loss(probability: Tensor, target: Tensor) -> Tensor:
    """1 - Dice over the batch, a class (Milletari et al. 2016); both (B, C, S, S) in [0, 1].

    Over the batch, not an image: a crop without foreground would otherwise dominate.
    """
    both = (probability * target).sum((0, 2, 3))
    total = probability.sum((0, 2, 3)) + target.sum((0, 2, 3))
    return (1 - (2 * both + 1) / (total + 1)).mean()


def segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy plus Dice against labels or probabilities; both (B, C, S, S), classes independent."""
    return F.binary_cross_entropy_with_logits(logits, target) + soft_dice_loss(logits.sigmoid(), target)


def softened_logit_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of the softened outputs (Hinton et al. 2015), for independent classes.

    Both arguments are logits (B, C, S, S). Zero when they are equal.
    """
    target = (teacher / temperature).sigmoid()
    cross = F.binary_cross_entropy_with_logits(student / temperature, target)
    own = F.binary_cross_entropy_with_logits(teacher / temperature, target)
    return temperature**2 * (cross - own)


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine over positions; both (B, D, h, w), the student's already projected to D channels."""
    return (1 - F.cosine_similarity(student, teacher, dim=1)).mean()
