"""Two colours on a mask: the arithmetic that every painter with a palette shares."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from client.painters.base import FloatImage

EDGE_BLUR = 0.8  # pixels: how soft a border is in an image, for the mask is hard
FG_MEAN, FG_STD, BG_MEAN, BG_STD = slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 12)


def membership(mask: FloatImage) -> FloatImage:
    """(S, S) in [0, 1]: how far each pixel belongs to the foreground of ``mask`` (C, S, S)."""
    soft: FloatImage = gaussian_filter(mask.max(0).astype(np.float32), EDGE_BLUR)
    return soft


def blend(foreground: NDArray[np.float64], background: NDArray[np.float64], soft: FloatImage) -> FloatImage:
    """(3, S, S): ``foreground`` where ``soft`` is 1, ``background`` where it is 0; both (3,)."""
    mixed = soft * foreground[:, None, None] + (1 - soft) * background[:, None, None]
    return mixed.astype(np.float32)


def is_grey(style: NDArray[np.float64]) -> bool:
    """Whether the style's colours have three equal channels."""
    return bool(style[FG_MEAN].std() + style[BG_MEAN].std() < 1e-3)


def greyed(image: FloatImage, style: NDArray[np.float64]) -> FloatImage:
    """``image``, with three equal channels where ``style`` is grey."""
    return np.broadcast_to(image.mean(0), image.shape).copy() if is_grey(style) else image


def luminance_ranks(image: FloatImage, valid: NDArray[np.bool_], rng: np.random.Generator) -> FloatImage:
    """(S, S): the share of ``valid`` pixels that are darker, 0 outside; equal ones are ordered by chance."""
    values = image.mean(0)[valid]
    order = np.lexsort((rng.random(len(values)), values))
    ranks = np.zeros(valid.shape, np.float32)
    mine = np.empty(len(values), np.float32)
    mine[order] = (np.arange(len(values)) + 0.5) / max(len(values), 1)
    ranks[valid] = mine
    return ranks
