"""The foundation models that can become a teacher: where they come from, their licence, what they take.

An entry's ``config`` is what builds the encoder in transformers. Sources: the models' own repositories
(facebookresearch segment-anything, sam2, dinov2 and dinov3; bowang-lab MedSAM) and transformers' converters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class KnownTeacher:
    """One foundation model.

    Attributes:
        family: of encoders, as in `common.backbones.FAMILIES`.
        hub_id: its repository on the Hugging Face hub.
        licence: SPDX name; a ``LicenseRef-`` has terms of its own, which the user accepts explicitly.
        config: what the encoder's transformers config class takes.
        image_size: side in pixels that its position table, or its training, was made for.
        mean, std: of each channel in RGB order, for values in [0, 1].
    """

    name: str
    family: str
    hub_id: str
    licence: str
    trained_on: str
    image_size: int
    config: Mapping[str, Any]
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD

    @property
    def must_accept_licence(self) -> bool:
        return self.licence.startswith("LicenseRef-")


def _sam(name: str, hub_id: str, width: int, depth: int, heads: int, **about: Any) -> KnownTeacher:
    """SAM's encoder: windows of 14 patches, every quarter of the depth closed by a global block."""
    config = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "mlp_dim": 4 * width,
        "output_channels": 256,
        "image_size": 1024,
        "patch_size": 16,
        "window_size": 14,
        "global_attn_indexes": [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)],
    }
    about = {"trained_on": "SA-1B (11 million photographs)", **about}
    return KnownTeacher(name, "sam", hub_id, "Apache-2.0", image_size=1024, config=config, **about)


def _sam2(size: str, width: int, heads: int, blocks: list[int], globals_: list[int]) -> KnownTeacher:
    """SAM 2.1's Hiera encoder with its feature pyramid; each stage doubles width and heads."""
    widths = [width * 2**stage for stage in range(4)]
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": width,
        "blocks_per_stage": blocks,
        "embed_dim_per_stage": widths,
        "num_attention_heads_per_stage": [heads * 2**stage for stage in range(4)],
        "window_size_per_stage": [8, 4, 16, 8] if size == "large" else [8, 4, 14, 7],
        "global_attention_blocks": globals_,
        "window_positional_embedding_background_size": [14, 14] if size == "base-plus" else [7, 7],
    }
    return KnownTeacher(
        f"sam2.1-hiera-{size}",
        "sam2",
        f"facebook/sam2.1-hiera-{size}",
        "Apache-2.0",
        trained_on="SA-V (51 thousand videos) and SA-1B",
        image_size=1024,
        config={"backbone_config": backbone, "backbone_channel_list": widths[::-1]},
    )


_VIT = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}  # width, depth, heads


def _dinov2(size: str, registers: bool) -> KnownTeacher:
    width, depth, heads = _VIT[size]
    config = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "image_size": 518,
        "patch_size": 14,
        **({"num_register_tokens": 4} if registers else {}),
    }
    return KnownTeacher(
        f"dinov2-registers-{size}" if registers else f"dinov2-{size}",
        "dinov2_registers" if registers else "dinov2",
        f"facebook/dinov2-with-registers-{size}" if registers else f"facebook/dinov2-{size}",
        "Apache-2.0",
        trained_on="LVD-142M (142 million photographs)",
        image_size=518,
        config=config,
    )


def _dinov3(short: str, size: str) -> KnownTeacher:
    width, depth, heads = _VIT[size]
    config = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "image_size": 224,
        "patch_size": 16,
        "num_register_tokens": 4,
    }
    return KnownTeacher(
        f"dinov3-{short}",
        "dinov3",
        f"facebook/dinov3-{short}-pretrain-lvd1689m",
        "LicenseRef-DINOv3",
        trained_on="LVD-1689M (1.7 billion photographs), distilled from the 7B model",
        image_size=224,
        config=config,
    )


_MEDSAM: dict[str, Any] = {
    "trained_on": "SA-1B, then 1.57 million medical image and mask pairs (Ma et al. 2024)",
    "mean": (0.0, 0.0, 0.0),  # MedSAM scales an image to [0, 1] and takes it as it is
    "std": (1.0, 1.0, 1.0),
}

_ALL = (
    _sam("sam-vit-b", "facebook/sam-vit-base", 768, 12, 12),
    _sam("sam-vit-l", "facebook/sam-vit-large", 1024, 24, 16),
    _sam("sam-vit-h", "facebook/sam-vit-huge", 1280, 32, 16),
    _sam("medsam-vit-b", "wanglab/medsam-vit-base", 768, 12, 12, **_MEDSAM),
    _sam2("tiny", 96, 1, [1, 2, 7, 2], [5, 7, 9]),
    _sam2("small", 96, 1, [1, 2, 11, 2], [7, 10, 13]),
    _sam2("base-plus", 112, 2, [2, 3, 16, 3], [12, 16, 20]),
    _sam2("large", 144, 2, [2, 6, 36, 4], [23, 33, 43]),
    *(_dinov2(size, registers) for registers in (False, True) for size in _VIT),
    _dinov3("vits16", "small"),
    _dinov3("vitb16", "base"),
    _dinov3("vitl16", "large"),
)

CATALOGUE: Mapping[str, KnownTeacher] = MappingProxyType({entry.name: entry for entry in _ALL})


def of_hub(hub_id: str) -> KnownTeacher | None:
    """The entry that the hub's repository ``hub_id`` holds; None for any other repository."""
    return next((entry for entry in CATALOGUE.values() if entry.hub_id == hub_id), None)
