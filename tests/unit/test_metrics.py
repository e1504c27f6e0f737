"""Metrics against hand-computed values and a brute-force oracle."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from torch import Tensor

from common.metrics import CaseMetrics, MetricSum, bootstrap_ci, case_metrics, patient_value


def mask(*rows: str) -> Tensor:
    return torch.tensor([[[symbol == "#" for symbol in row] for row in rows]])


EMPTY = mask("....", "....", "....")
DOT = mask("#...", "....", "....")
FAR_DOT = mask("...#", "....", "....")
LOW_DOT = mask("....", "....", "#...")
PAIR = mask("##..", "....", "....")
SQUARE = mask("###.", "###.", "###.")
FULL = mask("####", "####", "####")

# prediction, truth, spacing, tolerance -> dice, hd95, nsd; worked out by hand
HAND_COMPUTED = {
    "both empty": (EMPTY, EMPTY, None, 1.0, (1.0, None, 1.0)),
    "nothing found": (EMPTY, DOT, None, 1.0, (0.0, None, 0.0)),
    "nothing there": (DOT, EMPTY, None, 9.0, (0.0, None, 0.0)),
    "equal": (SQUARE, SQUARE, None, 0.0, (1.0, 0.0, 1.0)),
    "equal, touching every border": (FULL, FULL, None, 0.0, (1.0, 0.0, 1.0)),
    "three columns apart": (DOT, FAR_DOT, None, 2.9, (0.0, 3.0, 0.0)),
    "three columns apart, tolerated": (DOT, FAR_DOT, None, 3.0, (0.0, 3.0, 1.0)),
    "columns of 0.5 mm": (DOT, FAR_DOT, (2.0, 0.5), 1.4, (0.0, 1.5, 0.0)),
    "two rows apart, rows of 2 mm": (DOT, LOW_DOT, (2.0, 0.5), 4.0, (0.0, 4.0, 1.0)),
    # Edge pixels: (0,0), (0,1) against (0,0). Directed distances 0, 1 and 0: the 95th percentile of
    # {0, 1} is 0.95, and of the three edge pixels two lie within a tolerance of 0.5.
    "one pixel too many": (PAIR, DOT, None, 0.5, (2 / 3, 0.95, 2 / 3)),
    # The square's edge is its 8 outer pixels; the centre is no edge. From (0,0): 1, 2, 1, sqrt 2 and so on.
    "a corner of a square": (DOT, SQUARE, None, 0.0, (0.2, None, 2 / 9)),
}


@pytest.mark.parametrize("name", HAND_COMPUTED)
def test_hand_computed_values(name: str) -> None:
    prediction, truth, spacing, tolerance, (dice, hd95, nsd) = HAND_COMPUTED[name]
    (case,) = case_metrics(prediction, truth, spacing, tolerance)
    assert case.dice == pytest.approx(dice)
    assert case.nsd == pytest.approx(nsd)
    if name == "a corner of a square":
        # Distances of the edge to (0,0), sorted: 0 1 1 2 2 sqrt5 sqrt5 sqrt8; position .95 * 7 = 6.65.
        hd95 = 0.35 * math.sqrt(5) + 0.65 * math.sqrt(8)
    assert case.hd95 == (None if hd95 is None else pytest.approx(hd95))


def edge_points(grid: np.ndarray) -> list[tuple[int, int]]:
    height, width = grid.shape

    def inside(row: int, column: int) -> bool:
        return 0 <= row < height and 0 <= column < width and bool(grid[row, column])

    return [
        (row, column)
        for row, column in itertools.product(range(height), range(width))
        if inside(row, column)
        and not all(inside(row + dr, column + dc) for dr, dc in ((0, 1), (1, 0), (0, -1), (-1, 0)))
    ]


def brute_force(
    prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, float], tolerance: float
) -> tuple[float, float | None, float]:
    """Dice, HD95 and NSD by loops over pixels, without MONAI."""
    overlap = sum(bool(p and t) for p, t in zip(prediction.flat, truth.flat, strict=True))
    sizes = int(prediction.sum()) + int(truth.sum())
    if not prediction.any() or not truth.any():
        agreed = 1.0 if sizes == 0 else 0.0
        return agreed, None, agreed
    edges = edge_points(prediction), edge_points(truth)
    directed = []
    for ours, theirs in (edges, edges[::-1]):
        directed.append(
            [min(math.hypot((r - s) * spacing[0], (c - d) * spacing[1]) for s, d in theirs) for r, c in ours]
        )
    hd95 = max(percentile_95(distances) for distances in directed)
    near = sum(distance <= tolerance for distances in directed for distance in distances)
    return 2 * overlap / sizes, hd95, near / (len(directed[0]) + len(directed[1]))


def percentile_95(distances: list[float]) -> float:
    ordered = sorted(distances)
    position = 0.95 * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    density=st.sampled_from([0.02, 0.2, 0.5, 0.9, 1.0]),
    spacing=st.sampled_from([None, (1.0, 1.0), (0.7, 2.3), (3.1, 0.2)]),
)
def test_random_masks_match_brute_force(
    seed: int, height: int, width: int, density: float, spacing: tuple[float, float] | None
) -> None:
    rng = np.random.default_rng(seed)
    prediction, truth = rng.random((2, 3, height, width)) < density
    # Off any possible distance, so that rounding cannot decide whether a pixel is within it.
    tolerance = 1.2345
    cases = case_metrics(torch.from_numpy(prediction), torch.from_numpy(truth), spacing, tolerance)
    assert len(cases) == 3
    for case, ours, theirs in zip(cases, prediction, truth, strict=True):
        dice, hd95, nsd = brute_force(ours, theirs, spacing or (1.0, 1.0), tolerance)
        assert case.dice == pytest.approx(dice, abs=1e-6)
        assert case.nsd == pytest.approx(nsd, abs=1e-6)
        assert case.hd95 == (None if hd95 is None else pytest.approx(hd95, abs=1e-4))


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 2.3)])
def test_values_are_those_of_monai_s_whole_metrics(spacing: tuple[float, float]) -> None:
    rng = np.random.default_rng(4)
    for density in (0.05, 0.4, 0.8):
        prediction, truth = torch.from_numpy(rng.random((2, 1, 40, 30)) < density)
        (case,) = case_metrics(prediction, truth, spacing, 1.0)
        pair = {"y_pred": prediction[None], "y": truth[None], "include_background": True}
        assert case.dice == float(compute_dice(**pair))
        assert case.hd95 == pytest.approx(
            float(compute_hausdorff_distance(**pair, percentile=95, spacing=spacing))
        )
        assert case.nsd == pytest.approx(
            float(compute_surface_dice(**pair, class_thresholds=[1.0], spacing=spacing))
        )


def test_classes_do_not_mix() -> None:
    """An empty class beside a full one keeps its own convention."""
    cases = case_metrics(torch.cat([SQUARE, EMPTY]), torch.cat([SQUARE, DOT]), None, 1.0)
    assert cases == [CaseMetrics(1.0, 0.0, 1.0), CaseMetrics(0.0, None, 0.0)]


@pytest.mark.parametrize("shape", [(1, 3, 5), (3, 4), (2, 3, 4)])
def test_masks_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(C, H, W\)"):
        case_metrics(torch.zeros(shape, dtype=torch.bool), DOT, None, 1.0)


def test_patient_value_is_the_mean_over_images_that_have_one() -> None:
    cases = [CaseMetrics(0.5, 4.0, 0.25), CaseMetrics(0.0, None, 0.0), CaseMetrics(1.0, 2.0, 0.5)]
    assert patient_value(cases, "dice") == pytest.approx(0.5)
    assert patient_value(cases, "hd95") == pytest.approx(3.0)
    assert patient_value(cases, "nsd") == pytest.approx(0.25)
    assert math.isnan(patient_value(cases[1:2], "hd95"))
    assert math.isnan(patient_value([], "dice"))


VALUES = st.lists(st.one_of(st.floats(0, 100), st.just(float("nan"))), max_size=12)


@given(first=VALUES, second=VALUES)
def test_sums_of_parts_are_the_sum_of_the_whole(first: list[float], second: list[float]) -> None:
    merged = MetricSum.of(np.array(first)) + MetricSum.of(np.array(second))
    whole = MetricSum.of(np.array(first + second))
    assert (merged.count, merged.undefined) == (whole.count, whole.undefined)
    assert merged.count + merged.undefined == len(first) + len(second)
    assert merged.total == pytest.approx(whole.total)
    assert (merged.mean is None) == (merged.count == 0)
    if whole.mean is not None:
        assert merged.mean == pytest.approx(np.nanmean(np.array(first + second)))


def test_an_empty_sum_changes_nothing() -> None:
    value = MetricSum.of(np.array([0.5, float("nan")]))
    assert value == MetricSum(1, 0.5, 1)
    assert value + MetricSum() == value


def test_bootstrap_interval_of_equal_patients_is_their_value() -> None:
    assert bootstrap_ci(np.full(7, 0.25), 200, seed=1) == (0.25, 0.25)


def test_bootstrap_interval_follows_the_standard_error() -> None:
    """For many patients the percentile interval is the mean -+ 1.96 standard errors."""
    values = np.random.default_rng(0).normal(0.8, 0.1, 400)
    low, high = bootstrap_ci(values, 4000, seed=3)
    error = values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_bootstrap_is_seeded_and_leaves_undefined_out() -> None:
    values = np.array([0.1, 0.9, 0.4, float("nan"), 0.7])
    first = bootstrap_ci(values, 500, seed=11)
    assert first == bootstrap_ci(values, 500, seed=11)
    assert first == bootstrap_ci(values[~np.isnan(values)], 500, seed=11)
    assert first != bootstrap_ci(values, 500, seed=12)
    assert first[0] < np.nanmean(values) < first[1]


def test_bootstrap_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no patient"):
        bootstrap_ci(np.array([float("nan")]), 10, seed=0)
