"""SAM's image encoder (Kirillov et al. 2023): windowed and global blocks, decomposed relative positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SamVisionConfig, SamVisionModel

from common.backbones.attention import RelativeAttention
from common.backbones.base import Backbone, Features, Progress, prepared_side, spread
from common.backbones.projections import FUSED_ROLES, split_fused


class SamBackbone(Backbone):
    """SAM, MedSAM and ``ward-sam-tiny``; hidden states are (B, h, w, C)."""

    LAYERS: Mapping[str, tuple[str, ...]] = {**FUSED_ROLES, "mlp": ("mlp.lin1", "mlp.lin2")}

    def __init__(self, config: SamVisionConfig) -> None:
        super().__init__()
        self.vision_encoder = SamVisionModel(config).vision_encoder
        for layer in self.vision_encoder.layers:
            layer.attn = RelativeAttention(layer.attn)
        self.stride = self.unit = config.patch_size
        self.channels = config.output_channels
        self.tap_blocks = spread(config.num_hidden_layers)
        self.tap_channels = (config.hidden_size,) * len(self.tap_blocks)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.vision_encoder.layers)

    @property
    def blocks_name(self) -> str:
        return "vision_encoder.layers"

    def embed(self, image: Tensor) -> Progress:
        hidden = self.vision_encoder.patch_embed(image)
        if self.vision_encoder.pos_embed is not None:
            hidden = hidden + self.vision_encoder.pos_embed
        return Progress(hidden)

    def block(self, index: int, progress: Progress) -> Tensor:
        hidden: Tensor = self.vision_encoder.layers[index](progress.hidden)
        return hidden

    def as_map(self, hidden: Tensor) -> Tensor:
        return hidden.permute(0, 3, 1, 2)

    def split_qkv(self) -> None:
        split_fused(layer.attn for layer in self.vision_encoder.layers)

    def finish(self, progress: Progress) -> Features:
        return Features(self.vision_encoder.neck(progress.hidden), progress.taps)

    @torch.no_grad()
    def resize_positions(self, image_size: int) -> None:
        """Absolute table bicubic, the global blocks' relative tables linear, as SAM itself does."""
        inner = self.vision_encoder
        side = prepared_side(image_size, self.unit)
        grid = side // self.stride
        if inner.pos_embed is not None:
            table = F.interpolate(
                inner.pos_embed.permute(0, 3, 1, 2), (grid, grid), mode="bicubic", align_corners=False
            )
            inner.pos_embed = nn.Parameter(table.permute(0, 2, 3, 1).contiguous())
        for layer in inner.layers:
            if layer.window_size == 0:
                for name in ("rel_pos_h", "rel_pos_w"):
                    old = getattr(layer.attn, name)
                    new = F.interpolate(old.T[None], size=2 * grid - 1, mode="linear")[0].T.contiguous()
                    setattr(layer.attn, name, nn.Parameter(new))
        inner.patch_embed.image_size = (side, side)
        inner.config.image_size = inner.image_size = side


def build(config: Mapping[str, Any]) -> SamBackbone:
    return SamBackbone(SamVisionConfig(**config))
