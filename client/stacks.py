"""One image file or series as a stack of slices, and where its voxels lie in the patient.

A picture is a stack of one. A volume is cut along one of its axes, and each slice is shown the way
radiologists show it, so that a student sees the same picture whether a scan comes as NIfTI or as DICOM.
Slices are decoded one at a time: a stack never holds a volume's numbers in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.pixels import largest_of, white_level
from common.errors import DataError

Array = NDArray[Any]
Affine = NDArray[np.float64]

GRID_TOLERANCE = 0.02  # of a voxel: how far two files of one grid may be apart


@dataclass(frozen=True)
class Raster:
    """A decoded image.

    Attributes:
        pixels: (C, H, W) float32, the stored numbers; C is 1 (grey) or 3 (colour).
        full_scale: the number that stands for white; see `client.pixels.full_scale_of`.
    """

    pixels: NDArray[np.float32]
    full_scale: float


@dataclass(frozen=True)
class Grid:
    """``shape``: voxels along the three axes; ``affine`` (4, 4): voxel index -> mm right, anterior, superior.

    ``placed``: whether the file says where its voxels lie; else only their size means something.
    """

    shape: tuple[int, int, int]
    affine: Affine
    placed: bool = True

    @property
    def zooms(self) -> tuple[float, float, float]:
        """Voxel size in mm along each axis."""
        first, second, third = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0)).tolist()
        return first, second, third

    def nearest_directions(self) -> tuple[tuple[int, int], ...]:
        """For each voxel axis the anatomical axis (0 right, 1 anterior, 2 superior) that it runs along, and 1
        or -1 for its sense. Every anatomical axis is given once, the best matching first."""
        cosines = self.affine[:3, :3] / np.maximum(self.zooms, 1e-12)
        left = np.abs(cosines)
        found: dict[int, tuple[int, int]] = {}
        for _ in range(3):
            world, axis = np.unravel_index(int(np.argmax(left)), left.shape)
            found[int(axis)] = (int(world), 1 if cosines[world, axis] >= 0 else -1)
            left[world, :], left[:, axis] = -1.0, -1.0
        return found[0], found[1], found[2]

    def widest_axis(self) -> int:
        """The axis along which voxels are thickest, the last of equals: how scans are usually cut."""
        zooms = self.zooms
        return max(range(3), key=lambda axis: (round(zooms[axis], 4), axis))


@dataclass(frozen=True)
class View:
    """How slices along ``axis`` are shown: which voxel axes run down and across, and which are turned."""

    axis: int
    down: int
    across: int
    turn_down: bool = False
    turn_across: bool = False

    @classmethod
    def radiological(cls, grid: Grid, axis: int) -> View:
        """Axial slices with the front on top, the others with the head on top; the patient's right, or for
        sagittal slices the front, on the left."""
        directions = grid.nearest_directions()
        first, second = (other for other in range(3) if other != axis)
        # Rows run along the superior axis where the slice has it, else along the anterior one.
        down, across = (first, second) if directions[first][0] > directions[second][0] else (second, first)
        # A picture's rows go down: superior and anterior become less. Right (and anterior) is on the left.
        return cls(axis, down, across, directions[down][1] > 0, directions[across][1] > 0)

    def picture(self, volume: Array, index: int) -> Array:
        """(H, W, ...) of slice ``index`` of a (I, J, K, ...) array; a view of it."""
        plane = volume[tuple(index if axis == self.axis else slice(None) for axis in range(3))]
        if self.down > self.across:
            plane = plane.swapaxes(0, 1)
        return plane[:: -1 if self.turn_down else 1, :: -1 if self.turn_across else 1]


class Stack(ABC):
    """Slices of one file or series, opened but not decoded.

    Attributes:
        count: number of slices.
        size: (H, W) of a slice.
        spacing_mm: (row, column) size of a pixel, or None if the file does not say.
        grid: where the voxels lie, or None for a picture.
        view: how the slices lie in the grid, None for a picture.
    """

    count: int = 1
    size: tuple[int, int] = (0, 0)
    spacing_mm: tuple[float, float] | None = None
    grid: Grid | None = None
    view: View | None = None
    whole_numbers: bool = False

    @abstractmethod
    def stored(self, index: int) -> NDArray[np.float32]:
        """(C, H, W) numbers of slice ``index``. Raises `DataError` naming the file."""

    @cached_property
    def full_scale(self) -> float:
        """One white level for the whole stack, so that an empty slice is not stretched into noise."""
        return self._white()

    def _white(self) -> float:
        largest = max(largest_of(self.stored(index)) for index in range(self.count))
        return white_level(largest, self.whole_numbers)

    def raster(self, index: int) -> Raster:
        return Raster(self.stored(index), self.full_scale)

    def rasters(self) -> Iterator[Raster]:
        return (self.raster(index) for index in range(self.count))


def axis_permutation(image: Grid, mask: Grid) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """How the axes of ``mask`` are to be ordered and turned round to be those of ``image``.

    Two programs may store one scan with other axes first. Raises `DataError` if the two are not one grid.
    """
    apart = "the mask lies on another grid than its image: resample it to the image's grid."
    if not (image.placed and mask.placed):
        if image.shape == mask.shape:
            return (0, 1, 2), (False, False, False)
        raise DataError(apart)
    across = np.linalg.inv(image.affine) @ mask.affine  # mask voxel -> image voxel
    steps = np.rint(across[:3, :3])
    if not np.array_equal(np.abs(steps) @ np.ones(3), np.ones(3)) or abs(np.linalg.det(steps)) != 1:
        raise DataError(apart)
    order = tuple(int(np.argmax(np.abs(row))) for row in steps)
    turned = tuple(bool(row.sum() < 0) for row in steps)
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)], float)
    reach = corners * [*(side - 1 for side in mask.shape), 1]
    found = (across @ reach.T)[:3].T
    limits = np.array(image.shape) - 1
    wanted = np.array(
        [[limits[a] - at[order[a]] if turned[a] else at[order[a]] for a in range(3)] for at in reach]
    )
    sizes = tuple(mask.shape[axis] for axis in order)
    if sizes != image.shape or np.abs(found - wanted).max() > GRID_TOLERANCE:
        raise DataError(apart)
    return order, turned
