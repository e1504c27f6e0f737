"""What every student is: a small network that a hospital keeps and runs on any machine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

MEAN, STD = 0.45, 0.25  # of the images that all shipped weights were trained on


@dataclass(frozen=True)
class StudentOutput:
    """``logits`` (B, C, H, W); ``deep`` (B, D, H/g, W/g) and ``late`` (B, L, H/2, W/2) to align."""

    logits: Tensor
    deep: Tensor
    late: Tensor


class Student(nn.Module, ABC):
    """Image (B, 3, H, W) in [0, 1] -> logits (B, C, H, W), H and W multiples of 32.

    ``head`` is the last layer, a 1 x 1 convolution with bias, one output a class: an empty mask can be
    represented, and shipped heads can be chosen from. No buffers: nothing that averaging would spoil.

    Attributes:
        deep_channels: of ``StudentOutput.deep``. late_channels: of ``StudentOutput.late``.
        deep_stride: pixels of the image that one position of ``deep`` stands for, g above.
    """

    deep_channels: int
    late_channels: int
    deep_stride: int
    head: nn.Conv2d

    @abstractmethod
    def outputs(self, image: Tensor) -> StudentOutput:
        """The logits, and the features that distillation aligns with the teacher's."""

    @abstractmethod
    def encode(self, image: Tensor) -> Tensor:
        """``outputs(image).deep``, without the work that comes after it."""

    def forward(self, image: Tensor) -> Tensor:
        return self.outputs(image).logits


def normalised(image: Tensor) -> Tensor:
    """An image in [0, 1] as the networks take it."""
    return (image - MEAN) / STD
