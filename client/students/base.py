"""What every student is: a small network that a hospital keeps and runs on any machine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class StudentOutput:
    """``logits`` (B, C, S, S); ``deep`` (B, D, S/8, S/8) and ``late`` (B, L, S/2, S/2) to align."""

    logits: Tensor
    deep: Tensor
    late: Tensor


class Student(nn.Module, ABC):
    """Image (B, 3, S, S) in [0, 1] -> logits (B, C, S, S), S a multiple of 32.

    ``head`` is the last layer, a 1 x 1 convolution with bias, one output a class: an empty mask can be
    represented, and shipped heads can be chosen from. No buffers: nothing that averaging would spoil.

    Attributes:
        deep_channels: of ``StudentOutput.deep``. late_channels: of ``StudentOutput.late``.
    """

    deep_channels: int
    late_channels: int
    head: nn.Conv2d

    @abstractmethod
    def outputs(self, image: Tensor) -> StudentOutput:
        """The logits, and the features that distillation aligns with the teacher's."""

    def forward(self, image: Tensor) -> Tensor:
        return self.outputs(image).logits
