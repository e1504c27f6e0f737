"""From gradients of images to the clipped sum over patients (Abadi et al. 2016, algorithm 1, per patient)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from client.dp.poisson import MicroBatch
from common.errors import DataError


def patient_sums(gradients: Tensor, batch: MicroBatch) -> Tensor:
    """Weighted gradients of images (B, ...) added up by patient: (B, ...), zeros where no patient is.

    As many rows as images, so that shapes do not say how many patients there are.
    """
    if batch.one_image_each:
        return gradients
    return torch.zeros_like(gradients).index_add_(0, batch.slots, gradients)


def clip_factors(gradients: Mapping[str, Tensor], max_norm: float) -> Tensor:
    """min(1, ``max_norm`` / norm) of each patient's gradient, taken as one over all tensors (P, ...): (P,).

    Guarantees: a gradient times its factor has norm <= ``max_norm`` (1 + 1e-5), whatever its length; norms
    are summed in float64, so that no finite gradient overflows.

    Raises:
        DataError: a gradient is not finite. Its text depends on no data but on that.
    """
    squares = [
        torch.linalg.vector_norm(part.flatten(1), dim=1, dtype=torch.float64).square()
        for part in gradients.values()
    ]
    norms = torch.stack(squares).sum(0).sqrt()
    if not bool(norms.isfinite().all()):
        raise DataError("a gradient is not finite: check the images, or lower the learning rate")
    return max_norm / norms.clamp(min=max_norm)


def add_clipped(total: Mapping[str, Tensor], gradients: Mapping[str, Tensor], max_norm: float) -> None:
    """Clip each patient's gradient (P, *shape) to ``max_norm`` and add all of them to ``total`` (*shape).

    Guarantee: one patient more or less moves ``total`` by at most ``max_norm`` (1 + 1e-5).

    Raises:
        DataError: a gradient is not finite; ``total`` is as before.
    """
    factors = clip_factors(gradients, max_norm)
    for name, part in gradients.items():
        flat = part.flatten(1)
        total[name].view(-1).addmv_(flat.T, factors.to(flat.dtype))
