"""A student at work: masks for a folder of images, and its quality on a labelled manifest.

Both run at the hospital, on its own files; nothing here leaves it. A student may come in any format that
`client.export` writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor

from client.data import load_patients, sample_of
from client.evaluation import THRESHOLD, evaluate_patients, predict, release_metrics
from client.export.loading import load_runnable
from client.export.model_card import measured_metrics
from client.manifest_rows import read_manifest
from client.mask_files import Mask, ScanFormat, label_volume, save, write_picture_mask, write_scan_mask
from client.nifti import axis_name
from client.patients import Split, of_split
from client.pixels import label_map, resize
from client.sources import Kind, find_sources
from client.stacks import Raster, Stack
from client.students import LoadedStudent
from common import progress
from common.errors import DataError, UsageError
from common.guard_api import Metric
from common.metrics import FloatArray
from common.recipe import ClassConfig, DataConfig, EvaluationConfig, PolicyConfig

OVERLAYS = "overlays"
OUTLINE_COLOURS = ((255, 64, 64), (64, 200, 255), (255, 210, 0), (90, 230, 90), (230, 110, 255))
EVALUATION_SEED = 0  # the same files and student give the same intervals
EIGHTHS = 8  # how finely the progress of one volume is shown

Labels = NDArray[np.uint8]


@dataclass(frozen=True)
class PredictionOptions:
    """``slice_axis``: of NIfTI volumes, 0, 1 or 2; None: along their thickest voxels."""

    threshold: float = THRESHOLD
    overlay: bool = False
    slice_axis: int | None = None
    to: ScanFormat = ScanFormat.dicom_seg


@dataclass(frozen=True)
class Cut:
    """How a volume was cut: along which axis of its file, and what its slices are called."""

    mask: Path
    slices: int
    axis: int
    shown: str


@dataclass(frozen=True)
class PredictionSummary:
    """What was written: one mask an image, pictures first, then scans, by name; and what went wrong."""

    masks: tuple[Path, ...]
    overlays: tuple[Path, ...]
    cuts: tuple[Cut, ...] = ()
    faults: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "masks": [str(path) for path in self.masks],
            "overlays": [str(path) for path in self.overlays],
            "scans": [asdict(cut) | {"mask": str(cut.mask)} for cut in self.cuts],
            "failed": list(self.faults),
        }


class SomeFailed(DataError):
    """Images that could not be segmented; ``summary`` is of the others."""

    def __init__(self, message: str, summary: PredictionSummary) -> None:
        super().__init__(message, summary.faults)
        self.summary = summary


@dataclass
class _Written:
    masks: list[Path] = field(default_factory=list)
    overlays: list[Path] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def summary(self) -> PredictionSummary:
        return PredictionSummary(
            tuple(self.masks), tuple(self.overlays), tuple(self.cuts), tuple(self.faults)
        )


def predict_folder(
    student: Path, images: Path, out: Path, options: PredictionOptions | None = None
) -> PredictionSummary:
    """Segment every image of a folder; one mask each, in the image's own geometry, in ``out``.

    Pictures (PNG, JPEG, TIFF), NIfTI files of two or three dimensions and DICOM files and series are read;
    see `client.mask_files` for what their masks are. `label_image` says which label a pixel gets, 0 if no
    class has enough probability. A mask is named after its image (``a.jpg`` -> ``a.png``), or after the
    whole file name where two images share a stem, or after the folder of its series. With
    ``options.overlay``, ``out/overlays`` has the images, slice by slice, with the masks' outlines.

    A volume is worked through slice by slice: memory does not grow with it, but for a DICOM segmentation,
    which is made in memory (a byte a voxel and class).

    Raises:
        UsageError: if ``out`` is the folder of the images, whose files the masks could replace.
        ArtefactError: if the student cannot be loaded.
        DataError: if there is no image; or, after all others are done, naming every file that failed.
    """
    options = options or PredictionOptions()
    loaded = load_runnable(student)
    sources, faults = find_sources(images)
    if out.resolve() == images.resolve():
        raise UsageError(f"masks would be written over the images in {images}: give another folder for them")
    _make_folder(out / OVERLAYS if options.overlay else out)
    written = _Written(faults=faults)
    progress.stage("segmenting", len(sources))
    for source in sources:
        try:
            stack = source.open(options.slice_axis)
            if source.kind is Kind.picture:
                _segment_picture(loaded, Mask(source, out, loaded.card), stack, options, written)
            else:
                _segment_scan(loaded, Mask(source, out, loaded.card, options.to), stack, options, written)
        except DataError as error:
            written.faults.append(error.message)
    progress.end()
    summary = written.summary()
    if summary.faults:
        failed, all_images = len(summary.faults), len(summary.faults) + len(summary.masks)
        text = f"{failed} of {all_images} images could not be segmented; the other masks are in {out}"
        raise SomeFailed(text, summary)
    return summary


def _segment_picture(
    student: LoadedStudent, mask: Mask, stack: Stack, options: PredictionOptions, written: _Written
) -> None:
    raster = stack.raster(0)
    labels = segment(student, mask.source.path, raster, options.threshold)
    written.masks.append(write_picture_mask(mask, labels))
    if options.overlay:
        written.overlays.append(_overlay(mask, student, raster, labels, ""))
    progress.step(mask.source.name)


def _segment_scan(
    student: LoadedStudent, mask: Mask, stack: Stack, options: PredictionOptions, written: _Written
) -> None:
    assert stack.view is not None
    assert stack.grid is not None
    volume = label_volume(stack)
    overlays = []
    with _volume_progress(mask.source.name, stack.count) as step:
        for index in range(stack.count):
            raster = stack.raster(index)
            labels = segment(student, mask.source.path, raster, options.threshold)
            stack.view.picture(volume, index)[...] = labels
            if options.overlay:
                overlays.append(_overlay(mask, student, raster, labels, f"-{index:04d}"))
            step(index)
    written.masks.append(write_scan_mask(mask, stack, volume))
    written.overlays.extend(overlays)
    axis = stack.view.axis
    written.cuts.append(Cut(written.masks[-1], stack.count, axis, axis_name(stack.grid, axis)))


@contextmanager
def _volume_progress(name: str, count: int) -> Iterator[Any]:
    """A stage of its own for a volume of many slices, a step for a single one."""
    if count < EIGHTHS:
        yield lambda index: progress.step(name) if index == count - 1 else None
        return
    progress.stage(f"segmenting {name}", EIGHTHS)

    def step(index: int) -> None:
        for _ in range((index + 1) * EIGHTHS // count - index * EIGHTHS // count):
            progress.step(f"{index + 1} of {count} slices")

    yield step


def segment(student: LoadedStudent, path: Path, raster: Raster, threshold: float) -> Labels:
    """(H, W) label values in the size of the stored slice; ``path`` for messages. Raises `DataError`."""
    data = student.card.data_config()
    sample = sample_of(raster, path, data)
    probability = predict(student.module, sample.image, data, EvaluationConfig().overlap) * sample.valid
    return label_image(resize(probability, *raster.pixels.shape[1:]), data, threshold)


def label_image(probability: Tensor, data: DataConfig, threshold: float) -> Labels:
    """(C, H, W) probabilities -> (H, W) label values, 0 where `masks_of` finds no class.

    Where it finds several, one label has to stand for them: that of the innermost class (the fewest label
    values: a medulla within its kidney), and among equals of the most probable.
    """
    values = [item.values for item in data.classes]
    chosen = label_map(probability, values, [item.label for item in data.classes], data.exclusive, threshold)
    labels: Labels = chosen.numpy()
    return labels


def _outlined(raster: Raster, labels: Labels, classes: list[ClassConfig]) -> Labels:
    """(H, W, 3): the stored image, with the inner edge of each class in its colour."""
    grey_or_colour = np.clip(raster.pixels / raster.full_scale, 0, 1)
    pixels = np.broadcast_to(grey_or_colour, (3, *labels.shape)).transpose(1, 2, 0)
    drawn: Labels = (pixels * 255).round().astype(np.uint8)
    for number, item in enumerate(classes):
        mask = np.isin(labels, item.values)
        drawn[mask & ~ndimage.binary_erosion(mask)] = OUTLINE_COLOURS[number % len(OUTLINE_COLOURS)]
    return drawn


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made ({error.strerror}): give another folder") from error


def _overlay(mask: Mask, student: LoadedStudent, raster: Raster, labels: Labels, number: str) -> Path:
    path = mask.folder / OVERLAYS / f"{mask.source.name}{number}.png"
    drawn = _outlined(raster, labels, student.card.classes)
    return save(path, lambda: Image.fromarray(drawn).save(path))


def evaluate_manifest(student: Path, manifest: Path) -> list[Metric]:
    """Dice, HD95 and NSD of each class, means over patients with 95 % intervals.

    Measured on the test split of a manifest with a split column, else on every labelled patient. No cell
    is withheld, however small: the numbers stay with who owns the images. Distances are in mm where the
    manifest gives a spacing, in pixels of the student's image size elsewhere.

    Raises:
        ArtefactError: if the student cannot be loaded.
        DataError: if the manifest or its images have faults, or nothing in it is labelled.
    """
    loaded = load_runnable(student)
    values = _measured(loaded, manifest)
    everything = PolicyConfig(min_cell_patients=1)
    return release_metrics(loaded.card.model, values, EvaluationConfig(), everything, EVALUATION_SEED)


def measured_for_card(student: Path, manifest: Path) -> dict[str, Any]:
    """The ``metrics`` of a model card, which may leave the site: small cells are withheld as in any release.

    Raises as `evaluate_manifest`.
    """
    loaded = load_runnable(student)
    values = _measured(loaded, manifest)
    released = release_metrics(loaded.card.model, values, EvaluationConfig(), PolicyConfig(), EVALUATION_SEED)
    return {"metrics": measured_metrics(released)}


def _measured(student: LoadedStudent, manifest: Path) -> dict[str, dict[str, FloatArray]]:
    listed = read_manifest(manifest)
    data = student.card.data_config()
    patients = load_patients(manifest, data, EVALUATION_SEED)
    if listed.has_splits:
        patients = of_split(patients, Split.test)
    if not any(patient.labelled for patient in patients):
        where = "in its test split" if listed.has_splits else "in it"
        raise DataError(f"{manifest} has no labelled image {where}: nothing can be measured")
    return evaluate_patients(student.module, patients, data, EvaluationConfig())
