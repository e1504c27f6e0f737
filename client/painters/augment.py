"""Strong classical augmentation: what a site can do alone, with nothing shared.

Elastic deformation of image and mask (Simard et al. 2003), then colour jitter, gamma, inversion, blur and
noise, each drawn for every image from wide ranges (after the generalisation study of Zhang et al. 2020).
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from client.painters.base import Crop, FloatImage, Material, SyntheticSet, from_crops

BEND = 8.0  # pixels: smoothness of the elastic field, for images of 96
REACH = (0.0, 3.0)  # pixels: its deviation
GAIN, SHIFT = (0.5, 1.6), (-0.25, 0.25)  # of each channel
LOG_GAMMA = (-0.7, 0.7)
BLUR, NOISE = (0.0, 1.5), (0.0, 0.08)
INVERTED = 0.25  # share of the images


def augment(material: Material) -> SyntheticSet:
    """Every crop deformed and disturbed, with its mask deformed alike."""

    def change(index: int, crop: Crop) -> tuple[FloatImage, FloatImage]:
        rng = material.rng("augment", index)
        image, mask = deformed(crop.image, crop.mask, rng)
        return disturbed(image, rng), mask

    return from_crops(material, change)


def deformed(image: FloatImage, mask: FloatImage, rng: np.random.Generator) -> tuple[FloatImage, FloatImage]:
    """Both moved by one smooth random field; the mask stays 0 or 1."""
    size = image.shape[1]
    reach = rng.uniform(*REACH) * size / 96
    field = np.stack([gaussian_filter(rng.standard_normal((size, size)), BEND * size / 96) for _ in range(2)])
    field *= reach / max(float(field.std()), 1e-9)
    places = np.indices((size, size)) + field
    moved = [map_coordinates(channel, places, order=1, mode="reflect") for channel in image]
    planes = [map_coordinates(plane, places, order=0, mode="reflect") for plane in mask]
    return np.stack(moved).astype(np.float32), np.stack(planes).astype(np.float32)


def disturbed(image: FloatImage, rng: np.random.Generator) -> FloatImage:
    """Colour, light, sharpness and noise of ``image`` (3, S, S) changed; grey stays grey."""
    grey = bool(np.ptp(image, axis=0).max() < 1e-3)
    gain, shift = (rng.uniform(*reach, 1 if grey else 3) for reach in (GAIN, SHIFT))
    if rng.random() < INVERTED:
        image = 1 - image
    image = (gain[:, None, None] * image + shift[:, None, None]).clip(0, 1)
    image = image ** np.exp(rng.uniform(*LOG_GAMMA))
    blur = rng.uniform(*BLUR)
    image = np.stack([gaussian_filter(channel, blur) for channel in image])
    noise = rng.standard_normal((1, *image.shape[1:])) * rng.uniform(*NOISE)
    changed: FloatImage = (image + noise).clip(0, 1).astype(np.float32)
    return changed
