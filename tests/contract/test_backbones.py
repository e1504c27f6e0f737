"""Each encoder family against the contract, and what is its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Sam2VisionConfig,
    Sam2VisionModel,
    SamVisionConfig,
    SamVisionModel,
)

from common.backbones import FAMILIES, build_backbone
from common.backbones.attention import RelativeAttention
from common.backbones.base import Backbone
from common.errors import ArtefactError, ConfigError
from tests.contract.backbone import (
    FittingContract,
    StoredPositionsContract,
    families_tested,
)


def as_given(model: nn.Module, weights: dict[str, Tensor]) -> Any:
    """``model`` with exactly these weights: a missing or another name is an error."""
    model.load_state_dict(weights, strict=True)
    return model.eval()


class TestSam(StoredPositionsContract):
    family: ClassVar[str] = "sam"
    config: ClassVar[dict[str, Any]] = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "mlp_dim": 64,
        "output_channels": 24,
        "image_size": 64,
        "patch_size": 8,
        "window_size": 3,
        "global_attn_indexes": [1, 3],
        "initializer_range": 0.02,
    }
    side: ClassVar[int] = 64
    ratios: ClassVar[tuple[int, ...]] = (8, 8, 8)
    fused: ClassVar[bool] = True

    def reference(self, backbone: Backbone, image: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        model = SamVisionModel(SamVisionConfig(**self.config, attn_implementation="eager"))
        output = as_given(model, backbone.state_dict())(image, output_hidden_states=True)
        return output.last_hidden_state, tuple(h.permute(0, 3, 1, 2) for h in output.hidden_states[1:])

    def embedding(self, backbone: Backbone) -> nn.Parameter:
        return backbone.get_parameter("vision_encoder.patch_embed.projection.weight")

    def bias(self, backbone: Backbone) -> Tensor:
        return backbone.get_parameter("vision_encoder.patch_embed.projection.bias")

    def write_positions(self, backbone: Backbone, draw: Callable[[int], Tensor]) -> Tensor:
        table = backbone.get_parameter("vision_encoder.pos_embed")
        drawn = draw(table.shape[1])
        table.copy_(drawn.permute(1, 2, 0)[None])
        return drawn

    def test_relative_tables_are_interpolated_in_the_global_blocks_only(self) -> None:
        """Linearly over the table, as segment-anything does; a window keeps its size and its table."""
        backbone = self.built()
        old = {name: tensor.clone() for name, tensor in backbone.state_dict().items() if "rel_pos" in name}
        backbone.resize_positions(128)
        new = backbone.state_dict()
        for name, table in old.items():
            block = int(name.split(".")[2])
            if block not in self.config["global_attn_indexes"]:
                assert torch.equal(new[name], table)
                continue
            at = (np.arange(31) + 0.5) * 15 / 31 - 0.5
            expected = [np.interp(at, np.arange(15), column) for column in table.T.numpy()]
            assert new[name].shape == (31, 16)
            assert np.allclose(new[name].T.numpy(), expected, atol=1e-6)

    def test_every_block_has_the_attention_without_a_table(self) -> None:
        backbone = self.built()
        for index in range(4):
            module = backbone.get_submodule(f"{backbone.blocks_name}.{index}.attn")
            assert isinstance(module, RelativeAttention)


class TestSam2(FittingContract, StoredPositionsContract):
    family: ClassVar[str] = "sam2"
    config: ClassVar[dict[str, Any]] = {
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": 16,
            "embed_dim_per_stage": [16, 32, 48, 64],
            "num_attention_heads_per_stage": [1, 2, 3, 4],
            "blocks_per_stage": [1, 2, 3, 1],
            "global_attention_blocks": [4, 5],
            "image_size": [96, 96],
        },
        "backbone_channel_list": [64, 48, 32, 16],
        "fpn_hidden_size": 24,
    }
    side: ClassVar[int] = 96
    ratios: ClassVar[tuple[int, ...]] = (4, 8, 16)
    fused: ClassVar[bool] = True

    def reference(self, backbone: Backbone, image: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        model = Sam2VisionModel(Sam2VisionConfig(**self.config))
        model.set_attn_implementation("eager")
        model = as_given(model, backbone.get_submodule("vision_encoder").state_dict())
        # What Sam2Model.get_image_embeddings hands to its mask decoder is the last of these levels.
        tokens = model(image).fpn_hidden_states[-1]
        hidden = model.backbone(image, output_hidden_states=True).hidden_states
        assert len(hidden) == len(backbone.blocks) + 1
        return tokens, tuple(h.permute(0, 3, 1, 2) for h in hidden[1:])

    def embedding(self, backbone: Backbone) -> nn.Parameter:
        return backbone.get_parameter("vision_encoder.backbone.patch_embed.projection.weight")

    def bias(self, backbone: Backbone) -> Tensor:
        return backbone.get_parameter("vision_encoder.backbone.patch_embed.projection.bias")

    def write_positions(self, backbone: Backbone, draw: Callable[[int], Tensor]) -> Tensor:
        table = backbone.get_parameter("vision_encoder.backbone.pos_embed")
        drawn = draw(table.shape[-1])
        table.copy_(drawn[None])
        backbone.get_parameter("vision_encoder.backbone.pos_embed_window").zero_()
        return drawn

    @torch.no_grad()
    @pytest.mark.parametrize("side", [32, 96, 128, 160, 256])
    def test_windows_and_pooling_fit_every_multiple_of_the_unit(self, side: int) -> None:
        backbone = self.built()
        assert (backbone.unit, backbone.stride) == (32, 16)
        assert backbone(self.image(side)).tokens.shape == (2, 24, side // 16, side // 16)

    def test_other_pooling_is_refused(self) -> None:
        hiera = self.config["backbone_config"] | {"query_stride": [1, 2]}
        with pytest.raises(ArtefactError, match="pool"):
            build_backbone("sam2", self.config | {"backbone_config": hiera})


class DinoContract(FittingContract):
    side: ClassVar[int] = 56
    fused: ClassVar[bool] = False
    model: ClassVar[Callable[[Any], nn.Module]]
    settings: ClassVar[Callable[..., Any]]
    prefix: ClassVar[int]

    def reference(self, backbone: Backbone, image: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        kind = type(self)
        model = kind.model(kind.settings(**self.config, attn_implementation="eager"))
        model = as_given(model, backbone.get_submodule("vision_encoder").state_dict())
        output = model(image, output_hidden_states=True)

        def as_map(hidden: Tensor) -> Tensor:
            side = image.shape[-1] // self.config["patch_size"]
            return hidden[:, self.prefix :].reshape(2, side, side, -1).permute(0, 3, 1, 2)

        return as_map(output.last_hidden_state), tuple(as_map(h) for h in output.hidden_states[1:])

    def test_an_image_that_is_not_square_is_refused(self) -> None:
        backbone = self.built()
        with pytest.raises(ConfigError, match="square"):
            backbone(torch.zeros(1, 3, self.side, 4 * self.side))


class TestDinov2(DinoContract, StoredPositionsContract):
    family: ClassVar[str] = "dinov2"
    model = Dinov2Model
    settings = Dinov2Config
    prefix: ClassVar[int] = 1
    ratios: ClassVar[tuple[int, ...]] = (14, 14, 14)
    config: ClassVar[dict[str, Any]] = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
        "image_size": 84,
        "patch_size": 14,
    }

    def embedding(self, backbone: Backbone) -> nn.Parameter:
        return backbone.get_parameter("vision_encoder.embeddings.patch_embeddings.projection.weight")

    def bias(self, backbone: Backbone) -> Tensor:
        return backbone.get_parameter("vision_encoder.embeddings.patch_embeddings.projection.bias")

    def write_positions(self, backbone: Backbone, draw: Callable[[int], Tensor]) -> Tensor:
        table = backbone.get_parameter("vision_encoder.embeddings.position_embeddings")
        drawn = draw(round((table.shape[1] - 1) ** 0.5))
        table[0, 1:] = drawn.flatten(1).T
        return drawn


class TestDinov2Giant(TestDinov2):
    """The same family with the gated MLP of the giant model."""

    config: ClassVar[dict[str, Any]] = TestDinov2.config | {"use_swiglu_ffn": True}


class TestDinov2Registers(TestDinov2):
    family: ClassVar[str] = "dinov2_registers"
    model = Dinov2WithRegistersModel
    settings = Dinov2WithRegistersConfig
    prefix: ClassVar[int] = 4
    config: ClassVar[dict[str, Any]] = TestDinov2.config | {"num_register_tokens": 3}


class TestDinov3(DinoContract):
    family: ClassVar[str] = "dinov3"
    model = DINOv3ViTModel
    settings = DINOv3ViTConfig
    prefix: ClassVar[int] = 5
    side: ClassVar[int] = 64
    ratios: ClassVar[tuple[int, ...]] = (16, 16, 16)
    config: ClassVar[dict[str, Any]] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_register_tokens": 4,
        "image_size": 64,
        "patch_size": 16,
    }

    def embedding(self, backbone: Backbone) -> nn.Parameter:
        return backbone.get_parameter("vision_encoder.embeddings.patch_embeddings.weight")

    def test_rotary_tables_travel_with_the_progress(self) -> None:
        backbone = self.built()
        progress = backbone.embed(self.image())
        assert [tuple(table.shape) for table in progress.shared] == [(16, 16), (16, 16)]
        assert backbone.run(progress, 0, 2).shared == progress.shared


class TestDinov3Gated(TestDinov3):
    """The same family with the gated MLP of the huge models."""

    config: ClassVar[dict[str, Any]] = TestDinov3.config | {"use_gated_mlp": True}


def test_every_family_is_tested() -> None:
    assert families_tested() == set(FAMILIES)
    assert len(FAMILIES) == 5


def test_an_unknown_family_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ArtefactError, match="sam2"):
        build_backbone("resnet", {})
