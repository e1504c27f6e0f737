"""The prompt-free mask decoder: maps of a vision transformer and the image itself -> mask logits.

Patch tokens alone lose whatever is smaller than a patch, so a light convolutional branch carries full-
resolution detail from the image into the decoder (the idea of ViTMatte, Yao et al. 2023, and HQ-SAM, Ke et
al. 2023, in its smallest form). What several depths of the encoder see is joined from the deepest up (after
the feature pyramid of Lin et al. 2017), and a block of dilated convolutions with a view of the whole tile
gives each position its surroundings (after the atrous pyramid of Chen et al. 2018).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TAP_CHANNELS = 32  # channels of the decoder feature that a student is aligned with, at half resolution
WIDTH = 48  # channels of the deep part
DILATIONS = (1, 2, 4)


def _block(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.GroupNorm(8, outside), nn.GELU()
    )


class WideContext(nn.Module):
    """(B, C, h, w) -> the same: depthwise convolutions at several dilations and the tile's mean, mixed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=rate, dilation=rate, groups=channels, bias=False)
            for rate in DILATIONS
        )
        self.whole = nn.Conv2d(channels, channels, 1)
        self.mix = nn.Sequential(
            nn.Conv2d(len(DILATIONS) * channels, channels, 1, bias=False),
            nn.GroupNorm(8, channels),
            nn.GELU(),
        )

    def forward(self, deep: Tensor) -> Tensor:
        near = self.mix(torch.cat([branch(deep) for branch in self.branches], 1))
        whole: Tensor = self.whole(deep.mean((2, 3), keepdim=True))
        wide: Tensor = deep + near + whole
        return wide


class MaskDecoder(nn.Module):
    """Tokens (B, T, h, w), taps, image (B, 3, S, S) -> logits (B, C, S, S) and a feature (B, 32, S/2, S/2).

    A small U-Net whose deepest level is the transformer: the image comes down to S/4, the tokens come up,
    and they meet at every scale. GroupNorm only: no statistic is carried from one image, patient or site
    to the next.

    Args:
        tap_channels: channels of each tap, shallow to deep; none makes a decoder of one scale.
    """

    def __init__(self, token_channels: int, tap_channels: Sequence[int], classes: int) -> None:
        super().__init__()
        self.fine = _block(3, 16)
        self.coarse = _block(16, 32, stride=2)
        self.low = _block(32, WIDTH, stride=2)
        self.project = nn.Conv2d(token_channels, WIDTH, 1)
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(1, channels), nn.Conv2d(channels, WIDTH, 1))
            for channels in tap_channels
        )
        self.joins = nn.ModuleList(_block(2 * WIDTH, WIDTH) for _ in tap_channels)
        self.context = WideContext(WIDTH) if tap_channels else _block(WIDTH, WIDTH)
        self.merge_quarter = _block(WIDTH + WIDTH, WIDTH)
        self.merge_half = _block(WIDTH + 32, TAP_CHANNELS)
        self.squeeze = nn.Conv2d(TAP_CHANNELS, 16, 1)
        self.merge_full = _block(16 + 16, 16)
        self.head = nn.Conv2d(16, classes, 1)

    def forward(self, tokens: Tensor, taps: Sequence[Tensor], image: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(image)  # (B, 16, S, S)
        coarse = self.coarse(fine)  # (B, 32, S/2, S/2)
        low = self.low(coarse)  # (B, 48, S/4, S/4)
        deep = self.project(tokens)
        for lateral, join, tap in zip(reversed(self.laterals), self.joins, reversed(taps), strict=True):
            # Contiguous: torch's GroupNorm crashes in backward on a channels-last input without gradient.
            deep = join(_meet(deep, lateral(tap.contiguous())))
        quarter = self.merge_quarter(_meet(self.context(deep), low))
        half = self.merge_half(_meet(quarter, coarse))
        logits: Tensor = self.head(self.merge_full(_meet(self.squeeze(half), fine)))
        return logits, half


def _meet(deep: Tensor, skip: Tensor) -> Tensor:
    """``deep`` enlarged to ``skip``'s size, both side by side in the channels."""
    risen = F.interpolate(deep, size=skip.shape[-2:], mode="bilinear", align_corners=False)
    return torch.cat([risen, skip], 1)
