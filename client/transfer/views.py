"""Augmented views of a transfer set's images, each of which can be made again from its seed.

A teacher's word on a view is kept like its word on the image, and with it the seed, as in FKD (Shen and Xing
2022) and TinyViT (Wu et al. 2022): what a student saw can be seen again without keeping its pixels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from client.transfer.sets import TransferSet, join
from common.seeding import derive_seed

AS_IT_IS = 0  # the seed that leaves an image alone
GAIN, LOG_GAMMA, NOISE = (0.85, 1.15), (-0.2, 0.2), (0.0, 0.03)  # as of labelled crops, `client.sampling`


def view_of(image: Tensor, mask: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """One of the square's symmetries, and gain, gamma and noise alike in all channels.

    ``image`` (3, S, S) in [0, 1], ``mask`` (C, S, S), NaN where there is none; a function of ``seed``.
    """
    if seed == AS_IT_IS:
        return image, mask
    rng = np.random.default_rng(seed)
    turns, mirror = int(rng.integers(4)), bool(rng.random() < 0.5)
    image, mask = (torch.rot90(part, turns, (1, 2)) for part in (image, mask))
    if mirror:
        image, mask = image.flip(2), mask.flip(2)
    gain, gamma, spread = rng.uniform(*GAIN), np.exp(rng.uniform(*LOG_GAMMA)), rng.uniform(*NOISE)
    noise = torch.from_numpy(rng.standard_normal(image.shape[1:], dtype=np.float32))
    changed = (gain * image.pow(float(gamma)) + spread * noise).clamp(0, 1)
    return torch.where(
        image > 0, changed, 0.0
    ), mask.contiguous()  # black outside a field of view stays black


def with_views(images: TransferSet, count: int, seed: int) -> TransferSet:
    """``images`` as they are, and ``count`` - 1 further views of each, all before a teacher saw any."""
    parts = [images]
    for number in range(1, count):
        seeds = [derive_seed(seed, "view", number, index) for index in range(len(images))]
        viewed = [view_of(*one) for one in zip(images.images, images.masks, seeds, strict=True)]
        pictures, masks = (torch.stack(column) for column in zip(*viewed, strict=True))
        parts.append(replace(images, images=pictures, masks=masks, views=torch.tensor(seeds)))
    parts[0] = replace(images, views=torch.full((len(images),), AS_IT_IS))
    joined = join(parts)
    assert joined is not None
    return joined
