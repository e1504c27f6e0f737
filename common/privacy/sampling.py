"""Whether batches were drawn as the plan claims: Poisson sampling has batches of varying size."""

from __future__ import annotations

from collections.abc import Sequence

from scipy.special import chdtr, chdtrc

from common.privacy.plan import Sampling

SIGNIFICANCE = 1e-3


def poisson_p_value(batch_sizes: Sequence[int], patients: int, sample_rate: float) -> float:
    """Two-sided p-value of ``batch_sizes`` under independent draws of each patient.

    The squared distances from N q, over the variance N q (1 - q), sum to about chi-squared with one degree
    of freedom a batch. Shuffled epochs have batches of one size, so nearly no variance.
    """
    mean = patients * sample_rate
    variance = mean * (1 - sample_rate)
    if variance == 0:  # everybody in every batch
        return 1.0 if all(size == patients for size in batch_sizes) else 0.0
    statistic = sum((size - mean) ** 2 for size in batch_sizes) / variance
    degrees = len(batch_sizes)
    return float(min(1.0, 2 * min(chdtr(degrees, statistic), chdtrc(degrees, statistic))))


def detected_sampling(batch_sizes: Sequence[int], patients: int, sample_rate: float) -> Sampling:
    """What may be claimed of a loader with these batches: anything but Poisson is charged as shuffled."""
    p_value = poisson_p_value(batch_sizes, patients, sample_rate)
    return Sampling.poisson if p_value >= SIGNIFICANCE else Sampling.shuffled
