"""What runs in a MONAI bundle: pictures in, masks out, with the student's own preparation and tiles.

A copy of this module travels in the bundle with `client.pixels` and `common.probability`, so that it needs
no installation of ours. It reads what Pillow reads; scans are for `wardround student predict`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from client.pixels import (
    field_of_view,
    full_scale_of,
    label_map,
    percentile_stretch,
    resize,
    tiled_probabilities,
)

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


@dataclass(frozen=True)
class Settings:
    """The student's card, as far as it matters here; ``values`` and ``labels``: of each class."""

    image_size: int
    longest_side: int | None
    find_field: bool
    exclusive: bool
    values: Sequence[Sequence[int]]
    labels: Sequence[int]
    overlap: float
    threshold: float = 0.5


def segment(stored: Tensor, network: Callable[[Tensor], Tensor], settings: Settings) -> Tensor:
    """(1 or 3, H, W) stored numbers -> (H, W) uint8 labels of the same size."""
    image = stored[:1] if bool((stored == stored[:1]).all()) else stored
    image = image.float() / full_scale_of(stored.numpy())
    height, width = image.shape[1:]
    if settings.longest_side:
        scale = settings.longest_side / max(height, width)
        wanted = max(1, round(height * scale)), max(1, round(width * scale))
        image = image if wanted == (height, width) else resize(image, *wanted)
    valid = field_of_view(image) if settings.find_field else torch.ones(image.shape[1:], dtype=torch.bool)
    tiles = percentile_stretch(image, valid).expand(3, -1, -1).contiguous()
    found = tiled_probabilities(network, tiles, settings.image_size, settings.exclusive, settings.overlap)
    probability = resize(found * valid, height, width)
    return label_map(probability, settings.values, settings.labels, settings.exclusive, settings.threshold)


def read(path: Path) -> Tensor:
    """(C, H, W) numbers of a picture, turned upright."""
    # From a stream: of a file's name Pillow 13 mangles uncompressed TIFFs that lie on their side.
    with path.open("rb") as file, Image.open(file) as opened:
        upright = ImageOps.exif_transpose(opened)
        if upright.mode.startswith("I;16"):
            upright = upright.convert("I")
        elif upright.mode not in ("L", "RGB", "F", "I"):
            upright = upright.convert("L" if upright.mode in ("1", "LA", "La") else "RGB")
        pixels = np.array(upright)
    channels_first = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(channels_first))


def run(images: str, masks: str, network: Callable[[Tensor], Tensor], settings: Settings) -> list[str]:
    """Segment every picture of the folder ``images``; one PNG of labels each in ``masks``; their paths."""
    files = sorted(path for path in Path(images).iterdir() if path.suffix.lower() in PICTURES)
    if not files:
        raise FileNotFoundError(
            f"{images} has no picture: set image_dir to a folder of {', '.join(PICTURES)}"
        )
    Path(masks).mkdir(parents=True, exist_ok=True)
    written = []
    for path in files:
        target = Path(masks) / f"{path.name}.png"
        Image.fromarray(segment(read(path), network, settings).numpy()).save(target)
        written.append(str(target))
    return written
