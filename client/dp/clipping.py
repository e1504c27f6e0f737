"""From gradients of images to the clipped sum over patients (Abadi et al. 2016, algorithm 1, per patient)."""

from __future__ import annotations

import torch
from torch import Tensor

from client.dp.poisson import MicroBatch
from common.errors import DataError


def add_up_patients(gradients: Tensor, batch: MicroBatch, rows: Tensor) -> None:
    """Write weighted gradients of images (B, ...), added up by patient, over ``rows`` (B, n).

    As many rows as images, zeros after the patients, so that shapes do not say how many there are.
    """
    if batch.one_image_each:
        rows.view_as(gradients).copy_(gradients)
    else:
        rows.zero_().index_add_(0, batch.slots, gradients.flatten(1))


def clip_factors(rows: Tensor, max_norm: float) -> Tensor:
    """min(1, ``max_norm`` / norm) of each patient's whole gradient (P, n): (P,).

    Guarantees: a gradient times its factor has norm <= ``max_norm`` (1 + 1e-5), whatever its length; norms
    are summed in float64, so that no finite gradient overflows.

    Raises:
        DataError: a gradient is not finite. Its text depends on no data but on that.
    """
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    if not bool(norms.isfinite().all()):
        raise DataError("a gradient is not finite: check the images, or lower the learning rate")
    factors: Tensor = max_norm / norms.clamp(min=max_norm)
    return factors


def add_clipped(total: Tensor, rows: Tensor, max_norm: float) -> None:
    """Clip each patient's gradient (P, n) to ``max_norm`` and add all of them to ``total`` (n,).

    Guarantee: one patient more or less moves ``total`` by at most ``max_norm`` (1 + 1e-5).

    Raises:
        DataError: a gradient is not finite; ``total`` is as before.
    """
    factors = clip_factors(rows, max_norm).to(rows.dtype)
    total.addmv_(rows.T, factors)
