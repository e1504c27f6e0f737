"""SAM 2.1's image encoder (Ravi et al. 2024): Hiera (Ryali et al. 2023), whose stages pool and widen, and a
feature pyramid on top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import lcm
from typing import Any

from torch import Tensor, nn
from transformers import Sam2VisionConfig, Sam2VisionModel

from common.backbones.base import Backbone, Features, Progress
from common.backbones.projections import FUSED_ROLES, split_fused
from common.errors import ArtefactError


class Sam2Backbone(Backbone):
    """Hidden states are (B, h, w, C); h, w and C change at the stage ends.

    ``tokens`` are the pyramid's level that SAM 2's own mask decoder takes as its image embedding (1/16).
    Taps are the ends of all stages but the last, whose end is the hidden state that `finish` gets.
    """

    LAYERS: Mapping[str, tuple[str, ...]] = {**FUSED_ROLES, "mlp": ("mlp.proj_in", "mlp.proj_out")}

    def __init__(self, config: Sam2VisionConfig) -> None:
        super().__init__()
        self.vision_encoder = Sam2VisionModel(config)
        hiera = config.backbone_config
        if len({*hiera.patch_stride}) > 1 or any(step != 2 for step in hiera.query_stride):
            raise ArtefactError("this encoder's patches are not square or its stages do not pool by 2 x 2")
        patch, pools = hiera.patch_stride[0], hiera.num_query_pool_stages
        self.stride = patch * 2 ** min(config.num_feature_levels - 1, pools)
        # The table of the first stage's windows is tiled over the patches, and each pooling halves them.
        self.unit = patch * lcm(hiera.window_size_per_stage[0], 2**pools)
        self.channels = config.fpn_hidden_size
        self.tap_blocks = tuple(end - 1 for end in accumulate(hiera.blocks_per_stage))[:-1]
        self.tap_channels = tuple(hiera.embed_dim_per_stage[:-1])

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.vision_encoder.backbone.blocks)

    @property
    def blocks_name(self) -> str:
        return "vision_encoder.backbone.blocks"

    def embed(self, image: Tensor) -> Progress:
        hiera = self.vision_encoder.backbone
        hidden = hiera.patch_embed(image)
        return Progress(hidden + hiera._get_pos_embed(hidden.shape[1:3]))

    def block(self, index: int, progress: Progress) -> Tensor:
        hidden: Tensor = self.vision_encoder.backbone.blocks[index](progress.hidden)
        return hidden

    def as_map(self, hidden: Tensor) -> Tensor:
        return hidden.permute(0, 3, 1, 2)

    def finish(self, progress: Progress) -> Features:
        ends = [*(tap.permute(0, 2, 3, 1) for tap in progress.taps), progress.hidden]
        pyramid, _ = self.vision_encoder.neck(ends)  # from the coarsest level down
        return Features(pyramid[-self.vision_encoder.num_feature_levels], progress.taps)

    def split_qkv(self) -> None:
        split_fused(block.attn for block in self.vision_encoder.backbone.blocks)

    def resize_positions(self, image_size: int) -> None:
        """Nothing is stored for one size: every forward interpolates the table to its image (bicubic)."""


def build(config: Mapping[str, Any]) -> Sam2Backbone:
    return Sam2Backbone(Sam2VisionConfig(**config))
