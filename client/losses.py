"""Losses of adaptation and distillation; every function returns a scalar."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import ndimage
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


def softened_logit_loss(
    student: Tensor, teacher: Tensor, temperature: float, exclusive: bool, weight: Tensor | None = None
) -> Tensor:
    """T^2 KL(teacher || student) of the softened outputs (Hinton et al. 2015).

    Both are logits (B, C, S, S); ``exclusive`` and the mean as in `segmentation_loss`. Zero when equal.
    ``weight`` of the pixels as in `certainty_weights`; None: all count alike.
    """
    if excludes(teacher, exclusive):
        given, wanted = (
            F.log_softmax(beside_background(logits) / temperature, 1) for logits in (student, teacher)
        )
        each = F.kl_div(given, wanted, reduction="none", log_target=True).sum(1)
        return temperature**2 * (each if weight is None else weight[:, 0] * each).mean()
    target = (teacher / temperature).sigmoid()
    cross = F.binary_cross_entropy_with_logits(student / temperature, target, weight)
    own = F.binary_cross_entropy_with_logits(teacher / temperature, target, weight)
    return temperature**2 * (cross - own)


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine over positions; both (B, D, h, w), the student's already projected to D channels.

    Written out, as `F.cosine_similarity` along the second dimension takes three times as long.
    """
    both, *squares = (
        torch.linalg.vecdot(one, other, dim=1)
        for one, other in ((student, teacher), (student, student), (teacher, teacher))
    )
    lengths = (squares[0] * squares[1]).clamp(min=1e-16).sqrt()
    return (1 - both / lengths).mean()


def certainty_weights(probability: Tensor, exclusive: bool, strength: float) -> Tensor:
    """Weights of the pixels for `softened_logit_loss`: 1 - ``strength`` x entropy, scaled to mean 1.

    The teacher's entropy says how much its word counts (Kwon et al. 2020, there of several teachers; here of
    several pixels). In shares of the largest possible one: of each class alone, (B, C, S, S), or of
    background and classes together, (B, 1, S, S), where they exclude each other. ``strength`` 0 to 1.
    """
    if excludes(probability, exclusive):
        shares = torch.cat([background(probability), probability], 1)
        entropy = torch.special.entr(shares).sum(1, keepdim=True) / math.log(shares.shape[1])
    else:
        entropy = (torch.special.entr(probability) + torch.special.entr(1 - probability)) / math.log(2)
    weight = (1 - strength * entropy).clamp(min=0)
    return weight / weight.mean().clamp(min=1e-6)


def signed_distances(masks: Tensor) -> Tensor:
    """Distance of each pixel to the masks' boundary, in sides of the image: float32 (N, C, S, S).

    Positive outside, 0 or negative inside, as in Kervadec et al. 2019 and their code: an outer pixel's
    distance to the nearest inner one, an inner pixel's to the nearest outer one less a pixel. 0 everywhere
    where a class is absent or fills the image: there is no boundary to be near to.
    """
    planes = masks.flatten(0, 1).numpy().astype(bool)
    found = np.zeros(planes.shape, np.float32)
    for plane, into in zip(planes, found, strict=True):
        if plane.any() and not plane.all():
            inside = ndimage.distance_transform_edt(plane) - 1
            into[:] = np.where(plane, -inside, ndimage.distance_transform_edt(~plane))
    return torch.from_numpy(found / masks.shape[-1]).view(masks.shape)


def boundary_loss(probability: Tensor, distances: Tensor) -> Tensor:
    """Mean of probability x signed distance (Kervadec et al. 2019, equation 5); both (B, C, S, S).

    Linear in ``probability``: what lies far from the boundary on the wrong side costs most. May be negative.
    """
    return (probability * distances).mean()
