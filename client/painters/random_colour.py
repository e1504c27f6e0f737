"""The control: every crop in two random colours, with nothing shared by anybody."""

from __future__ import annotations

import numpy as np

from client.painters.base import Crop, FloatImage, Material, SyntheticSet, from_crops

LEAST_CONTRAST = 0.25  # of the two colours' luminance
GREY_SHARE = 0.5


def random_colour(material: Material) -> SyntheticSet:
    """Luminance, stretched and in half of the crops turned round, between two colours."""

    def change(index: int, crop: Crop) -> FloatImage:
        return two_coloured(crop, material.rng("random colour", index))

    return from_crops(material, change)


def two_coloured(crop: Crop, rng: np.random.Generator) -> FloatImage:
    """The image of ``crop`` on the line between two random colours, the one that was dark at either end."""
    luminance = crop.image.mean(0)
    low, high = np.percentile(luminance[crop.valid] if crop.valid.any() else luminance, (0.5, 99.5))
    along = ((luminance - low) / max(high - low, 1e-6)).clip(0, 1)
    if rng.random() < 0.5:
        along = 1 - along
    dark, bright = _two_colours(rng)
    mixed: FloatImage = (dark[:, None, None] * (1 - along) + bright[:, None, None] * along).astype(np.float32)
    return mixed


def _two_colours(rng: np.random.Generator) -> tuple[FloatImage, FloatImage]:
    grey = rng.random() < GREY_SHARE
    while True:
        first, second = (rng.random(1).repeat(3) if grey else rng.random(3) for _ in range(2))
        if abs(first.mean() - second.mean()) >= LEAST_CONTRAST:
            pair = sorted((first, second), key=lambda colour: float(colour.mean()))
            return pair[0].astype(np.float32), pair[1].astype(np.float32)
