"""A student at work: masks for a folder of images, and its quality on a labelled manifest.

Both run at the hospital, on its own files; nothing here leaves it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor

from client.data import load_image, load_patients, resize
from client.evaluation import THRESHOLD, evaluate_patients, predict, release_metrics
from client.images import READERS, Raster, read_image
from client.manifest_rows import read_manifest
from client.patients import Split, of_split
from client.students import LoadedStudent, load_student
from common.errors import DataError, UsageError
from common.guard_api import Metric
from common.probability import masks_of
from common.recipe import ClassConfig, DataConfig, EvaluationConfig, PolicyConfig

OVERLAYS = "overlays"
OUTLINE_COLOURS = ((255, 64, 64), (64, 200, 255), (255, 210, 0), (90, 230, 90), (230, 110, 255))
EVALUATION_SEED = 0  # the same files and student give the same intervals

Labels = NDArray[np.uint8]


@dataclass(frozen=True)
class PredictionSummary:
    """What was written: one mask an image, in the order of the images' names."""

    masks: tuple[Path, ...]
    overlays: tuple[Path, ...]


def predict_folder(
    student: Path, images: Path, out: Path, threshold: float = THRESHOLD, overlay: bool = False
) -> PredictionSummary:
    """Segment every image of a folder; one 8-bit PNG each, of the image's own size, in ``out``.

    `label_image` says which label a pixel gets, 0 if no class has enough probability. A mask is
    named after its image (``a.jpg`` -> ``a.png``), or after the whole file name where two images share a
    stem. With ``overlay``, ``out/overlays`` has the images with the masks' outlines.

    Raises:
        UsageError: if ``out`` is the folder of the images, whose files the masks could replace.
        ArtefactError: if the student cannot be loaded.
        DataError: if there is no image; or, after all others are done, naming every file that failed.
    """
    loaded = load_student(student)
    files = _image_files(images)
    if out.resolve() == images.resolve():
        raise UsageError(f"masks would be written over the images in {images}: give another folder for them")
    names = _mask_names(files)
    _make_folder(out / OVERLAYS if overlay else out)
    masks, overlays, faults = [], [], []
    for path in files:
        try:
            raster = read_image(path)
            labels = _segment(loaded, path, raster, threshold)
        except DataError as error:
            faults.append(error.message)
            continue
        masks.append(_save(labels, out / names[path]))
        if overlay:
            drawn = _outlined(raster, labels, loaded.card.classes)
            overlays.append(_save(drawn, out / OVERLAYS / names[path]))
    if faults:
        text = f"{len(faults)} of {len(files)} images could not be segmented; the other masks are in {out}"
        raise DataError(text, faults)
    return PredictionSummary(tuple(masks), tuple(overlays))


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder of images: correct the path")
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in READERS)
    if not files:
        raise DataError(f"{folder} has no image: the files must end in one of {', '.join(READERS)}")
    return files


def _mask_names(files: list[Path]) -> dict[Path, str]:
    shared = max(Counter(path.stem.lower() for path in files).values()) > 1
    return {path: f"{path.name if shared else path.stem}.png" for path in files}


def _segment(student: LoadedStudent, path: Path, raster: Raster, threshold: float) -> Labels:
    """(H, W) label values in the size of the stored image."""
    data = student.card.data_config()
    sample = load_image(path, data)
    probability = predict(student.module, sample.image, data, EvaluationConfig().overlap) * sample.valid
    return label_image(resize(probability, *raster.pixels.shape[1:]), data, threshold)


def label_image(probability: Tensor, data: DataConfig, threshold: float) -> Labels:
    """(C, H, W) probabilities -> (H, W) label values, 0 where `masks_of` finds no class.

    Where it finds several, one label has to stand for them: that of the innermost class (the fewest label
    values: a medulla within its kidney), and among equals of the most probable.
    """
    found = masks_of(probability, data.exclusive, threshold)
    breadth = torch.tensor([len(item.values) for item in data.classes])[:, None, None]
    outer = found & (breadth > torch.where(found, breadth, breadth.max()).amin(0))
    _, index = torch.where(found & ~outer, probability, -1.0).max(dim=0)
    values = torch.tensor([item.label for item in data.classes], dtype=torch.uint8)
    labels: Labels = torch.where(found.any(0), values[index], 0).to(torch.uint8).numpy()
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


def _save(pixels: Labels, path: Path) -> Path:
    try:
        Image.fromarray(pixels).save(path)
    except OSError as error:
        path.unlink(missing_ok=True)  # half a mask would look like a whole one
        raise UsageError(
            f"{path} cannot be written ({error.strerror}): free space or give another folder"
        ) from error
    return path


def evaluate_manifest(student: Path, manifest: Path) -> list[Metric]:
    """Dice, HD95 and NSD of each class, means over patients with 95 % intervals.

    Measured on the test split of a manifest with a split column, else on every labelled patient. No cell
    is withheld, however small: the numbers stay with who owns the images. Distances are in mm where the
    manifest gives a spacing, in pixels of the student's image size elsewhere.

    Raises:
        ArtefactError: if the student cannot be loaded.
        DataError: if the manifest or its images have faults, or nothing in it is labelled.
    """
    loaded = load_student(student)
    listed = read_manifest(manifest)
    data = loaded.card.data_config()
    patients = load_patients(manifest, data, EVALUATION_SEED)
    if listed.has_splits:
        patients = of_split(patients, Split.test)
    if not any(patient.labelled for patient in patients):
        where = "in its test split" if listed.has_splits else "in it"
        raise DataError(f"{manifest} has no labelled image {where}: nothing can be measured")
    config = EvaluationConfig()
    values = evaluate_patients(loaded.module, patients, data, config)
    everything = PolicyConfig(min_cell_patients=1)
    return release_metrics(loaded.card.model, values, config, everything, EVALUATION_SEED)
