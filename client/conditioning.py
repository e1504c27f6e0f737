"""Conditioning masks: of the shape prior's, those that fit the shape numbers of the styles."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.shapes import PRIORS
from client.style import style_vector
from common.recipe import ClassConfig, DataConfig

BANK = 6  # procedural masks drawn for each one used, so that the nearest in shape can be chosen
MOST_DRAWN = 600
SHAPE = slice(12, 14)  # of a style vector: log coverage, log area over perimeter


def conditioning_masks(styles: NDArray[np.float64], data: DataConfig, rng: np.random.Generator) -> Tensor:
    """(N, C, S, S) in {0, 1}: a procedural mask for each style, the classes in turn."""
    count, size, classes = len(styles), data.image_size, data.classes
    planes = torch.zeros(count, len(classes), size, size)
    for index, item in enumerate(classes):
        mine = np.arange(index, count, len(classes))
        painted = torch.from_numpy(masks_for(styles[mine], item, size, rng)).float()
        # What is a part of another class (its label values are among the other's) is that class as well.
        holders = [place for place, other in enumerate(classes) if set(item.values) <= set(other.values)]
        planes[mine[:, None], holders] = painted[:, None]
    return planes


def masks_for(
    styles: NDArray[np.float64], item: ClassConfig, size: int, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """For each style vector the procedural mask, of several drawn, nearest in its two shape numbers."""
    bank = [PRIORS[item.like](rng, size) for _ in range(min(BANK * len(styles), MOST_DRAWN))]
    valid = torch.ones(size, size, dtype=torch.bool)
    blank = torch.zeros(3, size, size)
    shapes = [style_vector(blank, torch.from_numpy(mask), valid) for mask in bank]
    usable = [(mask, shape[SHAPE]) for mask, shape in zip(bank, shapes, strict=True) if shape is not None]
    table = np.array([shape for _, shape in usable])
    chosen = []
    free = np.ones(len(usable), bool)
    for style in styles:
        distance = np.square(table - style[SHAPE]).sum(1) + np.where(free, 0.0, 1.0)
        best = int(distance.argmin())
        free[best] = False
        chosen.append(usable[best][0])
    return np.array(chosen)
