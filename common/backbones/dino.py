"""DINOv2 (Oquab et al. 2023), with registers (Darcet et al. 2023), and DINOv3's ViT (Siméoni et al. 2025)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from common.backbones.base import Backbone, Features, Progress, spread
from common.errors import ConfigError

ATTENTION: dict[str, tuple[str, ...]] = {
    "q": ("attention.q_proj",),
    "k": ("attention.k_proj",),
    "v": ("attention.v_proj",),
    "out": ("attention.o_proj",),
}
DINOV2_MLP = ("mlp.fc1", "mlp.fc2")
DINOV3_MLP = ("mlp.up_proj", "mlp.down_proj")
GATED_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # of the giant models


class DinoBackbone(Backbone):
    """Hidden states are (B, 1 + registers + h w, C): class token, register tokens, then patches by rows.

    The class and register tokens stay in the blocks and are in no map.
    """

    def __init__(self, network: nn.Module, config: Any, mlp: tuple[str, ...]) -> None:
        super().__init__()
        self.vision_encoder: Any = network
        self.LAYERS = ATTENTION | {"mlp": mlp}
        self.prefix = 1 + getattr(config, "num_register_tokens", 0)
        self.stride = self.unit = config.patch_size
        self.channels = config.hidden_size
        self.tap_blocks = spread(config.num_hidden_layers)
        self.tap_channels = (config.hidden_size,) * len(self.tap_blocks)

    @property
    @abstractmethod
    def norm(self) -> nn.Module:
        """What follows the last block."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.get_submodule(self.blocks_name).children())

    def embed(self, image: Tensor) -> Progress:
        """Image (B, 3, S, S). Raises ``ConfigError`` for another shape: tokens do not tell h from w."""
        if image.shape[-2] != image.shape[-1]:
            raise ConfigError(f"this encoder takes square images, not {tuple(image.shape[-2:])}")
        return Progress(self.vision_encoder.embeddings(image))

    def block(self, index: int, progress: Progress) -> Tensor:
        hidden: Tensor = self.blocks[index](progress.hidden)
        return hidden

    def as_map(self, hidden: Tensor) -> Tensor:
        patches = hidden[:, self.prefix :].transpose(1, 2)
        side = isqrt(patches.shape[2])
        return patches.reshape(*patches.shape[:2], side, side)

    def finish(self, progress: Progress) -> Features:
        return Features(self.as_map(self.norm(progress.hidden)), progress.taps)

    def resize_positions(self, image_size: int) -> None:
        """Nothing is stored for one size: every forward fits the positions to its image, as in training."""


class Dinov2Backbone(DinoBackbone):
    """DINOv2 with or without registers."""

    @property
    def blocks_name(self) -> str:
        return "vision_encoder.encoder.layer"

    @property
    def norm(self) -> nn.Module:
        norm: nn.Module = self.vision_encoder.layernorm
        return norm


class Dinov3Backbone(DinoBackbone):
    """DINOv3's ViT; the rotary tables (h w, head width), cosine and sine, are in ``Progress.shared``."""

    @property
    def blocks_name(self) -> str:
        return "vision_encoder.model.layer"

    @property
    def norm(self) -> nn.Module:
        norm: nn.Module = self.vision_encoder.norm
        return norm

    def embed(self, image: Tensor) -> Progress:
        return Progress(super().embed(image).hidden, shared=tuple(self.vision_encoder.rope_embeddings(image)))

    def block(self, index: int, progress: Progress) -> Tensor:
        hidden: Tensor = self.blocks[index](progress.hidden, position_embeddings=progress.shared)
        return hidden


def build_dinov2(config: Mapping[str, Any]) -> Dinov2Backbone:
    settings = Dinov2Config(**config)
    mlp = GATED_MLP if settings.use_swiglu_ffn else DINOV2_MLP
    return Dinov2Backbone(Dinov2Model(settings), settings, mlp)


def build_dinov2_registers(config: Mapping[str, Any]) -> Dinov2Backbone:
    settings = Dinov2WithRegistersConfig(**config)
    mlp = GATED_MLP if settings.use_swiglu_ffn else DINOV2_MLP
    return Dinov2Backbone(Dinov2WithRegistersModel(settings), settings, mlp)


def build_dinov3(config: Mapping[str, Any]) -> Dinov3Backbone:
    settings = DINOv3ViTConfig(**config)
    mlp = GATED_MLP if settings.use_gated_mlp else DINOV3_MLP
    return Dinov3Backbone(DINOv3ViTModel(settings), settings, mlp)
