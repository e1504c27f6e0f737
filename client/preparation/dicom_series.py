"""A series of DICOM slices: their order, their geometry, their numbers.

The order is that of the patient, not of the file names: slices are sorted by the place of their first
pixel (Image Position) along the normal of the slice (Image Orientation), DICOM PS3.3 C.7.6.2.1.1.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError

if TYPE_CHECKING:
    from pydicom import FileDataset

# What a slice must tell, and how many numbers each is.
GEOMETRY = {
    "ImageOrientationPatient": 6, "ImagePositionPatient": 3, "PixelSpacing": 2, "Rows": 1, "Columns": 1,
}  # fmt: skip
SAME_DIRECTION = 1e-3  # the largest difference of a direction cosine within one series
SAME_PLACE_MM = 1e-3


@dataclass(frozen=True)
class Slice:
    """One file of a series, its pixels not read yet.

    Attributes:
        direction: the six cosines of its rows and columns.
        position: (x, y, z) of its first pixel, mm.
        spacing_mm: (row, column), the distance between centres of pixels.
    """

    path: Path
    direction: tuple[float, ...]
    position: tuple[float, ...]
    spacing_mm: tuple[float, float]
    shape: tuple[int, int]

    @property
    def place_mm(self) -> float:
        """How far along the normal it lies."""
        normal = np.cross(self.direction[:3], self.direction[3:])
        return float(np.dot(normal, self.position))


def read_slice(path: Path) -> Slice:
    """The geometry of one file. Raises `DataError` if it is unreadable or says too little."""
    dataset = _read(path, pixels=False)
    absent = [name for name in GEOMETRY if dataset.get(name) is None]
    if absent:
        raise DataError(f"has no {', '.join(absent)} in its header: restore it")
    try:
        direction, position, spacing = (tuple(map(float, dataset[name].value)) for name in list(GEOMETRY)[:3])
    except (TypeError, ValueError) as error:
        raise DataError("has a header whose geometry is no numbers: restore it") from error
    wanted = list(GEOMETRY.values())[:3]
    if [len(direction), len(position), len(spacing)] != wanted or not min(spacing) > 0:
        raise DataError("has a header whose geometry makes no sense: restore it")
    return Slice(
        path, direction, position, (spacing[0], spacing[1]), (int(dataset.Rows), int(dataset.Columns))
    )


def series_fault(slices: Sequence[Slice]) -> str:
    """What makes ``slices`` no one series, or nothing."""
    first = slices[0]
    if any(not np.allclose(one.direction, first.direction, atol=SAME_DIRECTION) for one in slices):
        return "holds slices of different orientations: restore the series"
    if any(one.shape != first.shape or one.spacing_mm != first.spacing_mm for one in slices):
        return "holds slices of different sizes or spacings: restore the series"
    places = np.sort([one.place_mm for one in slices])
    if np.any(np.diff(places) < SAME_PLACE_MM):
        return "holds two slices at one place: remove the copy"
    return ""


def read_stored(path: Path) -> NDArray[np.float32]:
    """(H, W) float32 in the unit of the modality: slope and intercept applied (CT: Hounsfield units).

    Raises `DataError` for a file without one grey plane, and for a compression that cannot be opened.
    """
    dataset = _read(path, pixels=True)
    try:
        stored = dataset.pixel_array
    except Exception as error:  # a missing plugin, cut data, a header that contradicts itself
        raise DataError(
            f"holds pixels that cannot be decoded ({type(error).__name__}): restore it"
        ) from error
    if stored.ndim != 2:
        raise DataError("is not one grey slice: restore it")
    slope, intercept = dataset.get("RescaleSlope") or 1, dataset.get("RescaleIntercept") or 0
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _read(path: Path, pixels: bool) -> FileDataset:
    from pydicom import dcmread

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that bend the standard: what we use is checked above
            return dcmread(path, stop_before_pixels=not pixels)
    except Exception as error:  # InvalidDicomError, OSError, EOFError, ValueError ...
        raise DataError(f"cannot be read as DICOM ({type(error).__name__}): restore it") from error
