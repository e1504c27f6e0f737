"""Dice, HD95 and NSD of a mask, and how values of many patients are put together.

The one convention for empty masks, of every class for itself:

===========================  =====  ====  =====
prediction / truth           Dice   NSD   HD95
===========================  =====  ====  =====
both empty                   1      1     undefined
one of them empty            0      0     undefined
===========================  =====  ====  =====

HD95 undefined is ``None``, is left out of every mean, and is counted: it is never 0, nor the image's
diagonal. A patient's value is the mean over the patient's images that have one.

Distances run between the edge pixels of both masks (pixels of the mask with a 4-neighbour outside it,
or at the image's border), centre to centre, in mm where the spacing is known and in pixels elsewhere.
HD95 is the larger of the two directed 95th percentiles; NSD is the share of edge pixels of both masks
that lie within the tolerance of the other's (Nikolov et al., arXiv 1809.04430). MONAI finds overlap, edges
and distances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics import compute_dice, get_mask_edges, get_surface_distance
from numpy.typing import NDArray
from torch import Tensor

METRICS = ("dice", "hd95", "nsd")

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class CaseMetrics:
    """One class of one image. ``hd95`` in mm, or pixels without a spacing; None where undefined."""

    dice: float
    hd95: float | None
    nsd: float

    def value(self, metric: str) -> float:
        """The value of one of `METRICS`, NaN where undefined."""
        value = {"dice": self.dice, "hd95": self.hd95, "nsd": self.nsd}[metric]
        return float("nan") if value is None else value


def case_metrics(
    prediction: Tensor, truth: Tensor, spacing: tuple[float, float] | None, tolerance: float
) -> list[CaseMetrics]:
    """Compare one image's masks, class by class.

    Args:
        prediction, truth: (C, H, W), bool.
        spacing: (row, column) size of a pixel in mm; None counts in pixels.
        tolerance: of the surface dice, in the same unit.

    Raises:
        ValueError: if the shapes differ or are not (C, H, W).
    """
    if prediction.shape != truth.shape or prediction.ndim != 3:
        raise ValueError(f"masks must both be (C, H, W), got {tuple(prediction.shape)}, {tuple(truth.shape)}")
    size = (1.0, 1.0) if spacing is None else (float(spacing[0]), float(spacing[1]))
    return [_class_metrics(prediction[c], truth[c], size, tolerance) for c in range(len(truth))]


def _class_metrics(
    prediction: Tensor, truth: Tensor, spacing: tuple[float, float], tolerance: float
) -> CaseMetrics:
    found, there = bool(prediction.any()), bool(truth.any())
    if not (found and there):
        agreed = 0.0 if found or there else 1.0
        return CaseMetrics(dice=agreed, hd95=None, nsd=agreed)
    # MONAI's compute_hausdorff_distance and compute_surface_dice each find the same edges and distances
    # again, and crop first at a greater cost than the rest together: once for both is six times faster.
    edges = get_mask_edges(prediction.bool(), truth.bool(), crop=False)
    directed = [get_surface_distance(*pair, spacing=spacing) for pair in (edges, edges[::-1])]
    return CaseMetrics(
        dice=float(compute_dice(prediction[None, None], truth[None, None], include_background=True)),
        hd95=max(float(torch.quantile(distances, 0.95)) for distances in directed),
        nsd=float((torch.cat(directed) <= tolerance).float().mean()),
    )


def patient_value(cases: Sequence[CaseMetrics], metric: str) -> float:
    """Mean over one patient's images that have a value; NaN if none has."""
    values = [value for case in cases if not np.isnan(value := case.value(metric))]
    return float(np.mean(values)) if values else float("nan")


@dataclass(frozen=True)
class MetricSum:
    """A mean that can still be added to others: what makes one value of many sites.

    Attributes:
        count: patients with a value.
        total: sum of their values.
        undefined: patients without one.
    """

    count: int = 0
    total: float = 0.0
    undefined: int = 0

    @classmethod
    def of(cls, values: FloatArray) -> MetricSum:
        """Of one value a patient, NaN where undefined."""
        defined = values[~np.isnan(values)]
        return cls(len(defined), float(defined.sum()), len(values) - len(defined))

    def __add__(self, other: MetricSum) -> MetricSum:
        return MetricSum(self.count + other.count, self.total + other.total, self.undefined + other.undefined)

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None


def bootstrap_ci(values: FloatArray, resamples: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean, patients resampled with replacement (Efron 1979).

    ``values`` (patients,), NaN left out. Raises ``ValueError`` if no value is defined.
    """
    defined = values[~np.isnan(values)]
    if not len(defined):
        raise ValueError("no patient has a value, so the mean has no interval")
    drawn = np.random.default_rng(seed).integers(len(defined), size=(resamples, len(defined)))
    low, high = np.percentile(defined[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)
