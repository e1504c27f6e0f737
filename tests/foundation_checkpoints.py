"""Checkpoints as their authors publish them, in small: real tensors under the real names.

The names are written out here, apart from the rules in `common.foundation.layouts`, so that one can be
wrong without the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Sam2Config,
    Sam2Model,
    Sam2VideoConfig,
    Sam2VideoModel,
    SamConfig,
    SamModel,
    SamVisionModel,
)

from common.teacher import shipped_teacher

SIDE = 64  # native image size of every small model, pixels

SAM = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "mlp_dim": 64,
    "output_channels": 16,
    "image_size": SIDE,
    "patch_size": 8,
    "window_size": 3,
    "global_attn_indexes": [1, 3],
    "num_pos_feats": 8,
    "initializer_range": 0.02,
}
SAM_USUAL = {**SAM, "output_channels": 256, "num_pos_feats": 128}  # what SAM's usual decoder takes
SAM_AROUND: dict[str, Any] = {
    "prompt_encoder_config": {
        "hidden_size": 16,
        "image_size": SIDE,
        "patch_size": 8,
        "mask_input_channels": 4,
    },
    "mask_decoder_config": {
        "hidden_size": 16,
        "mlp_dim": 32,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
    },
}
SAM2 = {
    "model_type": "sam2_vision_model",
    "backbone_config": {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 16,
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [16, 32, 64, 128],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "window_size_per_stage": [8, 4, 4, 2],
        "global_attention_blocks": [3],
    },
    "backbone_channel_list": [128, 64, 32, 16],
    "fpn_hidden_size": 16,
}
SAM2_AROUND: dict[str, Any] = {
    "prompt_encoder_config": {"hidden_size": 16, "image_size": SIDE, "mask_input_channels": 4},
    "mask_decoder_config": {
        "hidden_size": 16,
        "mlp_dim": 32,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
    },
}
SAM2_MEMORY: dict[str, Any] = {
    "memory_attention_hidden_size": 16,
    "memory_attention_num_layers": 1,
    "memory_attention_feed_forward_hidden_size": 32,
    "memory_encoder_hidden_size": 16,
    "memory_encoder_output_channels": 8,
    "mask_downsampler_embed_dim": 16,
    "memory_fuser_embed_dim": 16,
    "memory_fuser_intermediate_dim": 32,
}
VIT: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "SamModel": lambda: SamModel(SamConfig(vision_config=SAM, **SAM_AROUND)),
    "SamModel, usual decoder": lambda: SamModel(SamConfig(vision_config=SAM_USUAL)),
    "SamVisionModel": lambda: SamVisionModel(SamConfig(vision_config=SAM, **SAM_AROUND).vision_config),
    "Sam2Model": lambda: Sam2Model(Sam2Config(vision_config=SAM2, **SAM2_AROUND)),
    "Sam2VideoModel": lambda: Sam2VideoModel(
        Sam2VideoConfig(vision_config=SAM2, **SAM2_AROUND, **SAM2_MEMORY)
    ),
    "Sam2VisionModel": lambda: Sam2Model(Sam2Config(vision_config=SAM2, **SAM2_AROUND)).vision_encoder,
    "Dinov2Model": lambda: Dinov2Model(Dinov2Config(**VIT)),
    "Dinov2WithRegistersModel": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**VIT)),
    "DINOv3ViTModel": lambda: DINOv3ViTModel(
        DINOv3ViTConfig(**VIT, intermediate_size=48, num_register_tokens=4)
    ),
}
KINDS = tuple(kind for kind in BUILDERS if "usual" not in kind)


def model(kind: str, seed: int = 0) -> Any:
    """A small model whose every weight is random: position tables, which start at zero, too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = BUILDERS[kind]().eval()
        with torch.no_grad():
            for value in made.parameters():
                value.copy_(0.1 * torch.randn_like(value) + (1.0 if value.dim() == 1 else 0.0))
        if kind.startswith("SamModel"):  # one tensor under two names, as in every official checkpoint
            made.prompt_encoder.shared_embedding = made.shared_image_embedding
    return made


@torch.inference_mode()
def reference_tokens(network: Any, image: Tensor) -> Tensor:
    """What transformers' own encoder makes of a square image, as (B, C, h, w)."""
    encoder = getattr(network, "vision_encoder", network)
    out = encoder(image)
    if hasattr(out, "fpn_hidden_states"):
        return out.fpn_hidden_states[-1]
    if out.last_hidden_state.dim() == 4:
        return out.last_hidden_state
    side = image.shape[-1] // network.config.patch_size
    patches = out.last_hidden_state[:, -side * side :]
    return patches.transpose(1, 2).reshape(image.shape[0], -1, side, side)


def hub_tensors(kind: str, network: nn.Module) -> dict[str, Tensor]:
    """The state dict under the names that the hub's files have."""
    tensors = {key: value.detach().clone() for key, value in network.state_dict().items()}
    if kind.startswith("Dinov2"):
        names = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
        names["o_proj"] = "output.dense"
        for new, old in names.items():
            tensors = {key.replace(f"attention.{new}", f"attention.{old}"): v for key, v in tensors.items()}
    if kind == "DINOv3ViTModel":
        tensors = {key.removeprefix("model.") if ".layer." in key else key: v for key, v in tensors.items()}
    if kind == "SamModel":  # safetensors keeps one of two names of a tensor
        del tensors["prompt_encoder.shared_embedding.positional_embedding"]
    return tensors


def write_folder(
    folder: Path, network: Any, tensors: Mapping[str, Tensor], processor: Mapping[str, Any] | None = None
) -> Path:
    """``config.json``, ``model.safetensors`` and, if given, ``preprocessor_config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(network.config.to_dict()))
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def write_shards(folder: Path, network: Any, tensors: Mapping[str, Tensor]) -> Path:
    """The same in two files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(network.config.to_dict()))
    names = sorted(tensors)
    table = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        table |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return folder


def original_sam(network: nn.Module) -> dict[str, Tensor]:
    """segment-anything's and MedSAM's state dict with the weights of transformers' SamModel.

    Each pair is a module of the original repository and of transformers; what lies below has the same names.
    """
    state = network.state_dict()
    depth = len({key.split(".")[2] for key in state if key.startswith("vision_encoder.layers.")})
    found: dict[str, Tensor] = {}
    for theirs, ours in (*_image_encoder(depth), *_prompt_encoder(), *_mask_decoder()):
        for key, value in state.items():
            if key == ours or key.startswith(f"{ours}."):
                found[theirs + key[len(ours) :]] = value.detach().clone()
    return found


def _image_encoder(depth: int) -> list[tuple[str, str]]:
    pairs = [
        ("image_encoder.pos_embed", "vision_encoder.pos_embed"),
        ("image_encoder.patch_embed.proj", "vision_encoder.patch_embed.projection"),
        ("image_encoder.neck.0", "vision_encoder.neck.conv1"),
        ("image_encoder.neck.1", "vision_encoder.neck.layer_norm1"),
        ("image_encoder.neck.2", "vision_encoder.neck.conv2"),
        ("image_encoder.neck.3", "vision_encoder.neck.layer_norm2"),
    ]
    for block in range(depth):
        here, there = f"image_encoder.blocks.{block}", f"vision_encoder.layers.{block}"
        pairs += [(f"{here}.norm1", f"{there}.layer_norm1"), (f"{here}.norm2", f"{there}.layer_norm2")]
        pairs += [(f"{here}.attn", f"{there}.attn"), (f"{here}.mlp", f"{there}.mlp")]
    return pairs


def _prompt_encoder() -> list[tuple[str, str]]:
    shared = "prompt_encoder.shared_embedding.positional_embedding"
    parts = {0: "conv1", 1: "layer_norm1", 3: "conv2", 4: "layer_norm2", 6: "conv3"}
    return [
        ("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", shared),
        ("prompt_encoder.point_embeddings", "prompt_encoder.point_embed"),
        ("prompt_encoder.not_a_point_embed", "prompt_encoder.not_a_point_embed"),
        ("prompt_encoder.no_mask_embed", "prompt_encoder.no_mask_embed"),
        *(
            (f"prompt_encoder.mask_downscaling.{number}", f"prompt_encoder.mask_embed.{name}")
            for number, name in parts.items()
        ),
    ]


def _mask_decoder() -> list[tuple[str, str]]:
    top, both = "mask_decoder", "mask_decoder.transformer"
    pairs = [
        (f"{top}.iou_token", f"{top}.iou_token"),
        (f"{top}.mask_tokens", f"{top}.mask_tokens"),
        (f"{top}.output_upscaling.0", f"{top}.upscale_conv1"),
        (f"{top}.output_upscaling.1", f"{top}.upscale_layer_norm"),
        (f"{top}.output_upscaling.3", f"{top}.upscale_conv2"),
        (f"{both}.final_attn_token_to_image", f"{both}.final_attn_token_to_image"),
        (f"{both}.norm_final_attn", f"{both}.layer_norm_final_attn"),
    ]
    for layer in range(2):
        here = f"{both}.layers.{layer}"
        for name in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token", "mlp"):
            pairs.append((f"{here}.{name}", f"{here}.{name}"))
        pairs += [(f"{here}.norm{number}", f"{here}.layer_norm{number}") for number in (1, 2, 3, 4)]
    heads = [f"output_hypernetworks_mlps.{number}" for number in range(4)] + ["iou_prediction_head"]
    for head in heads:
        pairs += [
            (f"{top}.{head}.layers.0", f"{top}.{head}.proj_in"),
            (f"{top}.{head}.layers.1", f"{top}.{head}.layers.0"),
            (f"{top}.{head}.layers.2", f"{top}.{head}.proj_out"),
        ]
    return pairs


def weightless(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors of these shapes that hold one number each: a ViT-H's file takes kilobytes."""
    return {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}


def folder_of(kind: str, parent: Path, **options: Any) -> Path:
    network = model(kind)
    return write_folder(parent / kind, network, hub_tensors(kind, network), **options)


def difference(kind: str, name: str) -> float:
    """Largest difference between the imported encoder's tokens and transformers' own."""
    image = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        tokens = shipped_teacher(name, SIDE).eval().encoder(image).tokens
    expected = reference_tokens(model(kind), image)
    assert expected.std() > 0.01
    return float((tokens - expected).abs().max())
