"""Tiled prediction, per-patient values, and what of them may be shown."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from client.evaluation import evaluate_patients, foreground, predict, release_metrics
from client.patients import Patient, Sample, Split
from common.guard_api import Metric
from common.metrics import bootstrap_ci
from common.recipe import ClassConfig, DataConfig, EvaluationConfig, PolicyConfig
from common.seeding import derive_seed

CLASSES = [ClassConfig("red", 1), ClassConfig("green", 2)]
DATA = DataConfig(image_size=8, classes=CLASSES)
CONFIG = EvaluationConfig(nsd_tolerance=1.0, bootstrap=200, overlap=0.25)


def colour_logits(tiles: Tensor) -> Tensor:
    """A model that calls a pixel red or green by its first two channels, pixel by pixel."""
    return 20 * (tiles[:, :2] - 0.5)


def image_of(mask: Tensor) -> Tensor:
    """(3, H, W): an image from which `colour_logits` reads ``mask`` (2, H, W) off exactly."""
    return torch.cat([mask.float(), torch.zeros(1, *mask.shape[1:])])


def patient(name: str, *samples: Sample) -> Patient:
    return Patient(name, Split.test, samples)


def sample(shown: Tensor, truth: Tensor | None, spacing: tuple[float, float] | None = None) -> Sample:
    valid = torch.ones(shown.shape[1:], dtype=torch.bool)
    return Sample(image_of(shown), None if truth is None else truth.to(torch.uint8), valid, spacing)


def squares(*boxes: tuple[int, int, int] | None, side: int = 12) -> Tensor:
    """(C, side, side) bool: one square a class, given by row, column and size; None for an empty plane."""
    planes = torch.zeros(len(boxes), side, side, dtype=torch.bool)
    for plane, box in zip(planes, boxes, strict=True):
        if box:
            row, column, size = box
            plane[row : row + size, column : column + size] = True
    return planes


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 40), width=st.integers(1, 40), size=st.sampled_from([8, 16]),
    overlap=st.sampled_from([0.0, 0.25, 0.5]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_tiling_does_not_change_what_a_pixelwise_model_says(
    height: int, width: int, size: int, overlap: float, seed: int
) -> None:
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))
    shapes = []

    def forward(tiles: Tensor) -> Tensor:
        shapes.append(tuple(tiles.shape[1:]))
        return colour_logits(tiles)

    probabilities = predict(forward, image, DataConfig(image_size=size), overlap)
    assert probabilities.shape == (2, height, width)
    assert torch.allclose(probabilities, colour_logits(image[None])[0].sigmoid(), atol=1e-5)
    assert set(shapes) == {(3, size, size)}


@pytest.mark.parametrize("shape", [(5, 7), (1, 3), (8, 2), (3, 20)])
def test_small_images_are_padded_by_reflection(shape: tuple[int, int]) -> None:
    image = torch.rand(3, *shape)
    tiles = []

    def forward(batch: Tensor) -> Tensor:
        tiles.extend(batch)
        return batch[:, :1]

    predict(forward, image, DATA, 0.0)
    missing = [max(0, 8 - side) for side in shape]
    edges = [(0, 0), *((gap // 2, gap - gap // 2) for gap in missing)]
    expected = np.pad(image.numpy(), edges, mode="reflect")
    assert np.array_equal(tiles[0].numpy(), expected[:, :8, :8])


def test_overlapping_tiles_blend_probabilities() -> None:
    """Two tiles that disagree: around the middle the mean is that of the probabilities, not of the logits."""
    logits = {0.0: 5.0, 1.0: -1.0}
    image = torch.zeros(3, 16, 24)
    image[:, :, 23] = 1.0  # only the right tile sees this column

    def forward(tiles: Tensor) -> Tensor:
        values = [logits[float(tile.max())] for tile in tiles]
        return torch.tensor(values)[:, None, None, None].expand(-1, 1, 16, 16).clone()

    row = predict(forward, image, DataConfig(image_size=16), 0.5)[0, 5]
    left, right = (1 / (1 + math.exp(-value)) for value in (5.0, -1.0))
    assert torch.allclose(row[:8], torch.tensor(left))
    assert torch.allclose(row[16:], torch.tensor(right))
    # Columns 11 and 12 mirror each other: their weights swap, so that together they weigh both tiles alike.
    assert float(row[11:13].mean()) == pytest.approx((left + right) / 2, abs=1e-5)
    assert (row[8:16].diff() < 0).all()


def test_prediction_takes_no_gradient() -> None:
    seen = []
    weight = torch.ones(1, requires_grad=True)

    def forward(tiles: Tensor) -> Tensor:
        seen.append(torch.is_inference_mode_enabled())
        return weight * tiles[:, :1]

    assert not predict(forward, torch.rand(3, 8, 8), DATA, 0.25).requires_grad
    assert seen == [True]


def test_nothing_is_found_outside_the_field_of_view() -> None:
    valid = squares((2, 2, 6))[0]
    shown = Sample(torch.ones(3, 12, 12), valid[None].to(torch.uint8), valid)
    assert torch.equal(foreground(lambda tiles: tiles[:, :1] * 9, shown, DATA, 0.25), valid[None])
    values = evaluate_patients(
        lambda tiles: tiles[:, :1] * 9, [patient("p", shown)], replace(DATA, classes=CLASSES[:1]), CONFIG
    )
    assert values["dice"]["red"].tolist() == [1.0]


def test_patient_values_by_hand() -> None:
    there, shifted = squares((2, 2, 4), (6, 6, 2)), squares((2, 4, 4), None)
    patients = [
        patient("right", sample(there, there), sample(there, there)),
        # Red: 8 of 16 pixels overlap, in the first image; right in the second. Green: missed once.
        patient("half", sample(shifted, there), sample(there, there)),
        patient("unlabelled", sample(there, None)),
        patient("partly labelled", sample(there, there), sample(shifted, None)),
        patient("nothing there", sample(squares(None, None), squares(None, None))),
    ]
    values = evaluate_patients(colour_logits, patients, DATA, CONFIG)
    assert {metric: list(columns) for metric, columns in values.items()} == {
        "dice": ["red", "green"], "hd95": ["red", "green"], "nsd": ["red", "green"],
    }  # fmt: skip
    assert values["dice"]["red"] == pytest.approx([1.0, 0.75, 1.0, 1.0])
    assert values["dice"]["green"] == pytest.approx([1.0, 0.5, 1.0, 1.0])
    assert values["nsd"]["green"] == pytest.approx([1.0, 0.5, 1.0, 1.0])
    # HD95: a shift by two columns, 95th percentile 2, mean with the second image's 0; undefined where empty.
    assert values["hd95"]["red"] == pytest.approx([0.0, 1.0, 0.0, math.nan], nan_ok=True)
    assert values["hd95"]["green"] == pytest.approx([0.0, 0.0, 0.0, math.nan], nan_ok=True)


def test_distances_are_in_mm_where_spacing_is_known() -> None:
    there, shifted = squares((2, 2, 4), None), squares((2, 4, 4), None)
    known = patient("known", sample(shifted, there, spacing=(3.0, 0.25)))
    unknown = patient("unknown", sample(shifted, there))
    values = evaluate_patients(colour_logits, [known, unknown], DATA, CONFIG)
    assert values["hd95"]["red"] == pytest.approx([0.5, 2.0])
    assert values["nsd"]["red"][0] == 1.0  # every edge within 1 mm
    assert values["nsd"]["red"][1] < 1.0


def test_no_patient_gives_empty_columns() -> None:
    values = evaluate_patients(colour_logits, [], DATA, CONFIG)
    assert all(column.shape == (0,) for columns in values.values() for column in columns.values())
    released = release_metrics("student", values, CONFIG, PolicyConfig(min_cell_patients=0), 1)
    assert {(cell.value, cell.patients) for cell in released} == {(None, 0)}


def columns(count: int, undefined: int = 0) -> dict[str, dict[str, np.ndarray]]:
    values = np.linspace(0.2, 0.9, count)
    return {"dice": {"red": values}, "hd95": {"red": np.append(values, [np.nan] * undefined)}}


def test_released_metrics_are_means_with_intervals() -> None:
    values = columns(8, undefined=3)
    dice, hd95 = release_metrics("student", values, CONFIG, PolicyConfig(min_cell_patients=5), seed=9)
    interval = bootstrap_ci(values["dice"]["red"], 200, derive_seed(9, "bootstrap", "dice", "red"))
    assert dice == Metric("student", "dice", "red", pytest.approx(0.55), interval, 8)
    assert (hd95.value, hd95.patients) == (pytest.approx(0.55), 8)
    assert "3" in hd95.reason
    assert interval[0] < 0.55 < interval[1]


def test_small_cells_are_suppressed() -> None:
    """Below the policy's minimum neither the value nor the exact number of patients is shown."""
    policy = PolicyConfig(min_cell_patients=5)
    for count in range(5):
        for cell in release_metrics("student", columns(count, undefined=7), CONFIG, policy, seed=1):
            assert (cell.value, cell.ci95, cell.patients) == (None, None, 0)
            assert cell.reason == "fewer than 5 patients with a value"
    assert all(cell.value is not None for cell in release_metrics("s", columns(5), CONFIG, policy, seed=1))


def test_models_are_compared_on_the_same_draws_of_patients() -> None:
    policy = PolicyConfig(min_cell_patients=2)
    first = release_metrics("student", columns(9), CONFIG, policy, seed=3)
    second = release_metrics("local_only", columns(9), CONFIG, policy, seed=3)
    assert [cell.ci95 for cell in first] == [cell.ci95 for cell in second]
    assert [cell.model for cell in second] == ["local_only"] * 2
    assert [cell.ci95 for cell in first] != [
        cell.ci95 for cell in release_metrics("student", columns(9), CONFIG, policy, seed=4)
    ]
