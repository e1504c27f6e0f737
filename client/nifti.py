"""NIfTI: a volume or a single slice, read without holding it in memory, and masks written in its geometry.

A compressed file is unpacked into a nameless temporary file, which the system removes with the process,
because slices of it could otherwise only be read from its beginning each time.
"""

from __future__ import annotations

import gzip
import shutil
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from client.stacks import Array, Grid, Stack, View, axis_permutation
from common.errors import DataError

SUFFIXES = (".nii", ".nii.gz")
COMPRESSION = 1  # masks are nearly empty: a higher level costs time and saves little
AXES = ("sagittal", "coronal", "axial")  # slices along the right, the anterior, the superior axis


@dataclass(frozen=True)
class Opened:
    """``array``: (I, J, K) as stored, or (..., 3) in colour; its numbers mean array * slope + intercept."""

    array: Array
    header: Any
    grid: Grid
    slope: float
    intercept: float


class NiftiStack(Stack):
    """Slices of a NIfTI-1 or NIfTI-2 file along ``axis``: 0, 1 or 2; None: along the thickest voxels."""

    def __init__(self, path: Path, axis: int | None = None) -> None:
        self.path = path
        self.opened = open_nifti(path)
        self.grid = self.opened.grid
        self._show(self.opened.array, self.grid, axis)
        scaled = (self.opened.slope, self.opened.intercept) != (1.0, 0.0)
        self.whole_numbers = not scaled and np.issubdtype(self.opened.array.dtype, np.integer)

    def _show(self, array: Array, grid: Grid, axis: int | None) -> None:
        self.array = array
        self.view = View.radiological(grid, grid.widest_axis() if axis is None else axis)
        self._measure(grid)

    def _measure(self, grid: Grid) -> None:
        assert self.view is not None
        self.count = grid.shape[self.view.axis]
        self.size = (grid.shape[self.view.down], grid.shape[self.view.across])
        self.spacing_mm = (grid.zooms[self.view.down], grid.zooms[self.view.across])

    def shown_as(self, image: Stack) -> NiftiStack:
        """The same numbers as slices of ``image``, for a mask. Raises `DataError` if the grids differ."""
        assert self.grid is not None
        if image.grid is None or image.view is None:
            return self
        try:
            order, turned = axis_permutation(image.grid, self.grid)
        except DataError as error:
            raise DataError(f"{self.path}: {error.message}") from None
        array = self.opened.array.transpose(*order, *range(3, self.opened.array.ndim))
        self.array = array[tuple(slice(None, None, -1 if turn else 1) for turn in turned)]
        self.view = image.view
        self._measure(image.grid)
        return self

    def stored(self, index: int) -> NDArray[np.float32]:
        assert self.view is not None
        plane = self.view.picture(self.array, index)
        numbers = plane.astype(np.float32) * np.float32(self.opened.slope) + np.float32(self.opened.intercept)
        channels_first = numbers[None] if numbers.ndim == 2 else numbers.transpose(2, 0, 1)
        return np.ascontiguousarray(channels_first)


def open_nifti(path: Path) -> Opened:
    """Read the header; map the voxels. Raises `DataError` for a broken file or more than three dimensions."""
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    try:
        image: Any = nibabel.load(path)
        header = image.header.copy()
        shape = tuple(int(side) for side in header.get_data_shape())
        while len(shape) > 2 and shape[-1] == 1:
            shape = shape[:-1]
        if not 2 <= len(shape) <= 3 or 0 in shape:
            raise DataError(f"{path} has {len(shape)} dimensions: save one volume a file.")
        whole = (*shape, 1)[:3]
        # The header itself forgets offset and scale when it is loaded.
        stored = image.dataobj
        mapped = _mapped(path, stored.dtype, int(stored.offset), whole)
    except DataError:
        raise
    except (ImageFileError, EOFError, OSError, ValueError, zlib.error) as error:
        raise DataError(f"{path} cannot be read as NIfTI ({type(error).__name__}): save it again.") from error
    placed = bool(int(header["sform_code"]) or int(header["qform_code"]))
    grid = Grid(whole, np.asarray(header.get_best_affine(), np.float64), placed)
    return Opened(mapped, header, grid, float(stored.slope), float(stored.inter))


def _mapped(path: Path, kind: Any, offset: int, shape: tuple[int, ...]) -> Array:
    colour = kind.fields and set(kind.fields) >= {"R", "G", "B"}
    if not (colour or np.issubdtype(kind, np.integer) or np.issubdtype(kind, np.floating)):
        raise DataError(f"{path} holds {kind} numbers: save it as whole or real numbers.")
    with _plain(path) as file:
        mapped = np.memmap(file, kind, "r", offset, shape, "F")
    return np.stack([mapped[name] for name in "RGB"], axis=-1) if colour else mapped


def _plain(path: Path) -> IO[bytes]:
    if path.suffix.lower() != ".gz":
        return path.open("rb")
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 - whoever asked closes it
    try:
        with gzip.open(path) as packed:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
        unpacked.flush()
    except BaseException:
        unpacked.close()
        raise
    return unpacked


def write_nifti(path: Path, labels: Array, like: Any) -> None:
    """Write (I, J, K) uint8 ``labels`` with the geometry of the header ``like``: sform, qform, zooms, units.

    The shape of the file is that of ``like``. Raises OSError if the disk does not take it.
    """
    import nibabel

    kind = nibabel.Nifti2Image if int(like["sizeof_hdr"]) == 540 else nibabel.Nifti1Image
    header = like.copy()
    shape = header.get_data_shape()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    header["cal_max"] = header["cal_min"] = 0
    image = kind(labels.reshape(shape, order="F"), None, header)
    if path.suffix.lower() != ".gz":
        nibabel.save(image, path)
        return
    with gzip.GzipFile(path, "wb", COMPRESSION, mtime=0) as packed:
        image.to_stream(packed)


def header_of(grid: Grid) -> Any:
    """A NIfTI-1 header in mm for a grid of another format; its codes say "scanner" where it is placed."""
    import nibabel

    header = nibabel.Nifti1Header()
    header.set_data_shape(grid.shape)
    header.set_zooms(grid.zooms)
    header.set_xyzt_units("mm")
    code = 1 if grid.placed else 0
    header.set_sform(grid.affine, code)
    header.set_qform(grid.affine, code)
    if not np.allclose(header.get_qform(), grid.affine, atol=1e-3):
        header.set_qform(grid.affine, 0)  # a tilted gantry shears the grid, which a qform cannot say
    return header


def axis_name(grid: Grid, axis: int) -> str:
    """What slices along ``axis`` are called, by the anatomical axis nearest to it."""
    return AXES[grid.nearest_directions()[axis][0]] if grid.placed else "of no known direction"
