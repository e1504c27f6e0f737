"""One image file -> its stored numbers.

`READERS` lists the formats of pictures: a suffix and the MONAI reader that opens it. `client.nifti` and
`client.dicom` read scans, which may have several slices. `open_stack` opens any of them; everything after
it, `read_image` and `read_mask` sees arrays only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from monai.data.image_reader import ImageReader, PILReader
from numpy.typing import NDArray
from PIL import Image, ImageOps

from client import dicom, nifti
from client.pixels import full_scale_of
from client.stacks import Array, Raster, Stack
from common.errors import DataError

__all__ = [
    "READERS",
    "Array",
    "Raster",
    "full_scale_of",
    "open_mask",
    "open_stack",
    "read_image",
    "read_mask",
]

Role = Literal["image", "mask"]


class Picture(Stack):
    """A PNG, JPEG or TIFF: a stack of one."""

    def __init__(self, path: Path, role: Role = "image") -> None:
        decoded = _load(path, role)
        if role == "image" and decoded.shape[0] not in (1, 3):
            raise DataError(f"{path} has {decoded.shape[0]} channels: save it as grey or RGB.")
        self.size = decoded.shape[1:]
        self.white = full_scale_of(decoded)
        self.pixels = decoded.astype(np.float32)

    def stored(self, index: int) -> NDArray[np.float32]:
        return self.pixels

    def _white(self) -> float:
        return self.white


def is_nifti(path: Path) -> bool:
    return path.name.lower().endswith(nifti.SUFFIXES)


def open_stack(path: Path, axis: int | None = None) -> Stack:
    """Open a picture, a NIfTI file, a DICOM file or the folder of one DICOM series.

    ``axis``: of a NIfTI volume, along which it is cut; None: along its thickest voxels. Pictures lose an
    alpha channel and are turned upright by EXIF; colour with more than 8 bits a channel is reduced to 8 by
    Pillow, grey keeps all its bits.
    Raises `DataError` for an unknown suffix, a missing or broken file, or a file of several pages.
    """
    if is_nifti(path):
        _must_exist(path)
        return nifti.NiftiStack(path, axis)
    if path.is_dir():
        return dicom.DicomStack(_only_series(path))
    if path.suffix.lower() not in READERS and dicom.is_dicom(path):
        _must_exist(path)
        return dicom.DicomStack([path])
    return Picture(path)


def open_mask(path: Path, image: Stack) -> Stack:
    """The mask of ``image`` as a stack with the same slices. Raises `DataError` if it has not."""
    if is_nifti(path):
        _must_exist(path)
        mask: Stack = nifti.NiftiStack(path).shown_as(image)
    elif path.is_dir() or (path.suffix.lower() not in READERS and dicom.is_dicom(path)):
        mask = open_stack(path)
    else:
        mask = Picture(path, "mask")
    if mask.count != image.count:
        raise DataError(f"{path} has {mask.count} slices, its image {image.count}: export one size.")
    return mask


def read_image(path: Path) -> Raster:
    """The one slice of an image; see `open_stack`. Raises `DataError` for a file of several slices too."""
    stack = open_stack(path)
    if stack.count != 1:
        raise DataError(f"{path} has {stack.count} slices: one is wanted here.")
    return stack.raster(0)


def read_mask(path: Path) -> NDArray[np.float32]:
    """(H, W) label values as stored (black-and-white files: 0 and 255; palette files: the index).

    Raises `DataError` as `read_image`, and for a mask in colour.
    """
    return mask_labels(path, Picture(path, "mask") if path.suffix.lower() in READERS else open_stack(path), 0)


def mask_labels(path: Path, mask: Stack, index: int) -> NDArray[np.float32]:
    """(H, W) label values of slice ``index``. Raises `DataError` for a mask in colour."""
    stored = mask.stored(index)
    if not np.all(stored == stored[:1], where=~np.isnan(stored)):
        raise DataError(f"{path} is a colour picture: save the mask as one channel of label values.")
    grey: NDArray[np.float32] = stored[0]
    return grey


def _only_series(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and dicom.is_dicom(path))
    series, faults = dicom.series_of(files)
    if faults:
        raise DataError(f"{folder}: " + " ".join(faults))
    if len(series) != 1:
        raise DataError(f"{folder} holds {len(series)} DICOM series: name the folder of one.")
    return series[0]


def _must_exist(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path} does not exist: correct the path in the manifest or restore the file.")


class _PillowReader(PILReader):  # type: ignore[misc]
    def read(self, data: Any, **kwargs: Any) -> Image.Image:
        # From a stream: of a file's name Pillow 13 maps an uncompressed TIFF that lies on its side with its
        # rows and columns exchanged, and mangles it in silence.
        with Path(data).open("rb") as file:
            upright: Image.Image = self.converter(Image.open(file))
            upright.load()
        return upright

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
        known = ", ".join([*READERS, *nifti.SUFFIXES, *dicom.SUFFIXES])
        raise DataError(f"{path}: no reader for the suffix {suffix!r}: use {known}.")
    _must_exist(path)
    reader = _reader(suffix, role)
    try:
        # Not MONAI's LoadImage: it sets up every reader that it knows, and warns of those it cannot.
        stored: Array = reader.get_data(reader.read(str(path)))[0]
    except DataError as error:
        raise DataError(f"{path}: {error.message}") from None
    except Exception as error:  # OSError, SyntaxError, ValueError, struct.error ...: Pillow has no one class
        raise DataError(
            f"{path} cannot be read as an image ({type(error).__name__}): save it again."
        ) from error
    if stored.ndim not in (2, 3) or 0 in stored.shape:
        raise DataError(f"{path} is not a picture of rows and columns.")
    return stored[None] if stored.ndim == 2 else stored.transpose(2, 0, 1)


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
