"""From a manifest to patients in memory: read, resize, find the field of view, stretch.

The steps are MONAI dictionary transforms (they compose with MONAI's own); a record has the keys
``image``, ``mask``, ``valid`` and ``spacing_mm``. A volume becomes one image a slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import Transform

from client.images import mask_labels, open_mask, open_stack
from client.manifest import label_text, size_text
from client.manifest_rows import Manifest, ManifestRow, read_manifest
from client.patients import Patient, Sample, Split
from client.pixels import field_of_view, percentile_stretch, resize
from client.splits import assign_splits
from client.stacks import Raster
from common.errors import DataError
from common.probability import masks_of
from common.recipe import ClassConfig, DataConfig

Record = dict[str, Any]


def load_patients(manifest: Path, data: DataConfig, seed: int) -> list[Patient]:
    """Every patient of a manifest, in its order. Without a split column patients are dealt by ``seed``.

    Raises `DataError` with the faults of all rows at once: what `read_manifest` finds, unreadable files,
    NaN, sizes that differ, undeclared labels; and if a split has to be made of fewer than two labelled
    patients. The texts name lines and stay at the site.
    """
    listed = read_manifest(manifest)
    splits = _splits(listed, seed)
    steps = _steps(data)
    faults: list[str] = []
    patients = []
    for patient, rows in listed.by_patient().items():
        samples = []
        for row in rows:
            try:
                samples += [_apply(steps, record) for record in _slices(row)]
            except DataError as error:
                faults.append(f"line {row.line}: {error.message}")
        patients.append(Patient(patient, splits[patient], tuple(samples)))
    if faults:
        raise DataError(f"{manifest} lists images that cannot be used:", faults)
    return patients


def load_image(path: Path, data: DataConfig) -> Sample:
    """The one slice of an image without a mask, as `load_patients` would read it. Raises `DataError`."""
    stack = open_stack(path)
    if stack.count != 1:
        raise DataError(f"{path} has {stack.count} slices: one is wanted here.")
    return sample_of(stack.raster(0), path, data)


def sample_of(raster: Raster, path: Path, data: DataConfig) -> Sample:
    """A decoded slice of ``path`` as the models see it. Raises `DataError` if it has no finite numbers."""
    row = ManifestRow(line=0, image=path, mask=None, patient="")
    return _apply(_steps(data), {"row": row, "raster": raster, "labels": None, "spacing_mm": None})


class ChannelsAndClassesd(Transform):  # type: ignore[misc]
    """``raster`` -> ``image`` (1 or 3, H, W) float32 with full scale 1, ``labels`` -> ``mask`` (C, H, W).

    A picture whose channels are equal becomes one channel: what is grey then stays exactly grey.
    """

    def __init__(self, classes: list[ClassConfig]) -> None:
        self.classes = classes

    def __call__(self, data: Record) -> Record:
        row: ManifestRow = data["row"]
        raster: Raster = data["raster"]
        if not np.all(np.isfinite(raster.pixels)):
            raise DataError(
                f"{row.image.name} holds NaN or infinite values: replace them or leave the row out."
            )
        grey = np.all(raster.pixels == raster.pixels[:1])
        image = torch.from_numpy(
            (raster.pixels[:1] if grey else raster.pixels) / np.float32(raster.full_scale)
        )
        mask = None
        if row.mask is not None:
            labels = data["labels"]
            if not np.all(np.isfinite(labels)):
                raise DataError(f"{row.mask.name} holds NaN or infinite values: correct the mask.")
            if text := size_text(row, raster.pixels, labels) or label_text(row.mask, labels, self.classes):
                raise DataError(text)
            mask = torch.from_numpy(np.stack([np.isin(labels, item.values) for item in self.classes])).to(
                torch.uint8
            )
        return {**data, "image": image, "mask": mask}


class LongestSided(Transform):  # type: ignore[misc]
    """Resize to a longest side in pixels; a mask keeps a pixel that is at least half covered.

    Of classes that exclude each other a pixel keeps the one that covers most of it, if no less of it is
    covered by that class than by none.
    """

    def __init__(self, longest_side: int, exclusive: bool) -> None:
        self.longest_side, self.exclusive = longest_side, exclusive

    def __call__(self, data: Record) -> Record:
        image, mask, spacing = data["image"], data["mask"], data["spacing_mm"]
        stored_height, stored_width = image.shape[1:]
        scale = self.longest_side / max(stored_height, stored_width)
        height, width = max(1, round(stored_height * scale)), max(1, round(stored_width * scale))
        if (height, width) == (stored_height, stored_width):
            return data
        if mask is not None:
            mask = masks_of(resize(mask.float(), height, width), self.exclusive).to(torch.uint8)
        if spacing is not None:
            spacing = (spacing[0] * stored_height / height, spacing[1] * stored_width / width)
        return {**data, "image": resize(image, height, width), "mask": mask, "spacing_mm": spacing}


class ValidPixelsd(Transform):  # type: ignore[misc]
    """Add ``valid`` (H, W) bool: the field of view if there is one to find, else every pixel."""

    def __init__(self, find_field: bool) -> None:
        self.find_field = find_field

    def __call__(self, data: Record) -> Record:
        image = data["image"]
        valid = field_of_view(image) if self.find_field else torch.ones(image.shape[1:], dtype=torch.bool)
        return {**data, "valid": valid}


class StretchPercentilesd(Transform):  # type: ignore[misc]
    """`percentile_stretch` of ``image`` over ``valid``, and three channels."""

    def __call__(self, data: Record) -> Record:
        stretched = percentile_stretch(data["image"], data["valid"])
        return {**data, "image": stretched.expand(3, -1, -1).contiguous()}


def _steps(data: DataConfig) -> list[Transform]:
    resizing = [LongestSided(data.longest_side, data.exclusive)] if data.longest_side else []
    find_field, classes = ValidPixelsd(data.field_of_view), ChannelsAndClassesd(data.classes)
    return [classes, *resizing, find_field, StretchPercentilesd()]


def _slices(row: ManifestRow) -> Iterator[Record]:
    """A record a slice; a spacing that the manifest does not give is the file's own, where it has one."""
    image = open_stack(row.image)
    mask = None if row.mask is None else open_mask(row.mask, image)
    for index in range(image.count):
        yield {
            "row": row,
            "raster": image.raster(index),
            "labels": None if row.mask is None or mask is None else mask_labels(row.mask, mask, index),
            "spacing_mm": row.spacing_mm or image.spacing_mm,
        }


def _apply(steps: list[Transform], record: Record) -> Sample:
    # Not MONAI's Compose: it wraps errors in RuntimeError and logs statistics of the failing image.
    for step in steps:
        record = step(record)
    group = record["row"].group
    return Sample(record["image"], record["mask"], record["valid"], record["spacing_mm"], group)


def _splits(manifest: Manifest, seed: int) -> dict[str, Split]:
    by_patient = manifest.by_patient()
    if manifest.has_splits:
        return {patient: rows[0].split for patient, rows in by_patient.items() if rows[0].split is not None}
    labelled = manifest.labelled_patients()
    return assign_splits(labelled, sorted(set(by_patient) - set(labelled)), seed)
