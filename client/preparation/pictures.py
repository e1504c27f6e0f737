"""Picture files -> arrays: whatever Pillow reads, and the same compressed with gzip.

Rows and columns stay as stored (no EXIF rotation): a set's masks were drawn on the stored pixels.
"""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
from PIL import Image

from client.preparation.known_set import Labels
from client.preparation.source import Array
from common.errors import DataError

BACKGROUND, FOREGROUND = 0, 255
GREY_MODES = ("1", "L", "LA", "La")


def read_picture(path: Path) -> Array:
    """(H, W) or (H, W, 3) uint8; alpha is dropped. Raises `DataError`."""
    with _opened(path) as picture:
        return np.array(picture.convert("L" if picture.mode in GREY_MODES else "RGB"))


def read_labels(path: Path) -> Labels:
    """(H, W) uint8, the numbers of a grey or black-and-white picture (black-and-white: 0 and 255).

    Raises `DataError` for one in colour.
    """
    with _opened(path) as picture:
        if picture.mode in GREY_MODES:
            return np.array(picture.convert("L"))
        colour = np.array(picture.convert("RGB"))
    if not np.all(colour == colour[..., :1]):
        raise DataError("is a picture in colour, and the set's masks are grey: restore it")
    grey: Labels = colour[..., 0]
    return grey


def read_binary(path: Path) -> Labels:
    """(H, W) of 0 and 255 alone. Raises `DataError` for any other number."""
    labels = read_labels(path)
    refuse_values(labels, {BACKGROUND, FOREGROUND})
    return labels


def refuse_values(labels: Labels, known: set[int]) -> None:
    """Raise `DataError` if there are values that the set's masks do not have."""
    unknown = sorted(set(np.unique(labels).tolist()) - known)
    if unknown:
        shown = ", ".join(map(str, unknown[:8])) + (" ..." if len(unknown) > 8 else "")
        coding = ", ".join(map(str, sorted(known)))
        raise DataError(f"holds the values {shown}, and the set's masks hold {coding} alone: restore it")


def _opened(path: Path) -> Image.Image:
    try:
        data = path.read_bytes()
        picture = Image.open(io.BytesIO(gzip.decompress(data) if path.suffix.lower() == ".gz" else data))
        picture.load()
    except Exception as error:  # OSError, EOFError, SyntaxError, ValueError ...: Pillow has no one class
        raise DataError(f"cannot be read as a picture ({type(error).__name__}): restore it") from error
    return picture
