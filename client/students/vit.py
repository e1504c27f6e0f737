"""A transformer student: ViT-Tiny with the house's mask decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from client.students.base import Student, StudentOutput, normalised
from common.decoder import TAP_CHANNELS, MaskDecoder

WIDTH, DEPTH, HEADS, PATCH = 192, 12, 3, 16
TAPS = (3, 7)  # blocks whose tokens the decoder sees beside the last one's
GRID = 6  # positions a side that are learned: those of a tile of 96 pixels


class Attention(nn.Module):
    """Self-attention in several heads (Vaswani et al. 2017): tokens (B, N, D) -> the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        parts = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])  # (B, heads, N, D / heads)
        mixed: Tensor = self.mix(seen.transpose(1, 2).flatten(2))
        return mixed


class Block(nn.Module):
    """Tokens (B, N, D) -> the same: attention, then two layers, each after a LayerNorm and added.

    MONAI's own block would bring a norm for cross-attention that never learns, and einops, which is in no
    requirement of ours.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm_attention(tokens))
        made: Tensor = tokens + self.mlp(self.norm_mlp(tokens))
        return made


class PatchEncoder(nn.Module):
    """The encoder of ViT-Tiny (Dosovitskiy et al. 2021, Touvron et al. 2021), without a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.positions = nn.Parameter(torch.empty(1, WIDTH, GRID, GRID))
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.trunc_normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def embed(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> patches with their positions, (B, D, H/16, W/16)."""
        patches: Tensor = self.project(normalised(image))
        positions = self.positions
        if patches.shape[-2:] != positions.shape[-2:]:
            positions = F.interpolate(positions, size=patches.shape[-2:], mode="bicubic", align_corners=False)
        return patches + positions

    def walk(self, tokens: Tensor) -> list[Tensor]:
        """Any number of tokens (B, N, D) -> those after each of `TAPS`, and the last, which is normed."""
        seen = []
        for number, block in enumerate(self.blocks):
            tokens = block(tokens)
            if number in TAPS:
                seen.append(tokens)
        return [*seen, self.norm(tokens)]


class ViTTiny(Student):
    """5.7 M parameters: image (B, 3, H, W) in [0, 1] -> logits (B, C, H, W).

    The decoder is the teacher's own (`common.decoder`), in the student's width: patches of 16 pixels alone
    would lose whatever is thinner. LayerNorm and GroupNorm: no buffer. Positions are learned for one tile
    and interpolated to any other.
    """

    deep_channels, late_channels, deep_stride = WIDTH, TAP_CHANNELS, PATCH

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.encoder = PatchEncoder()
        self.decoder = MaskDecoder(WIDTH, [WIDTH] * len(TAPS), classes)

    @property
    def head(self) -> nn.Conv2d:  # type: ignore[override] # of the decoder: one layer, under one name
        return self.decoder.head

    def _maps(self, image: Tensor) -> list[Tensor]:
        """The tokens of `PatchEncoder.walk` as maps (B, D, H/16, W/16)."""
        patches = self.encoder.embed(image)
        seen = self.encoder.walk(patches.flatten(2).transpose(1, 2))
        return [tokens.transpose(1, 2).reshape(patches.shape) for tokens in seen]

    def outputs(self, image: Tensor) -> StudentOutput:
        *taps, deep = self._maps(image)
        logits, late = self.decoder(deep, taps, normalised(image))
        return StudentOutput(logits, deep, late)

    def encode(self, image: Tensor) -> Tensor:
        return self._maps(image)[-1]
