"""Convolutional students."""

from __future__ import annotations

import torch
from monai.networks.nets import UNet
from torch import Tensor, nn

from client.students.base import Student, StudentOutput


class UNetXS(Student):
    """A 0.18 M parameter residual U-Net: image (B, 3, S, S) in [0, 1] -> logits (B, C, S, S).

    MONAI normalises a U-Net's own output channels an image, which with one output channel fixes the share of
    foreground whatever the image shows. So the body ends with eight channels and a plain 1 x 1 head follows:
    an empty mask can be represented. InstanceNorm keeps no statistics: nothing to average wrongly.
    """

    deep_channels, late_channels = 96, 16

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = UNet(
            spatial_dims=2, in_channels=3, out_channels=8, channels=(16, 32, 64, 96), strides=(2, 2, 2),
            num_res_units=1, norm="INSTANCE",
        )  # fmt: skip
        self.head = nn.Conv2d(8, classes, 1)

    def _body(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three levels of MONAI's nested U-Net, unrolled so that two features can be read on the way."""
        top_down, top_skip, top_up = self.body.model
        second_down, second_skip, second_up = top_skip.submodule
        third_down, third_skip, third_up = second_skip.submodule
        first = top_down((image - 0.45) / 0.25)
        second = second_down(first)
        third = third_down(second)
        deep = third_skip.submodule(third)
        rising = third_up(torch.cat([third, deep], 1))
        late = second_up(torch.cat([second, rising], 1))
        return top_up(torch.cat([first, late], 1)), deep, late

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self._body(image)[0])
        return logits

    def outputs(self, image: Tensor) -> StudentOutput:
        body, deep, late = self._body(image)
        return StudentOutput(self.head(body), deep, late)
