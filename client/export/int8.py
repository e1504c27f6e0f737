"""Static int8 ONNX: weights and activations as whole numbers, their ranges from the hospital's own images.

Quantise and dequantise nodes stand around every convolution (Jacob et al. 2018); normalisations stay in
float. The ranges are numbers computed from images: who hands the file on releases them too, without noise.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.data import sample_of
from client.evaluation import predict
from client.export.embedded import INPUT
from client.export.onnx_file import OnnxNetwork, export_onnx, put_card
from client.manifest_rows import read_manifest
from client.patients import Sample, Split
from client.sources import Source, find_sources, source_of
from client.students import LoadedStudent
from common.errors import DataError
from common.probability import masks_of
from common.recipe import DataConfig, EvaluationConfig

MOST_IMAGES = 64  # to calibrate on, and as many again to measure the loss on
TILES_PER_IMAGE = 4
CONVOLUTIONS = ["Conv", "ConvTranspose"]


@dataclass(frozen=True)
class Int8Loss:
    """What int8 changes, on ``images`` that the ranges were not taken from where there was more than one.

    Attributes:
        dice: of the int8 masks against the float masks, mean over images and classes; 1 is no change.
        largest_probability: the largest change of a pixel's probability.
        mean_probability: the mean change.
    """

    images: int
    calibrated_on: int
    dice: float
    largest_probability: float
    mean_probability: float


class _Tiles:
    """onnxruntime's calibration reader: one tile at a time."""

    def __init__(self, tiles: Sequence[NDArray[np.float32]]) -> None:
        self.left = iter(tiles)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        tile = next(self.left, None)
        return None if tile is None else {INPUT: tile}


def export_int8(student: LoadedStudent, path: Path, images: Path) -> Int8Loss:
    """Write ``path``, calibrated on ``images``: a manifest (its training split) or a folder.

    Raises:
        DataError: if there is no image, or one cannot be read.
        ArtefactError: if not even the float file is the student.
    """
    samples = calibration_samples(images, student.card.data_config())
    calibration, held_out = samples[::2], samples[1::2] or samples
    tiles = [tile for sample in calibration for tile in _tiles_of(student, sample)]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole, prepared = Path(folder) / "float.onnx", Path(folder) / "prepared.onnx"
        export_onnx(student, whole)
        _quantise(whole, prepared, path, tiles)
    put_card(path, student.card, "onnx-int8")
    return _loss(student, OnnxNetwork(path), held_out, len(calibration))


def calibration_samples(images: Path, data: DataConfig) -> list[Sample]:
    """At most twice `MOST_IMAGES`, spread evenly over the slices of all images, masks not looked at."""
    sources = _sources(images)
    places = [(source, index) for source in sources for index in range(source.open().count)]
    step = max(1, -(-len(places) // (2 * MOST_IMAGES)))
    found, faults = [], []
    for source, index in places[::step]:
        try:
            found.append(sample_of(source.open().raster(index), source.path, data))
        except DataError as error:
            faults.append(error.message)
    if faults:
        raise DataError(f"{len(faults)} images for the calibration cannot be used", faults)
    return found


def _sources(images: Path) -> list[Source]:
    if images.suffix.lower() != ".csv":
        return find_sources(images)[0]
    listed = read_manifest(images)
    train = [row for row in listed.rows if row.split in (None, Split.train)]
    if not train:
        raise DataError(f"{images} has no training image: give images to calibrate on")
    return [source_of(row.image) for row in train]


def _tiles_of(student: LoadedStudent, sample: Sample) -> list[NDArray[np.float32]]:
    """Tiles (1, 3, S, S) that a prediction of the image looks at, spread evenly."""
    seen: list[Tensor] = []

    def record(tiles: Tensor) -> Tensor:
        seen.append(tiles.clone())
        logits: Tensor = student.module(tiles)
        return logits

    predict(record, sample.image, student.card.data_config(), EvaluationConfig().overlap)
    tiles = torch.cat(seen)
    step = max(1, len(tiles) // TILES_PER_IMAGE)
    return [tile[None].numpy() for tile in tiles[::step][:TILES_PER_IMAGE]]


def _quantise(whole: Path, prepared: Path, path: Path, tiles: list[NDArray[np.float32]]) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    reader: Any = _Tiles(tiles)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy types in onnxruntime's own code; the loss is measured
        # Its symbolic shapes need no help here, and it would print of its progress.
        quant_pre_process(str(whole), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared), str(path), reader,
            quant_format=QuantFormat.QDQ, op_types_to_quantize=CONVOLUTIONS, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip


def _loss(
    student: LoadedStudent, network: OnnxNetwork, samples: Sequence[Sample], calibrated_on: int
) -> Int8Loss:
    data, overlap = student.card.data_config(), EvaluationConfig().overlap
    scores, largest, means = [], 0.0, []
    for sample in samples:
        before, after = (predict(run, sample.image, data, overlap) for run in (student.module, network))
        change = (before - after).abs()
        largest, means = max(largest, float(change.max())), [*means, float(change.mean())]
        one, other = (masks_of(found, data.exclusive) & sample.valid for found in (before, after))
        scores += [_dice(a, b) for a, b in zip(one, other, strict=True)]
    return Int8Loss(len(samples), calibrated_on, float(np.mean(scores)), largest, float(np.mean(means)))


def _dice(one: Tensor, other: Tensor) -> float:
    """1 where both are empty: nothing changed."""
    both = float(one.sum() + other.sum())
    return 2 * float((one & other).sum()) / both if both else 1.0
