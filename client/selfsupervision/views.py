"""Two looks at one image: what a contrastive student has to see through."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

AREA = (0.3, 1.0)  # of the tile that a view shows
LOG_GAMMA = (-0.4, 0.4)
CONTRAST = (0.6, 1.4)
BRIGHTNESS = (-0.15, 0.15)
GREY_CHANCE = 0.2
BLUR_CHANCE = 0.5
NOISE = (0.0, 0.05)


def view(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Another look at each of ``images``, (B, 3, H, W) in [0, 1] -> the same; every image its own draw.

    A part of the tile enlarged to the whole and mirrored, under another gamma, contrast and brightness,
    sometimes grey, sometimes blurred, with noise: the augmentations of MoCo v3 (Chen et al. 2021), with
    weaker colours, for a stain is no nuisance everywhere.
    """
    seen = _part(images, rng)

    def each(low: float, high: float) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (len(images), 1, 1, 1))).float()

    seen = seen.clamp(min=1e-4) ** each(*LOG_GAMMA).exp()
    mean = seen.mean((1, 2, 3), keepdim=True)
    seen = (seen - mean) * each(*CONTRAST) + mean + each(*BRIGHTNESS)
    grey = (each(0, 1) < GREY_CHANCE).float()
    seen = grey * seen.mean(1, keepdim=True) + (1 - grey) * seen
    blurred = (each(0, 1) < BLUR_CHANCE).float()
    seen = blurred * F.avg_pool2d(seen, 3, 1, 1, count_include_pad=False) + (1 - blurred) * seen
    noise = torch.from_numpy(rng.standard_normal(seen.shape, dtype=np.float32))
    return (seen + each(*NOISE) * noise).clamp(0, 1)


def _part(images: Tensor, rng: np.random.Generator) -> Tensor:
    """A random part of each image in the size of the whole, perhaps mirrored and turned."""
    scale = np.sqrt(rng.uniform(*AREA, len(images)))
    matrices = np.zeros((len(images), 2, 3), dtype=np.float32)
    signs = rng.choice([-1.0, 1.0], (len(images), 2))
    for axis in (0, 1):
        matrices[:, axis, axis] = scale * signs[:, axis]
        matrices[:, axis, 2] = (1 - scale) * rng.uniform(-1, 1, len(images))
    turned = rng.random(len(images)) < 0.5
    matrices[turned, :, :2] = matrices[turned, :, 1::-1]
    grid = F.affine_grid(torch.from_numpy(matrices), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
