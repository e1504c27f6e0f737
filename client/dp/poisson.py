"""Who takes part in a step: patients by independent coins, and at most k images of each.

Independent coins are what the accounting of a subsampled Gaussian assumes (Abadi et al. 2016; Chua et al.
2024 show what shuffled batches cost instead). Who was drawn, and how many, is secret: it never leaves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from client.dp.randomness import Randomness
from common.errors import ConfigError

Row = int  # the place of an image in a task's table


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the network at once: always the same number of rows, whoever was drawn.

    Attributes:
        rows: (B,) int64, images by their place in the task's table; those beyond the drawn repeat the first.
        weights: (B,) float32, 1 / (the patient's drawn images), and 0 for the rows beyond.
        slots: (B,) int64, which of the batch's patients a row belongs to, from 0 without a gap.
        patients: how many there are.
    """

    rows: Tensor
    weights: Tensor
    slots: Tensor
    patients: int

    @cached_property
    def one_image_each(self) -> bool:
        """Whether row i is the one image of patient i."""
        return int((self.weights > 0).sum()) == self.patients


@dataclass(frozen=True)
class PoissonSampler:
    """Draws of ``patients`` (for each the rows of its images), each with probability ``sample_rate``."""

    patients: Sequence[Sequence[Row]]
    sample_rate: float
    max_images: int

    def draw(self, source: Randomness) -> list[list[Row]]:
        """For each patient drawn, the rows of at most ``max_images`` of its images; often none at all."""
        coins = source.uniforms(len(self.patients))
        drawn = np.flatnonzero(coins < self.sample_rate).tolist()
        return [self._images(self.patients[place], source) for place in drawn]

    def _images(self, rows: Sequence[Row], source: Randomness) -> list[Row]:
        if len(rows) <= self.max_images:
            return list(rows)
        order = np.argsort(source.uniforms(len(rows)))
        return [rows[place] for place in order[: self.max_images]]


def micro_batches(drawn: Sequence[Sequence[Row]], size: int) -> Iterator[MicroBatch]:
    """``drawn`` in batches of ``size`` rows; the images of one patient are never parted.

    Raises ``ConfigError`` if one patient's images are more than ``size``.
    """
    waiting: list[Sequence[Row]] = []
    for rows in filter(None, drawn):
        if len(rows) > size:
            raise ConfigError(
                f"physical_batch {size} is below the images of one patient in a step: raise it to "
                "max_images_per_patient at least"
            )
        if sum(map(len, waiting)) + len(rows) > size:
            yield _packed(waiting, size)
            waiting = []
        waiting.append(rows)
    if waiting:
        yield _packed(waiting, size)


def _packed(patients: Sequence[Sequence[Row]], size: int) -> MicroBatch:
    rows = [row for images in patients for row in images]
    weights = [1 / len(images) for images in patients for _ in images]
    slots = [slot for slot, images in enumerate(patients) for _ in images]
    spare = size - len(rows)
    return MicroBatch(
        torch.tensor(rows + rows[:1] * spare),
        torch.tensor(weights + [0.0] * spare),
        torch.tensor(slots + [0] * spare),
        len(patients),
    )
