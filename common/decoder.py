"""The prompt-free mask decoder: tokens of a vision transformer and the image itself -> mask logits.

Patch tokens alone lose whatever is smaller than a patch, so a light convolutional branch carries full-
resolution detail from the image into the decoder (the idea of ViTMatte, Yao et al. 2023, and HQ-SAM, Ke et
al. 2023, in its smallest form).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TAP_CHANNELS = 32  # channels of the decoder feature that a student is aligned with, at half resolution


def _block(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.GroupNorm(8, outside), nn.GELU()
    )


class MaskDecoder(nn.Module):
    """Tokens (B, T, S/8, S/8) and image (B, 3, S, S) -> logits (B, C, S, S) and a feature (B, 32, S/2, S/2).

    A small U-Net whose deepest level is the transformer: the image comes down to S/4, the tokens come up from
    S/8, and they meet at every scale. GroupNorm only: no statistic is carried from one image, patient or site
    to the next.
    """

    def __init__(self, token_channels: int, classes: int) -> None:
        super().__init__()
        self.fine = _block(3, 16)
        self.coarse = _block(16, 32, stride=2)
        self.low = _block(32, 48, stride=2)
        self.project = nn.Conv2d(token_channels, 48, 1)
        self.context = _block(48, 48)
        self.merge_quarter = _block(48 + 48, 48)
        self.merge_half = _block(48 + 32, TAP_CHANNELS)
        self.squeeze = nn.Conv2d(TAP_CHANNELS, 16, 1)
        self.merge_full = _block(16 + 16, 16)
        self.head = nn.Conv2d(16, classes, 1)

    def forward(self, tokens: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(image)  # (B, 16, S, S)
        coarse = self.coarse(fine)  # (B, 32, S/2, S/2)
        low = self.low(coarse)  # (B, 48, S/4, S/4)
        quarter = self.merge_quarter(_meet(self.context(self.project(tokens)), low))
        half = self.merge_half(_meet(quarter, coarse))
        logits: Tensor = self.head(self.merge_full(_meet(self.squeeze(half), fine)))
        return logits, half


def _meet(deep: Tensor, skip: Tensor) -> Tensor:
    """``deep`` enlarged to ``skip``'s size, both side by side in the channels."""
    risen = F.interpolate(deep, size=skip.shape[-2:], mode="bilinear", align_corners=False)
    return torch.cat([risen, skip], 1)
