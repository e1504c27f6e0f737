"""One image file -> its stored numbers.

`READERS` is the whole list of formats: a suffix and the MONAI reader that opens it. A new format is a
new line there; everything after `read_image` and `read_mask` sees arrays only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from monai.data.image_reader import ImageReader, PILReader
from numpy.typing import NDArray
from PIL import Image, ImageOps

from common.errors import DataError

Role = Literal["image", "mask"]
Array = NDArray[Any]

BIT_DEPTHS = (8, 10, 12, 14, 16)


@dataclass(frozen=True)
class Raster:
    """A decoded image.

    Attributes:
        pixels: (C, H, W) float32, the stored numbers; C is 1 (grey) or 3 (colour).
        full_scale: the number that stands for white; see `full_scale_of`.
    """

    pixels: NDArray[np.float32]
    full_scale: float


def read_image(path: Path) -> Raster:
    """Read one PNG, JPEG or TIFF; an alpha channel is dropped, an EXIF rotation applied.

    Colour with more than 8 bits a channel is reduced to 8 by Pillow; grey keeps all its bits.
    Raises `DataError` for an unknown suffix, a missing, broken or several-page file.
    """
    stored = _load(path, "image")
    if stored.shape[0] not in (1, 3):
        raise DataError(f"{path} has {stored.shape[0]} channels: save it as grey or RGB.")
    return Raster(stored.astype(np.float32), full_scale_of(stored))


def read_mask(path: Path) -> NDArray[np.float32]:
    """(H, W) label values as stored (black-and-white files: 0 and 255; palette files: the index).

    Raises `DataError` as `read_image`, and for a mask in colour.
    """
    stored = _load(path, "mask").astype(np.float32)
    if not np.all(stored == stored[:1], where=~np.isnan(stored)):
        raise DataError(f"{path} is a colour picture: save the mask as one channel of label values.")
    grey: NDArray[np.float32] = stored[0]
    return grey


def full_scale_of(stored: Array) -> float:
    """The white level of (C, H, W) stored numbers: of the container's bits only those in use count.

    Scanners write 10, 12 or 14 bits into 16-bit files, so a 16-bit file's white is the smallest usual
    bit depth that holds its largest number. A float file has no fixed white: its largest magnitude.
    """
    finite = stored[np.isfinite(stored)]
    largest = float(np.abs(finite).max()) if finite.size else 0.0
    if np.issubdtype(stored.dtype, np.floating):
        return largest or 1.0
    fitting = [2.0**bits - 1 for bits in BIT_DEPTHS if 2.0**bits > largest]
    return fitting[0] if fitting else largest


class _PillowReader(PILReader):  # type: ignore[misc]
    def get_data(self, img: Any) -> tuple[Array, dict[str, Any]]:
        array, meta = super().get_data(img)
        return np.array(array), meta  # Pillow's own buffer is read-only, which torch warns about


def _pillow(role: Role) -> ImageReader:
    # reverse_indexing=False: by default MONAI's reader hands out (width, height).
    return _PillowReader(
        converter=_upright_image if role == "image" else _upright_mask, reverse_indexing=False
    )


READERS: dict[str, Callable[[Role], ImageReader]] = {
    ".png": _pillow,
    ".jpg": _pillow,
    ".jpeg": _pillow,
    ".tif": _pillow,
    ".tiff": _pillow,
}


@cache
def _reader(suffix: str, role: Role) -> ImageReader:
    return READERS[suffix](role)


def _load(path: Path, role: Role) -> Array:
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise DataError(f"{path}: no reader for the suffix {suffix!r}: use {', '.join(READERS)}.")
    if not path.is_file():
        raise DataError(f"{path} does not exist: correct the path in the manifest or restore the file.")
    reader = _reader(suffix, role)
    try:
        # Not MONAI's LoadImage: it sets up every reader that it knows, and warns of those it cannot.
        stored: Array = reader.get_data(reader.read(str(path)))[0]
        loaded = np.moveaxis(stored, -1, 0) if stored.ndim == 3 else stored[None]
    except DataError as error:
        raise DataError(f"{path}: {error.message}") from None
    except Exception as error:  # OSError, SyntaxError, ValueError, struct.error ...: Pillow has no one class
        raise DataError(
            f"{path} cannot be read as an image ({type(error).__name__}): save it again."
        ) from error
    if loaded.ndim != 3 or 0 in loaded.shape:
        raise DataError(f"{path} is not a picture of rows and columns.")
    return loaded


def _upright(picture: Image.Image) -> Image.Image:
    with picture:
        pages = getattr(picture, "n_frames", 1)
        if pages > 1:
            raise DataError(f"has {pages} pages: save each page as a file and a row of its own.")
        return ImageOps.exif_transpose(picture)


def _upright_image(picture: Image.Image) -> Image.Image:
    upright = _upright(picture)
    if upright.mode in ("L", "RGB", "F", "I"):
        return upright
    if upright.mode.startswith("I;16"):
        return upright.convert("I")
    return upright.convert("L" if upright.mode in ("1", "LA", "La") else "RGB")


def _upright_mask(picture: Image.Image) -> Image.Image:
    upright = _upright(picture)
    return upright if upright.mode == "P" else _upright_image(upright)
