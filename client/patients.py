"""Patients in memory: the unit of split, of sampling and of privacy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor


class Split(StrEnum):
    train = "train"
    val = "val"
    test = "test"


@dataclass(frozen=True)
class Sample:
    """One image of a patient, as the models see it.

    Attributes:
        image: (3, H, W) float32 in [0, 1], percentile-stretched a channel; grey means three equal channels.
        mask: (C, H, W) uint8, one plane a foreground class, or None for an unlabelled image.
        valid: (H, W) bool, False outside the field of view.
        spacing_mm: (row, column) size of a pixel of *this* tensor, or None if unknown.
    """

    image: Tensor
    mask: Tensor | None
    valid: Tensor
    spacing_mm: tuple[float, float] | None = None
    group: str = ""


@dataclass(frozen=True)
class Patient:
    """One person's images. ``id`` never leaves the site."""

    id: str
    split: Split
    samples: tuple[Sample, ...]

    @property
    def labelled(self) -> bool:
        return any(sample.mask is not None for sample in self.samples)


def of_split(patients: Sequence[Patient], split: Split) -> list[Patient]:
    return [patient for patient in patients if patient.split == split]
