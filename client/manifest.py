"""Every fault of a manifest that can be found before training, and what its images are like.

The texts name lines, files and patients: they are for the site's own eyes.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from client.images import mask_labels, open_mask, open_stack
from client.manifest_rows import Fault, FaultKind, Manifest, ManifestRow, parse_manifest, read_manifest
from client.patients import Split
from client.splits import split_sizes
from client.stacks import Array, Stack
from common.errors import DataError
from common.recipe import ClassConfig

__all__ = [
    "Fault",
    "FaultKind",
    "Manifest",
    "ManifestCheck",
    "ManifestRow",
    "check_manifest",
    "describe_manifest",
    "read_manifest",
]

Found = TypeVar("Found")

INTENSITY_PERCENTILES = (0.5, 5.0, 50.0, 95.0, 99.7)


@dataclass(frozen=True)
class ManifestCheck:
    """What `check_manifest` found, in the order of the lines."""

    manifest: str
    images: int
    patients: int
    faults: tuple[Fault, ...]

    @property
    def errors(self) -> tuple[Fault, ...]:
        return tuple(fault for fault in self.faults if not fault.warning)

    @property
    def warnings(self) -> tuple[Fault, ...]:
        return tuple(fault for fault in self.faults if fault.warning)

    @property
    def ok(self) -> bool:
        """No error; warnings are allowed."""
        return not self.errors

    def to_json(self) -> dict[str, Any]:
        """Plain values: ``ok, manifest, images, patients, faults[]{kind, line, text, warning}``."""
        return {"ok": self.ok, **asdict(self)}


def check_manifest(path: Path, classes: Sequence[ClassConfig], min_patients: int) -> ManifestCheck:
    """Open every image and mask and list every fault; raises nothing for a fault.

    Errors: all but an empty mask, a copy within one patient and split, and a split column without a
    labelled test patient, which are warnings.
    """
    manifest, faults = parse_manifest(path)
    digests: dict[str, list[ManifestRow]] = defaultdict(list)
    for row in manifest.rows:
        found, digest = _check_row(row, classes)
        faults += found
        if digest:
            digests[digest].append(row)
    for rows in digests.values():
        faults += [_duplicate(rows[0], row) for row in rows[1:]]
    faults += _too_few(manifest, min_patients)
    faults.sort(key=lambda fault: fault.line)
    return ManifestCheck(str(path), len(manifest.rows), len(manifest.by_patient()), tuple(faults))


def describe_manifest(path: Path, classes: Sequence[ClassConfig]) -> dict[str, Any]:
    """Counts, sizes, spacings, groups, intensities (share of full scale) and foreground shares.

    ``intensity`` holds the median over images of each image's percentile; ``foreground_share`` is over
    all labelled pixels, None without any. Raises `DataError` as `read_manifest`, and for a file that
    cannot be read.
    """
    manifest = read_manifest(path)
    sizes: Counter[str] = Counter()
    spacings: Counter[str] = Counter()
    levels = []
    for row in manifest.rows:
        stack = open_stack(row.image)
        sizes["x".join(map(str, (*stack.size, *([stack.count] if stack.count > 1 else []))))] += 1
        spacings[_spacing_text(row.spacing_mm or stack.spacing_mm)] += 1
        for raster in stack.rasters():
            levels.append(np.nanpercentile(raster.pixels / raster.full_scale, INTENSITY_PERCENTILES))
    medians = np.median(levels, axis=0).tolist()
    percentiles = zip(INTENSITY_PERCENTILES, medians, strict=True)
    return {
        **_counts(manifest.rows),
        "splits": {
            name: _counts([row for row in manifest.rows if row.split == name])
            for name in Split
            if any(row.split == name for row in manifest.rows)
        },
        "sizes": dict(sizes),
        "spacing_mm": dict(spacings),
        "groups": dict(Counter(row.group or "none" for row in manifest.rows)),
        "intensity": {f"p{name:g}": round(level, 4) for name, level in percentiles},
        "foreground_share": _foreground_shares(manifest.rows, classes),
    }


def _counts(rows: Sequence[ManifestRow]) -> dict[str, int]:
    labelled = sum(row.mask is not None for row in rows)
    return {"patients": len({row.patient for row in rows}), "images": len(rows), "labelled": labelled}


def _spacing_text(spacing_mm: tuple[float, float] | None) -> str:
    return "x".join(f"{side:g}" for side in spacing_mm) if spacing_mm else "unknown"


def _foreground_shares(
    rows: Sequence[ManifestRow], classes: Sequence[ClassConfig]
) -> dict[str, float | None]:
    pixels, inside = 0, dict.fromkeys((item.name for item in classes), 0)
    for row in rows:
        if row.mask is None:
            continue
        mask = open_mask(row.mask, open_stack(row.image))
        for index in range(mask.count):
            labels = mask_labels(row.mask, mask, index)
            pixels += labels.size
            for item in classes:
                inside[item.name] += int(np.sum(np.isin(labels, item.values)))
    return {name: round(count / pixels, 5) if pixels else None for name, count in inside.items()}


def size_text(row: ManifestRow, image: Array, mask: Array) -> str:
    """What is wrong if a (C, H, W) image and its (H, W) mask differ in size, else nothing."""
    if image.shape[-2:] == mask.shape:
        return ""
    sizes = ["x".join(map(str, shape)) for shape in (image.shape[-2:], mask.shape)]
    return f"image {row.image.name} has {sizes[0]} rows x columns, its mask {sizes[1]}: export one size."


def label_text(path: Path, mask: Array, classes: Sequence[ClassConfig]) -> str:
    """What is wrong if an (H, W) mask has values that are neither 0 nor a class's label, else nothing."""
    known = {0.0, *(float(value) for item in classes for value in item.values)}
    unknown = [value for value in np.unique(mask[np.isfinite(mask)]).tolist() if value not in known]
    if not unknown:
        return ""
    shown = ", ".join(f"{value:g}" for value in unknown[:8]) + (" ..." if len(unknown) > 8 else "")
    declared = ", ".join(f"{'/'.join(map(str, item.values))} = {item.name}" for item in classes)
    text = f"mask {path.name} has undeclared labels {shown} (declared: 0, {declared})"
    return f"{text}: declare them in data.classes or correct the mask."


def _check_row(row: ManifestRow, classes: Sequence[ClassConfig]) -> tuple[list[Fault], str | None]:
    """The faults of one row's files, and a digest of the image's pixels if it could be decoded."""
    faults: list[Fault] = []
    image = _guarded(row.image, row.line, lambda: open_stack(row.image), faults)
    digest = (
        None if image is None else _guarded(row.image, row.line, lambda: _digest(row, image, faults), faults)
    )
    if row.mask is None:
        return faults, digest
    path = row.mask
    # Without its image a mask is still looked at, as a picture of its own.
    against = open_stack if image is None else lambda path: open_mask(path, image)
    mask = _guarded(path, row.line, lambda: against(path), faults)
    if mask is not None:
        _guarded(path, row.line, lambda: _check_mask(row, mask, image, classes, faults), faults)
    return faults, digest


def _digest(row: ManifestRow, image: Stack, faults: list[Fault]) -> str:
    """Of all slices; one slice that is not finite is a fault."""
    digests, finite = [], True
    for index in range(image.count):
        pixels = image.stored(index)
        finite = finite and bool(np.all(np.isfinite(pixels)))
        digests.append(_pixel_digest(pixels))
    if not finite:
        faults.append(_not_finite(row.image, row.line))
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _check_mask(
    row: ManifestRow, mask: Stack, image: Stack | None, classes: Sequence[ClassConfig], faults: list[Fault]
) -> None:
    assert row.mask is not None
    values, finite, text = np.zeros(0, np.float32), True, ""
    for index in range(mask.count):
        labels = mask_labels(row.mask, mask, index)
        finite = finite and bool(np.all(np.isfinite(labels)))
        values = np.union1d(values, labels)
        if image is not None and not text:
            text = size_text(row, np.empty((0, *image.size)), labels)
    if not finite:
        faults.append(_not_finite(row.mask, row.line))
    if text:
        faults.append(Fault(FaultKind.size_mismatch, row.line, text))
    if text := label_text(row.mask, values, classes):
        faults.append(Fault(FaultKind.undeclared_label, row.line, text))
    elif not values.any():
        text = f"mask {row.mask.name} is empty: right if nothing is there, else leave its cell empty."
        faults.append(Fault(FaultKind.empty_mask, row.line, text, warning=True))


def _guarded(path: Path, line: int, read: Callable[[], Found], faults: list[Fault]) -> Found | None:
    """What ``read`` gives, or None; what is wrong with the file is appended to ``faults``."""
    try:
        return read()
    except DataError as error:
        kind = FaultKind.unreadable_file if path.exists() else FaultKind.missing_file
        faults.append(Fault(kind, line, error.message))
        return None


def _not_finite(path: Path, line: int) -> Fault:
    text = f"{path} holds NaN or infinite values: replace them or leave the row out."
    return Fault(FaultKind.not_finite, line, text)


def _pixel_digest(pixels: Array) -> str:
    """The same for the same decoded numbers, whatever the file format, grey or three equal channels."""
    data = np.ascontiguousarray(pixels[:1] if np.all(pixels == pixels[:1]) else pixels, dtype=np.float32)
    return hashlib.sha256(repr(data.shape).encode() + data.tobytes()).hexdigest()


def _duplicate(first: ManifestRow, copy: ManifestRow) -> Fault:
    apart = ["of another patient"] * (copy.patient != first.patient)
    apart += ["in another split"] * (copy.split != first.split)
    text = f"{copy.image.name} has the same pixels as line {first.line}"
    fix = f", {' and '.join(apart)}: keep one of the two." if apart else ": it counts twice in training."
    return Fault(FaultKind.duplicate_pixels, copy.line, text + fix, warning=not apart)


def _too_few(manifest: Manifest, min_patients: int) -> list[Fault]:
    if manifest.has_splits:
        train = len(manifest.labelled_patients(Split.train))
        test = len(manifest.labelled_patients(Split.test))
    else:
        train, _, test = split_sizes(len(manifest.labelled_patients()))
    faults = []
    if train < min_patients:
        text = f"{train} labelled training patients, at least {min_patients} are needed (data.min_patients)."
        faults.append(Fault(FaultKind.too_few_patients, 0, text))
    if not test:
        text = "no labelled test patient: nothing can be evaluated here."
        faults.append(Fault(FaultKind.too_few_patients, 0, text, warning=manifest.has_splits))
    return faults
