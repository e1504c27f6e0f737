"""What the small copies of public sets are painted with, and how they are broken."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SHAPE = (40, 48)  # rows, columns

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Spoiled:
    """What was done to a copy, as it is told: what is missing, a renamed file's new name, a mask."""

    missing: str
    renamed: str
    miscoded: str


@dataclass(frozen=True)
class Layout:
    """``write(folder, seed)`` makes a copy; ``spoil`` breaks it in three places at once."""

    name: str
    write: Callable[[Path, int], None]
    spoil: Callable[[Path], Spoiled]
    folders: tuple[str, ...]  # each needed
    images: int
    patients: int


def scene(rng: np.random.Generator, objects: int = 1) -> tuple[NDArray[np.uint8], list[Mask]]:
    """(H, W, 3) noise with bright discs, and the mask of each."""
    image = rng.integers(20, 90, (*SHAPE, 3))
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    masks = []
    for number in range(objects):
        centre = 10 + 20 * (number // 2) + rng.integers(0, 3), 12 + 22 * (number % 2) + rng.integers(0, 3)
        mask = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < 36
        image[mask] += 120
        masks.append(mask)
    return image.astype(np.uint8), masks


def save(array: NDArray[np.uint8] | Mask, path: Path) -> None:
    """A Boolean array becomes a black-and-white picture (1 bit)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(array)
    if path.suffix == ".gz":
        buffer = io.BytesIO()
        picture.save(buffer, "PPM")
        path.write_bytes(gzip.compress(buffer.getvalue()))
    else:
        picture.save(path)


def grey(mask: Mask) -> NDArray[np.uint8]:
    return mask.astype(np.uint8) * 255


def rename(path: Path, name: str) -> str:
    path.rename(path.with_name(name))
    return name


def miscode(path: Path, value: int = 7) -> str:
    """Rewrite a mask with a value that no set has; its name, as it is told."""
    save(np.full(SHAPE, value, np.uint8), path)
    return path.name
