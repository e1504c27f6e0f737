"""How good a model is on this site's own patients, and the little of it that may leave.

Per-patient values stay here. What leaves is a mean over at least ``policy.min_cell_patients`` patients
with its bootstrap interval, by way of `client.egress`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from client.patients import Patient, Sample
from client.pixels import tiled_probabilities
from common.guard_api import Metric
from common.metrics import (
    METRICS,
    CaseMetrics,
    FloatArray,
    MetricSum,
    bootstrap_ci,
    case_metrics,
    patient_value,
)
from common.probability import masks_of
from common.recipe import DataConfig, EvaluationConfig, PolicyConfig
from common.seeding import derive_seed

THRESHOLD = 0.5  # a pixel of at least this probability belongs to the class; see `masks_of`

Forward = Callable[[Tensor], Tensor]
PatientValues = Mapping[str, Mapping[str, FloatArray]]


def predict(forward: Forward, image: Tensor, data: DataConfig, overlap: float) -> Tensor:
    """Probabilities of a whole image, from overlapping tiles blended with Gaussian weights.

    Args:
        forward: tiles (B, 3, S, S) -> logits (B, C, S, S).
        image: (3, H, W) of any size; a side shorter than a tile is reflected to its length.
        data: S is its ``image_size``; ``exclusive`` says what the logits mean.
        overlap: share of a tile that neighbours share, 0 to below 1.

    Returns:
        (C, H, W) float32 in [0, 1].
    """
    return tiled_probabilities(forward, image, data.image_size, data.exclusive, overlap)


def foreground(forward: Forward, sample: Sample, data: DataConfig, overlap: float) -> Tensor:
    """(C, H, W) bool: the predicted masks of one image; nothing outside the field of view."""
    found = predict(forward, sample.image, data, overlap)
    return masks_of(found, data.exclusive, THRESHOLD) & sample.valid


def evaluate_patients(
    forward: Forward,
    patients: Sequence[Patient],
    data: DataConfig,
    config: EvaluationConfig,
) -> dict[str, dict[str, FloatArray]]:
    """Metric -> class name -> one value a labelled patient, in the order given. Stays at the site.

    Unlabelled images and patients are left out. NaN where a patient has no defined value; see
    `common.metrics` for the convention. ``forward`` and ``data`` as for `predict`.
    """
    labelled = [patient for patient in patients if patient.labelled]
    cases = [_patient_cases(forward, patient, data, config) for patient in labelled]
    return {
        metric: {
            item.name: np.array([patient_value([image[c] for image in images], metric) for images in cases])
            for c, item in enumerate(data.classes)
        }
        for metric in METRICS
    }


def _patient_cases(
    forward: Forward, patient: Patient, data: DataConfig, config: EvaluationConfig
) -> list[list[CaseMetrics]]:
    """For each labelled image of the patient, one entry a class."""
    return [
        case_metrics(
            foreground(forward, sample, data, config.overlap),
            sample.mask.bool(),
            sample.spacing_mm,
            config.nsd_tolerance,
        )
        for sample in patient.samples
        if sample.mask is not None
    ]


def release_metrics(
    model: str, values: PatientValues, config: EvaluationConfig, policy: PolicyConfig, seed: int
) -> list[Metric]:
    """What may be shown of `evaluate_patients`: means over patients, with 95 % intervals.

    A mean over fewer than ``policy.min_cell_patients`` patients is withheld, and their number with it
    (0 stands there). Patients whose value is undefined are left out of the mean; the reason counts them.
    The resampling depends on metric and class but not on ``model``, so that the
    intervals of two models come from the same draws of the same patients.
    """
    return [
        _release(Metric(model, metric, class_name, None, None, 0), column, config, policy, seed)
        for metric, classes in values.items()
        for class_name, column in classes.items()
    ]


def _release(
    cell: Metric, column: FloatArray, config: EvaluationConfig, policy: PolicyConfig, seed: int
) -> Metric:
    smallest = max(1, policy.min_cell_patients)
    whole = MetricSum.of(column)
    if whole.mean is None or whole.count < smallest:
        reason = f"fewer than {smallest} patients with a value" if smallest > 1 else "no patient with a value"
        return Metric(cell.model, cell.metric, cell.class_name, None, None, 0, reason)
    draws = derive_seed(seed, "bootstrap", cell.metric, cell.class_name)
    interval = bootstrap_ci(column, config.bootstrap, draws)
    reason = f"undefined for {whole.undefined} more patients" if whole.undefined else ""
    return Metric(cell.model, cell.metric, cell.class_name, whole.mean, interval, whole.count, reason)
