"""Convolutional students: MONAI's residual U-Net in two sizes."""

from __future__ import annotations

from typing import ClassVar

import torch
from monai.networks.nets import UNet
from torch import Tensor, nn

from client.students.base import Student, StudentOutput, normalised


class ResidualUNet(Student):
    """A residual U-Net of four levels: image (B, 3, H, W) in [0, 1] -> logits (B, C, H, W).

    MONAI normalises a U-Net's own output channels an image, which with one output channel fixes the share of
    foreground whatever the image shows. So the body ends with several channels and a plain 1 x 1 head
    follows: an empty mask can be represented. InstanceNorm keeps no statistics: nothing to average wrongly.

    Attributes:
        levels: channels at full, half, quarter and eighth resolution.
        units: residual units a level. body_channels: what the body ends with.
    """

    levels: ClassVar[tuple[int, int, int, int]]
    units: ClassVar[int]
    body_channels: ClassVar[int]
    deep_stride = 8

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = UNet(
            spatial_dims=2, in_channels=3, out_channels=self.body_channels, channels=self.levels,
            strides=(2, 2, 2), num_res_units=self.units, norm="INSTANCE",
        )  # fmt: skip
        self.head = nn.Conv2d(self.body_channels, classes, 1)

    def _descend(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four levels on the way down, of MONAI's nested U-Net, unrolled."""
        top_down, top_skip, _ = self.body.model
        second_down, second_skip, _ = top_skip.submodule
        third_down, third_skip, _ = second_skip.submodule
        first = top_down(normalised(image))
        second = second_down(first)
        third = third_down(second)
        return first, second, third, third_skip.submodule(third)

    def _body(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the body ends with, and two features on the way."""
        first, second, third, deep = self._descend(image)
        _, top_skip, top_up = self.body.model
        _, second_skip, second_up = top_skip.submodule
        third_up = second_skip.submodule[2]
        rising = third_up(torch.cat([third, deep], 1))
        late = second_up(torch.cat([second, rising], 1))
        return top_up(torch.cat([first, late], 1)), deep, late

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self._body(image)[0])
        return logits

    def outputs(self, image: Tensor) -> StudentOutput:
        body, deep, late = self._body(image)
        return StudentOutput(self.head(body), deep, late)

    def encode(self, image: Tensor) -> Tensor:
        return self._descend(image)[3]


class UNetXS(ResidualUNet):
    """0.18 M parameters: for a laptop without a graphics card."""

    levels, units, body_channels = (16, 32, 64, 96), 1, 8
    deep_channels, late_channels = 96, 16


class UNetS(ResidualUNet):
    """2.0 M parameters, two residual units a level: for a workstation."""

    levels, units, body_channels = (36, 72, 144, 288), 2, 16
    deep_channels, late_channels = 288, 36
