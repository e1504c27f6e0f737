"""Histogram matching: each pixel of a crop gets the colour of equal luminance rank in a shared style.

What is shared is a mixture of two colours, so the wanted histogram is that mixture's: foreground and
background in the style's proportion, each with its deviation. No mask is looked at: which end of the ranks is
the foreground in a crop is not known, so the polarity is drawn.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter1d

from client.painters.base import Crop, FloatImage, Material, SyntheticSet, from_crops
from client.painters.colours import BG_MEAN, BG_STD, FG_MEAN, FG_STD, greyed, luminance_ranks

DRAWS = 2048  # colours drawn from a mixture to make its map
SMOOTH = 65  # neighbouring draws averaged: a map and no noise
LEAST_SHARE = 0.02  # of either colour in a map
COVERAGE = 12  # of a style vector: the logarithm of the foreground's share


def histogram(material: Material) -> SyntheticSet:
    """Every crop with the histogram of one drawn style; the masks are the crops' own."""

    def change(index: int, crop: Crop) -> FloatImage:
        rng, style = material.rng("histogram", index), material.styles[index]
        return greyed(mapped(crop, colour_map(style, rng), rng), style)

    return from_crops(material, change)


def colour_map(style: NDArray[np.float64], rng: np.random.Generator) -> FloatImage:
    """(DRAWS, 3): the colours of ``style``'s mixture from dark to bright."""
    share = float(np.clip(np.exp(style[COVERAGE]), LEAST_SHARE, 1 - LEAST_SHARE))
    front = rng.random(DRAWS) < share
    wide = rng.standard_normal((DRAWS, 1))  # one draw for the channels: they rise together
    colours = np.where(
        front[:, None], style[FG_MEAN] + wide * style[FG_STD], style[BG_MEAN] + wide * style[BG_STD]
    )
    ordered = colours[np.argsort(colours.mean(1), kind="stable")]
    return uniform_filter1d(ordered, SMOOTH, axis=0, mode="nearest").clip(0, 1).astype(np.float32)


def mapped(crop: Crop, colours: FloatImage, rng: np.random.Generator) -> FloatImage:
    """The image of ``crop`` with ``colours`` (N, 3) by luminance rank, or by the reverse of it."""
    ranks = luminance_ranks(crop.image, crop.valid, rng)
    if rng.random() < 0.5:
        ranks = 1 - ranks
    places = np.minimum((ranks * len(colours)).astype(np.int64), len(colours) - 1)
    return np.moveaxis(colours[places], -1, 0)
