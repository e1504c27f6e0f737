"""From stored numbers to what a network sees, and from its probabilities to labels: arrays in, arrays out.

This module is all that a student needs around it, so a copy of it travels in a MONAI bundle
(`client.export.bundle`): it imports nothing of ours but `common.probability`, which travels too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from common.probability import masks_of, probabilities

BIT_DEPTHS = (8, 10, 12, 14, 16)
LOW_PERCENTILE, HIGH_PERCENTILE = 0.5, 99.7
MIN_RANGE = 0.05  # of full scale: a nearly constant channel is not blown up into noise
SURROUND_LEVEL = 0.1  # of the way from the darkest to a bright pixel: below lies the surround
BLACK_LEVEL = 0.25  # of a bright pixel: an image whose darkest part is lighter has no surround
MIN_FIELD = 0.25  # of the image: a smaller field of view is a mistake of the threshold
TILES_AT_ONCE = 8

Array = NDArray[Any]
Forward = Callable[[Tensor], Tensor]


def full_scale_of(stored: Array) -> float:
    """The white level of stored numbers: of the container's bits only those in use count.

    Scanners write 10, 12 or 14 bits into 16-bit files, so a 16-bit file's white is the smallest usual
    bit depth that holds its largest number. A float file has no fixed white: its largest magnitude.
    """
    return white_level(largest_of(stored), not np.issubdtype(stored.dtype, np.floating))


def largest_of(stored: Array) -> float:
    """The largest finite magnitude, 0 where nothing is finite."""
    finite = stored[np.isfinite(stored)]
    return float(np.abs(finite.astype(np.float64)).max()) if finite.size else 0.0


def white_level(largest: float, whole_numbers: bool) -> float:
    if not whole_numbers:
        return largest or 1.0
    fitting = [2.0**bits - 1 for bits in BIT_DEPTHS if 2.0**bits > largest]
    return fitting[0] if fitting else largest


def percentile_stretch(image: Tensor, valid: Tensor) -> Tensor:
    """Stretch each channel from its 0.5th to its 99.7th percentile over valid pixels; black elsewhere.

    Args:
        image: (C, H, W) float, 1 being full scale.
        valid: (H, W) bool with at least one pixel.

    Returns:
        (C, H, W) float32 in [0, 1]. The range is taken as at least `MIN_RANGE`; equal channels stay equal.
    """
    inside = image[:, valid].numpy()
    low, high = np.percentile(inside, (LOW_PERCENTILE, HIGH_PERCENTILE), axis=1).astype(np.float32)
    span = torch.from_numpy(np.maximum(high - low, MIN_RANGE))[:, None, None]
    stretched = (image - torch.from_numpy(low)[:, None, None]) / span
    return torch.where(valid, stretched.clamp(0.0, 1.0), 0.0).float()


def field_of_view(image: Tensor) -> Tensor:
    """(H, W) bool: where a (C, H, W) photograph with a dark surround shows tissue.

    The brightest channel, as it is and smoothed, is cut at a level between surround and tissue; the
    largest component, its holes filled, is the field. All True where no dark surround is found.
    """
    brightest = image.amax(dim=0).numpy()
    smooth = ndimage.gaussian_filter(brightest, sigma=max(1.0, 0.005 * max(brightest.shape)))
    dark, bright = float(smooth.min()), float(np.percentile(smooth, 95))
    everything = torch.ones(brightest.shape, dtype=torch.bool)
    if dark > BLACK_LEVEL * bright or dark == bright:
        return everything
    level = dark + SURROUND_LEVEL * (bright - dark)
    # Smooth alone would widen the field by the blur, raw pixels alone would let noise outside join it.
    parts, _ = ndimage.label((smooth > level) & (brightest > level))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0  # the surround
    field = ndimage.binary_fill_holes(parts == sizes.argmax())
    return torch.from_numpy(field) if field.mean() >= MIN_FIELD else everything


def area_weights(stored: int, wanted: int) -> Tensor:
    """(wanted, stored) float32: the share of each stored pixel in each wanted one; rows sum to 1."""
    edges = np.arange(wanted + 1) * (stored / wanted)
    starts = np.arange(stored)
    upper = np.minimum(edges[1:, None], starts[None] + 1.0)
    lower = np.maximum(edges[:-1, None], starts[None])
    weights: NDArray[np.float64] = np.clip(upper - lower, 0.0, None) * (wanted / stored)
    return torch.from_numpy(weights.astype(np.float32))


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """(C, H, W) float -> (C, height, width): the area's mean downwards, bilinear upwards."""
    if image.shape[1] < height or image.shape[2] < width:
        grown = functional.interpolate(
            image[None], size=(height, width), mode="bilinear", align_corners=False
        )
        return grown[0]
    rows = area_weights(image.shape[1], height)
    columns = area_weights(image.shape[2], width)
    return rows @ image @ columns.T


@torch.inference_mode()
def tiled_probabilities(
    forward: Forward, image: Tensor, size: int, exclusive: bool, overlap: float
) -> Tensor:
    """Probabilities (C, H, W) of an image (3, H, W) from tiles (B, 3, S, S), blended with Gaussian weights.

    Args:
        forward: tiles -> logits (B, C, S, S); ``exclusive`` says what they mean.
        size: S; a side of the image that is shorter is reflected to its length.
        overlap: share of a tile that neighbours share, 0 to below 1.
    """
    height, width = image.shape[1:]
    rows, top = reflected(height, size)
    columns, left = reflected(width, size)
    padded = image[:, rows][:, :, columns]
    blended = sliding_window_inference(
        padded[None],
        roi_size=(size, size),
        sw_batch_size=TILES_AT_ONCE,
        # Probabilities are blended, not logits: one over-confident tile cannot outvote its neighbours.
        predictor=lambda tiles: probabilities(forward(tiles).float(), exclusive),
        overlap=overlap,
        mode="gaussian",
    )
    assert isinstance(blended, Tensor)
    return blended[0, :, top : top + height, left : left + width].clamp(0.0, 1.0)


def reflected(length: int, wanted: int) -> tuple[Tensor, int]:
    """Indices that reflect ``length`` pixels to at least ``wanted``, and where the first pixel lies.

    numpy reflects again where one reflection is too short, which torch's padding refuses to do.
    """
    missing = max(0, wanted - length)
    before = missing // 2
    indices = np.pad(np.arange(length), (before, missing - before), mode="reflect")
    return torch.from_numpy(indices), before


def label_map(
    probability: Tensor,
    values: Sequence[Sequence[int]],
    labels: Sequence[int],
    exclusive: bool,
    threshold: float,
) -> Tensor:
    """(C, H, W) probabilities -> (H, W) uint8 labels, 0 where `masks_of` finds no class.

    Where it finds several, one label has to stand for them: that of the innermost class (the fewest
    ``values``: a medulla within its kidney), and among equals of the most probable.
    """
    found = masks_of(probability, exclusive, threshold)
    breadth = torch.tensor([len(item) for item in values])[:, None, None]
    outer = found & (breadth > torch.where(found, breadth, breadth.max()).amin(0))
    _, index = torch.where(found & ~outer, probability, -1.0).max(dim=0)
    chosen = torch.tensor(list(labels), dtype=torch.uint8)[index]
    return torch.where(found.any(0), chosen, 0).to(torch.uint8)
