"""Region recolouring: the site's own labelled crops in the colours of every site.

Mean and deviation of foreground and background are moved to a shared style's, each region for itself (the
transfer of Reinhard et al. 2001, by region). What slowly varies inside a region follows the contrast: where
the polarity turns round, a dim cell stays nearer to the background than a bright one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from client.painters.base import Crop, FloatImage, Material, SyntheticSet, from_crops
from client.painters.colours import BG_MEAN, BG_STD, FG_MEAN, FG_STD, blend, greyed, membership
from client.style import TEXTURE_SIGMA, colour_and_texture
from client.texture import impose_texture
from common.style import TEXTURE, TEXTURE_PARTS

GRAIN_GAINS = (0.25, 4.0)
CONTRAST_GAINS = (0.5, 1.5)
FAINT = 0.02  # a contrast or a deviation below this is not divided by
FEW = 8  # pixels: a smaller region has no style of its own


def recolour(material: Material) -> SyntheticSet:
    """Every crop in one drawn style; the masks are the crops' own."""

    def change(index: int, crop: Crop) -> FloatImage:
        return recoloured(crop, material.styles[index], material.rng("texture", index))

    return from_crops(material, change)


def recoloured(crop: Crop, style: NDArray[np.float64], rng: np.random.Generator) -> FloatImage:
    """The image of ``crop`` in ``style``, with its grain too if the style has bands."""
    image, body = crop.image, crop.mask.max(0) > 0
    regions = [body & crop.valid, ~body & crop.valid]
    wanted = [(style[FG_MEAN], style[FG_STD]), (style[BG_MEAN], style[BG_STD])]
    found = [colour_and_texture(image, region) if region.sum() >= FEW else None for region in regions]
    means = [want[0] if have is None else have[0] for have, want in zip(found, wanted, strict=True)]
    soft = membership(crop.mask)
    rest = np.where(crop.valid, image - blend(means[0], means[1], soft), 0)  # outside nothing is blurred in
    slow = np.stack([gaussian_filter(channel, TEXTURE_SIGMA / 2) for channel in rest])
    turned = _contrast_gain(means[0] - means[1], style[FG_MEAN] - style[BG_MEAN])
    textured = len(style) >= TEXTURE.stop
    gains = [
        np.ones(3)
        if have is None or textured
        else np.clip(want[1] / np.maximum(have[1], FAINT), *GRAIN_GAINS)
        for have, want in zip(found, wanted, strict=True)
    ]
    grained = blend(gains[0], gains[1], soft) * (rest - slow)
    made = blend(style[FG_MEAN], style[BG_MEAN], soft) + turned * slow + grained
    made += blend(*_shortfalls(made, regions, style), soft)
    if textured:
        for region, numbers in zip(regions, style[TEXTURE].reshape(2, len(TEXTURE_PARTS)), strict=True):
            if region.sum() >= FEW:
                made = impose_texture(made, region, numbers, rng)
    return greyed(made.clip(0, 1), style)


def _shortfalls(
    made: FloatImage, regions: Sequence[NDArray[np.bool_]], style: NDArray[np.float64]
) -> list[NDArray[np.float64]]:
    """What each region's mean colour still lacks: soft borders take a little of either side."""
    pairs = zip(regions, (style[FG_MEAN], style[BG_MEAN]), strict=True)
    return [want - made[:, region].mean(1) if region.sum() >= FEW else np.zeros(3) for region, want in pairs]


def _contrast_gain(source: NDArray[np.float64], target: NDArray[np.float64]) -> float:
    """What the slow part inside a region is multiplied by; negative where the polarity turns round."""
    before, after = float(source.mean()), float(target.mean())
    sign = -1.0 if before * after < 0 else 1.0
    return sign * float(np.clip(abs(after) / max(abs(before), FAINT), *CONTRAST_GAINS))
