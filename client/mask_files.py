"""Masks on the disk, each in the geometry of its image.

A picture's mask is a picture of the same size and resolution, a NIfTI volume's a NIfTI volume on the same
grid, a DICOM series' a DICOM segmentation that names its slices, or a NIfTI volume placed by them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from client.dicom import DicomStack
from client.nifti import NiftiStack, header_of, write_nifti
from client.sources import Source
from client.stacks import Stack
from client.students import StudentCard
from common.errors import DataError, UsageError

Labels = NDArray[np.uint8]

ORIENTATION, DESCRIPTION = 274, 270  # TIFF tags
RESOLUTIONS = (282, 283)  # across and down, per unit
RESOLUTION_TAGS = (*RESOLUTIONS, 296)  # and the unit
TURNED = (5, 6, 7, 8)  # orientations that exchange rows and columns
TIFFS = (".tif", ".tiff")


class ScanFormat(StrEnum):
    """What a DICOM image's mask is written as."""

    dicom_seg = "dicom-seg"
    nifti = "nifti"


@dataclass(frozen=True)
class Mask:
    """Where a mask goes: its image, its folder, and who drew it."""

    source: Source
    folder: Path
    card: StudentCard
    to: ScanFormat = ScanFormat.dicom_seg


def label_volume(stack: Stack) -> Labels:
    """Zeros (I, J, K) on the stack's grid, in a nameless temporary file, not in memory."""
    assert stack.grid is not None
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.uint8, "w+", shape=stack.grid.shape, order="F")


def write_picture_mask(mask: Mask, labels: Labels) -> Path:
    """(H, W) label values; a TIFF's mask is a TIFF with the same resolution tags, any other's a PNG."""
    source = mask.source.path
    picture = Image.fromarray(labels)
    if source.suffix.lower() in TIFFS:
        path = mask.folder / f"{mask.source.name}.tif"
        return save(path, lambda: picture.save(path, tiffinfo=_tags(source), compression="tiff_deflate"))
    path = mask.folder / f"{mask.source.name}.png"
    with Image.open(source) as image:
        resolution = image.info.get("dpi") if source.suffix.lower() == ".png" else None
    return save(path, lambda: picture.save(path, **({"dpi": resolution} if resolution else {})))


def _tags(source: Path) -> TiffImagePlugin.ImageFileDirectory_v2:
    kept = TiffImagePlugin.ImageFileDirectory_v2()
    with Image.open(source) as image:
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        for tag in RESOLUTION_TAGS:
            if tag in tags:
                kept[tag] = tags[tag]
        if tags.get(ORIENTATION, 1) in TURNED and all(tag in tags for tag in RESOLUTIONS):
            kept[RESOLUTIONS[0]], kept[RESOLUTIONS[1]] = (tags[tag] for tag in reversed(RESOLUTIONS))
        # ImageJ keeps the unit of the resolution here; other descriptions may name a patient.
        if str(tags.get(DESCRIPTION, "")).startswith("ImageJ="):
            lines = str(tags[DESCRIPTION]).splitlines()
            kept[DESCRIPTION] = "\n".join(line for line in lines if line.startswith(("ImageJ=", "unit=")))
    return kept


def write_scan_mask(mask: Mask, stack: Stack, labels: Labels) -> Path:
    """(I, J, K) label values on the stack's grid.

    Raises:
        DataError: if the image's geometry cannot be written in the wanted format.
    """
    if isinstance(stack, NiftiStack):
        suffix = ".nii.gz" if mask.source.path.suffix.lower() == ".gz" else ".nii"
        path = mask.folder / f"{mask.source.name}{suffix}"
        return save(path, lambda: write_nifti(path, labels, stack.opened.header))
    assert isinstance(stack, DicomStack)
    if mask.to is ScanFormat.nifti:
        if stack.gaps:
            raise DataError(
                f"{mask.source.path}: the distance after slice {stack.gaps[0] + 1} is not that of the "
                "others, which NIfTI cannot hold: add the missing slices, or write DICOM segmentations."
            )
        path = mask.folder / f"{mask.source.name}.nii.gz"
        assert stack.grid is not None
        header = header_of(stack.grid)
        return save(path, lambda: write_nifti(path, labels, header))
    from client.dicom_segmentation import write_segmentation

    path = mask.folder / f"{mask.source.name}.dcm"
    return save(path, lambda: write_segmentation(path, stack, labels, mask.card))


def save(path: Path, write: Callable[[], object]) -> Path:
    """Call ``write``; half a mask, which would look like a whole one, is removed. Raises `UsageError`."""
    try:
        write()
    except OSError as error:
        path.unlink(missing_ok=True)
        raise UsageError(
            f"{path} cannot be written ({error.strerror or error}): free space or give another folder"
        ) from error
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path
