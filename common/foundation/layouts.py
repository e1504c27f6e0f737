"""How official checkpoints name their tensors: every key and shape of each known arrangement.

Keys and shapes are not written down here: they are those of transformers' own modules, built on the meta
device (no memory), and for the original repositories' files the same under other names. A checkpoint fits
a layout exactly, or it is refused with every key that does not fit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import nn

from common.backbones import build_backbone
from common.canonical import canonical_json
from common.errors import ArtefactError

Shapes = Mapping[str, tuple[int, ...]]
_Rules = Sequence[tuple[str, str]]  # pattern, replacement

# model_type of a config.json -> the encoder's family, and the key below which its config lies.
MODEL_TYPES: dict[str, tuple[str, str | None]] = {
    "sam": ("sam", "vision_config"),
    "sam_vision_model": ("sam", None),
    "sam2": ("sam2", "vision_config"),
    "sam2_video": ("sam2", "vision_config"),
    "sam2_vision_model": ("sam2", None),
    "dinov2": ("dinov2", None),
    "dinov2_with_registers": ("dinov2_registers", None),
    "dinov3_vit": ("dinov3", None),
}

# Fields of a config that change nothing that a frozen, finished encoder computes.
_INERT = {
    "initializer_range",
    "attention_dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "drop_path_rate",
    "layerscale_value",
    "pos_embed_shift",
    "pos_embed_jitter",
    "pos_embed_rescale",
    "apply_layernorm",
    "reshape_hidden_states",
    "num_pos_feats",
}
# The same for one model_type: Hiera takes its heads from the stages and images of any size.
_INERT_OF = {
    "sam2_hiera_det_model": {"num_attention_heads", "image_size"},
    "sam2_vision_model": {"backbone_feature_sizes"},
}


@dataclass(frozen=True)
class Layout:
    """One arrangement of keys.

    Attributes:
        shapes: key in the checkpoint -> shape.
        encoder: key in the checkpoint -> key in `Teacher.state_dict`. The rest is left out on purpose:
            prompt encoder, mask decoder, video memory.
        copies: keys that hold one and the same tensor, of which a checkpoint needs only one.
        constants: keys that may be there and hold no weights.
    """

    name: str
    shapes: Shapes
    encoder: Mapping[str, str]
    copies: frozenset[str] = frozenset()
    constants: frozenset[str] = frozenset()

    def faults(self, found: Shapes) -> list[str]:
        """Each key of a checkpoint that is missing, unexpected or wrongly shaped; none if it fits exactly."""
        spared = self.copies if self.copies & set(found) else frozenset()
        lines = [
            f"missing: {key} {_text(shape)}"
            for key, shape in self.shapes.items()
            if key not in found and key not in spared
        ]
        lines += [
            f"unexpected: {key} {_text(shape)}"
            for key, shape in found.items()
            if key not in self.shapes and key not in self.constants
        ]
        return lines + [
            f"wrong shape: {key} is {_text(found[key])}, not {_text(shape)}"
            for key, shape in self.shapes.items()
            if key in found and found[key] != shape
        ]


def _text(shape: Sequence[int]) -> str:
    return f"({', '.join(str(side) for side in shape)})"


def encoder_config(family: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config decides which function an encoder computes, with transformers' defaults filled in.

    Two configs are one architecture exactly if these are equal.

    Raises:
        ArtefactError: transformers does not take the config.
    """
    kind = _config_class(family)
    try:
        with _quiet():
            config = kind(**{key: value for key, value in given.items() if key != "model_type"})
    except Exception as error:  # strict dataclasses raise several kinds of error
        reason = " ".join(str(error).split())
        raise ArtefactError(
            f"the config is none of a {family} encoder ({reason}); restore config.json"
        ) from error
    plain: dict[str, Any] = json.loads(json.dumps(_computing(config)))  # tuples become lists
    return plain


def _computing(config: Any) -> dict[str, Any]:
    generic = {item.name for item in fields(transformers.PreTrainedConfig)} | _INERT
    generic |= _INERT_OF.get(config.model_type, set())
    names = [item.name for item in fields(config) if item.name not in generic and item.name[0] != "_"]
    values = {name: getattr(config, name) for name in names}
    for name, value in values.items():
        if isinstance(value, transformers.PreTrainedConfig):
            values[name] = {"model_type": value.model_type, **_computing(value)}
    return values


def layouts(family: str, config: Mapping[str, Any], whole: Mapping[str, Any] | None = None) -> list[Layout]:
    """Every known layout of a ``family`` encoder with ``config``.

    Args:
        whole: the config of the model around the encoder (config.json); None for the usual one.
    """
    return list(_layouts(family, canonical_json(dict(config)), json.dumps(whole, sort_keys=True)))


@lru_cache(maxsize=64)
def _layouts(family: str, config_text: str, whole_text: str) -> tuple[Layout, ...]:
    config = json.loads(config_text)
    with _quiet():
        return tuple(_BUILDERS[family](config, json.loads(whole_text)))


def _sam_layouts(config: dict[str, Any], whole: dict[str, Any] | None) -> Iterator[Layout]:
    from transformers import SamConfig, SamModel

    encoder = _meta_shapes(transformers.SamVisionModel, _config_class("sam")(**config))
    model = _meta_shapes(SamModel, SamConfig(**_around(whole, "sam", config)))
    target = _teacher_keys("sam", config, encoder)
    copies = frozenset(key for key in model if key in _SAM_COPIES)
    yield Layout("Hugging Face SamModel", model, target, copies)
    yield Layout("Hugging Face SamVisionModel", encoder, target)
    constants = frozenset({"pixel_mean", "pixel_std"})
    # The file of the original repository has the tied tensor once, under the prompt encoder.
    once = {
        key: shape for key, shape in model.items() if key != "shared_image_embedding.positional_embedding"
    }
    for name, keys in (("segment-anything .pth", once), ("segment-anything .pth, encoder only", encoder)):
        shapes = {original_sam_key(key): shape for key, shape in keys.items()}
        renamed = {original_sam_key(key): goal for key, goal in target.items()}
        yield Layout(name, shapes, renamed, constants=constants)


def _sam2_layouts(config: dict[str, Any], whole: dict[str, Any] | None) -> Iterator[Layout]:
    from transformers import Sam2Config, Sam2Model, Sam2VideoConfig, Sam2VideoModel

    encoder = _meta_shapes(transformers.Sam2VisionModel, _config_class("sam2")(**config))
    target = _teacher_keys("sam2", config, encoder)
    below = {f"vision_encoder.{key}": goal for key, goal in target.items()}
    # The hub's SAM 2.1 repositories hold the video model; its encoder is the image model's.
    for name, model_type, kind, settings in (
        ("Hugging Face Sam2VideoModel", "sam2_video", Sam2VideoModel, Sam2VideoConfig),
        ("Hugging Face Sam2Model", "sam2", Sam2Model, Sam2Config),
    ):
        shapes = _meta_shapes(kind, settings(**_around(whole, model_type, config)))
        yield Layout(name, shapes, below, frozenset(key for key in shapes if key in _SAM_COPIES))
    yield Layout("Hugging Face Sam2VisionModel", encoder, target)


_SAM_COPIES = {
    "shared_image_embedding.positional_embedding",
    "prompt_encoder.shared_embedding.positional_embedding",
}


def _around(whole: dict[str, Any] | None, model_type: str, config: dict[str, Any]) -> dict[str, Any]:
    """Settings of the model around an encoder: those of its config.json if that is of this type."""
    given = whole if whole and whole.get("model_type") == model_type else {}
    kept = {key: value for key, value in given.items() if key not in ("model_type", "vision_config")}
    sub_type = "sam_vision_model" if model_type == "sam" else "sam2_vision_model"
    vision = given.get("vision_config") or {}  # some of its settings decide shapes outside the encoder
    return {**kept, "vision_config": {**vision, "model_type": sub_type, **config}}


def _dinov2_layouts(family: str) -> Callable[[dict[str, Any], dict[str, Any] | None], Iterator[Layout]]:
    def build(config: dict[str, Any], whole: dict[str, Any] | None) -> Iterator[Layout]:
        kind = {"dinov2": "Dinov2Model", "dinov2_registers": "Dinov2WithRegistersModel"}[family]
        now = _meta_shapes(getattr(transformers, kind), _config_class(family)(**config))
        target = _teacher_keys(family, config, now)
        yield _renamed(f"Hugging Face {kind}", now, target, _DINOV2_ON_THE_HUB)
        yield Layout(f"Hugging Face {kind}, names of transformers 5", now, target)

    return build


def _dinov3_layouts(config: dict[str, Any], whole: dict[str, Any] | None) -> Iterator[Layout]:
    now = _meta_shapes(transformers.DINOv3ViTModel, _config_class("dinov3")(**config))
    target = _teacher_keys("dinov3", config, now)
    yield _renamed("Hugging Face DINOv3ViTModel", now, target, _DINOV3_ON_THE_HUB)
    yield Layout("Hugging Face DINOv3ViTModel, names of transformers 5", now, target)


_BUILDERS: dict[str, Callable[[dict[str, Any], dict[str, Any] | None], Iterator[Layout]]] = {
    "sam": _sam_layouts,
    "sam2": _sam2_layouts,
    "dinov2": _dinov2_layouts("dinov2"),
    "dinov2_registers": _dinov2_layouts("dinov2_registers"),
    "dinov3": _dinov3_layouts,
}

# transformers 5 renamed some modules; what lies on the hub has the names of version 4. New name -> old.
_DINOV2_ON_THE_HUB = (
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
)
_DINOV3_ON_THE_HUB = ((r"^model\.layer\.", "layer."),)

# transformers' name -> the original repository's. The first group is the image encoder, the rest is
# there so that a whole file can be told from a damaged one.
_SAM_ORIGINAL = (
    (r"^vision_encoder\.", "image_encoder."),
    (r"\.patch_embed\.projection\.", ".patch_embed.proj."),
    (r"\.neck\.conv1\.", ".neck.0."),
    (r"\.neck\.layer_norm1\.", ".neck.1."),
    (r"\.neck\.conv2\.", ".neck.2."),
    (r"\.neck\.layer_norm2\.", ".neck.3."),
    (r"^image_encoder\.layers\.", "image_encoder.blocks."),
    (r"^prompt_encoder\.shared_embedding\.positional_embedding$",
     "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"\.point_embed\.", ".point_embeddings."),
    (r"\.mask_embed\.conv1\.", ".mask_downscaling.0."),
    (r"\.mask_embed\.layer_norm1\.", ".mask_downscaling.1."),
    (r"\.mask_embed\.conv2\.", ".mask_downscaling.3."),
    (r"\.mask_embed\.layer_norm2\.", ".mask_downscaling.4."),
    (r"\.mask_embed\.conv3\.", ".mask_downscaling.6."),
    (r"\.upscale_conv1\.", ".output_upscaling.0."),
    (r"\.upscale_layer_norm\.", ".output_upscaling.1."),
    (r"\.upscale_conv2\.", ".output_upscaling.3."),
    (r"(_head|_mlps\.\d+)\.layers\.0\.", r"\1.layers.1."),
    (r"(_head|_mlps\.\d+)\.proj_in\.", r"\1.layers.0."),
    (r"(_head|_mlps\.\d+)\.proj_out\.", r"\1.layers.2."),
    (r"\.layer_norm", ".norm"),
)  # fmt: skip


def original_sam_key(key: str) -> str:
    """The name that a tensor of transformers' SamModel has in segment-anything's and MedSAM's files."""
    return _rename(key, _SAM_ORIGINAL)


def _rename(key: str, rules: _Rules) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _renamed(name: str, shapes: Shapes, target: Mapping[str, str], rules: _Rules) -> Layout:
    renamed = {_rename(key, rules): shape for key, shape in shapes.items()}
    return Layout(name, renamed, {_rename(key, rules): goal for key, goal in target.items()})


def _teacher_keys(family: str, config: dict[str, Any], encoder: Shapes) -> dict[str, str]:
    """Key of transformers' encoder -> key of the same tensor in `Teacher.state_dict`.

    A backbone holds transformers' module under one name, or its parts under their own.
    """
    with torch.device("meta"):
        ours = {key: tuple(value.shape) for key, value in build_backbone(family, config).state_dict().items()}
    first = next(iter(encoder))
    for prefix in (key.removesuffix(first) for key in ours if key.endswith(first)):
        if ours == {prefix + key: shape for key, shape in encoder.items()}:
            return {key: f"encoder.{prefix}{key}" for key in encoder}
    raise AssertionError(f"the {family} backbone does not hold transformers' encoder as it is")


def _config_class(family: str) -> Any:
    return {
        "sam": transformers.SamVisionConfig,
        "sam2": transformers.Sam2VisionConfig,
        "dinov2": transformers.Dinov2Config,
        "dinov2_registers": transformers.Dinov2WithRegistersConfig,
        "dinov3": transformers.DINOv3ViTConfig,
    }[family]


def _meta_shapes(kind: Callable[[Any], nn.Module], config: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in kind(config).state_dict().items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers tells of every default it fills in."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
