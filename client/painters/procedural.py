"""Procedural paint: shapes that nobody has, in every site's colours and grain; no network, no patient."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from client.conditioning import conditioning_masks
from client.painters.base import FloatImage, Material, SyntheticSet
from client.painters.colours import BG_MEAN, BG_STD, FG_MEAN, FG_STD, blend, greyed, membership
from client.texture import grain
from common.style import BAND_EDGES, TEXTURE, TEXTURE_PARTS

SHADING = (0.0, 0.06)  # deviation of what is slower than any grain, where a style does not say it
FINE_BANDS = 3  # those that the two deviations of a plain style are about


def paint(material: Material) -> SyntheticSet:
    """Masks of the shape prior, nearest in shape to each drawn style, painted with it.

    Guarantee: no pixel and no mask of a patient is looked at.
    """
    masks = conditioning_masks(material.styles, material.plan.data, material.rng("masks"))
    images = [
        painted(mask.numpy(), style, material.rng("paint", index))
        for index, (mask, style) in enumerate(zip(masks, material.styles, strict=True))
    ]
    return SyntheticSet(torch.from_numpy(np.stack(images)), masks)


def painted(mask: FloatImage, style: NDArray[np.float64], rng: np.random.Generator) -> FloatImage:
    """One image (3, S, S) on ``mask`` (C, S, S): two colours with soft borders, and grain in each region."""
    soft = membership(mask)
    image = blend(style[FG_MEAN], style[BG_MEAN], soft)
    for part, deviations, share in ((0, style[FG_STD], soft), (1, style[BG_STD], 1 - soft)):
        typical = float(deviations.mean())
        if len(style) >= TEXTURE.stop:
            numbers = style[TEXTURE].reshape(2, len(TEXTURE_PARTS))[part]
        else:
            numbers = _guessed(typical, rng)
        field = grain(rng, mask.shape[1], numbers[:-1], float(numbers[-1]))
        image += (deviations / max(typical, 1e-6))[:, None, None] * field * share
    return greyed(image.clip(0, 1), style).astype(np.float32)


def _guessed(deviation: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Numbers of `TEXTURE_PARTS` of a region of which only the fine ``deviation`` is known."""
    shares = rng.dirichlet(np.ones(FINE_BANDS))
    fine = deviation * np.sqrt(shares)
    rest = np.zeros(len(BAND_EDGES) - FINE_BANDS)
    return np.concatenate([fine, rest, [rng.uniform(*SHADING)], [0.0]])
