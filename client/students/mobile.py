"""A student for small machines: depthwise-separable convolutions (MobileNets)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from client.students.base import Student, StudentOutput, normalised

LEVELS = (8, 24, 48, 96, 160)  # channels at full, half, ... sixteenth resolution
DEPTHS = (2, 2, 3)  # inverted residual blocks at quarter, eighth and sixteenth: none where the maps are large
EXPANSION = 4
GROUP = 8  # channels a normalised group


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // GROUP, channels)


def _plain(inside: int, outside: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, 3, stride, 1, bias=False), _norm(outside), nn.SiLU())


class InvertedResidual(nn.Module):
    """(B, I, h, w) -> (B, O, h/s, w/s): widen, look around channel by channel, narrow (MobileNetV2).

    After Sandler et al. 2018, with GroupNorm for BatchNorm (no statistics are kept) and SiLU for ReLU6. The
    narrow end is linear, and added to the input where both have one shape.
    """

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        wide = EXPANSION * inside
        self.same = stride == 1 and inside == outside
        self.layers = nn.Sequential(
            nn.Conv2d(inside, wide, 1, bias=False), _norm(wide), nn.SiLU(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), _norm(wide), nn.SiLU(),
            nn.Conv2d(wide, outside, 1, bias=False), _norm(outside),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layers(x)
        return x + made if self.same else made


def _separable(inside: int, outside: int) -> nn.Sequential:
    """A depthwise and a pointwise convolution (Howard et al. 2017)."""
    return nn.Sequential(
        nn.Conv2d(inside, inside, 3, 1, 1, groups=inside, bias=False), _norm(inside), nn.SiLU(),
        nn.Conv2d(inside, outside, 1, bias=False), _norm(outside), nn.SiLU(),
    )  # fmt: skip


class Join(nn.Module):
    """Deep (B, D, h, w) and skip (B, K, 2h, 2w) -> (B, K, 2h, 2w).

    The deep part is narrowed before it is enlarged, where that costs a quarter. With few channels a whole
    convolution is faster on a processor than a separable one.
    """

    def __init__(self, deep: int, skip: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(deep, skip, 1, bias=False)
        self.mix = _plain(2 * skip, skip, 1) if skip <= GROUP else _separable(2 * skip, skip)

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        risen = F.interpolate(self.narrow(deep), size=skip.shape[-2:], mode="bilinear", align_corners=False)
        joined: Tensor = self.mix(torch.cat([risen, skip], 1))
        return joined


class Mobile(Student):
    """A U-shaped network of 0.7 M parameters: image (B, 3, H, W) in [0, 1] -> logits (B, C, H, W).

    GroupNorm alone: no buffer. The head mixes several normalised channels after an activation, with a bias a
    class: an empty mask can be represented.
    """

    deep_channels, late_channels, deep_stride = LEVELS[4], LEVELS[1], 16

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.fine, self.coarse = _plain(3, LEVELS[0], 1), _plain(LEVELS[0], LEVELS[1], 2)
        self.stages = nn.ModuleList(
            nn.Sequential(
                InvertedResidual(inside, outside, 2),
                *(InvertedResidual(outside, outside, 1) for _ in range(depth - 1)),
            )
            for inside, outside, depth in zip(LEVELS[1:-1], LEVELS[2:], DEPTHS, strict=True)
        )
        self.joins = nn.ModuleList(
            Join(deep, skip) for deep, skip in zip(LEVELS[:0:-1], LEVELS[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(LEVELS[0], classes, 1)

    def _descend(self, image: Tensor) -> list[Tensor]:
        """Maps of all levels, the finest first."""
        fine = self.fine(normalised(image))
        maps = [fine, self.coarse(fine)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps

    def outputs(self, image: Tensor) -> StudentOutput:
        *skips, deep = self._descend(image)
        rising = [deep]
        for join, skip in zip(self.joins, reversed(skips), strict=True):
            rising.append(join(rising[-1], skip))
        return StudentOutput(self.head(rising[-1]), deep, late=rising[-2])

    def encode(self, image: Tensor) -> Tensor:
        return self._descend(image)[-1]
