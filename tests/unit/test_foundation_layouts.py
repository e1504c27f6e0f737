"""The catalogue of foundation models, and the keys and shapes of their checkpoints."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import SamConfig, SamModel

from common.backbones import FAMILIES, build_backbone
from common.checkpoints import NAME
from common.errors import ArtefactError
from common.foundation.catalogue import CATALOGUE, KnownTeacher, of_hub
from common.foundation.importing import Identity, teacher_tensors
from common.foundation.layouts import MODEL_TYPES, encoder_config, layouts, original_sam_key
from common.foundation.sources import Checkpoint
from tests.foundation_checkpoints import KINDS, hub_tensors, model, original_sam

ENTRIES = list(CATALOGUE.values())

# Millions of parameters that the authors publish: of the whole model for SAM 2.1 (its README), of the image
# encoder for the others (SAM's paper and code; DINOv2's and DINOv3's model cards).
PUBLISHED = {
    "sam-vit-b": 89.7, "sam-vit-l": 308.3, "sam-vit-h": 637.0, "medsam-vit-b": 89.7,
    "sam2.1-hiera-tiny": 38.9, "sam2.1-hiera-small": 46.0, "sam2.1-hiera-base-plus": 80.8,
    "sam2.1-hiera-large": 224.4,
    "dinov2-small": 22, "dinov2-base": 86.6, "dinov2-large": 304.4,
    "dinov2-registers-small": 22, "dinov2-registers-base": 86.6, "dinov2-registers-large": 304.4,
    "dinov3-vits16": 21.6, "dinov3-vitb16": 85.7, "dinov3-vitl16": 303.1,
}  # fmt: skip


def config_of(entry: KnownTeacher) -> dict[str, object]:
    return encoder_config(entry.family, entry.config)


def test_the_catalogue_names_every_teacher_of_the_issue() -> None:
    assert set(CATALOGUE) == set(PUBLISHED)
    assert (
        {entry.family for entry in ENTRIES} == set(FAMILIES) == {family for family, _ in MODEL_TYPES.values()}
    )
    assert all(NAME.fullmatch(name) for name in CATALOGUE)
    assert [of_hub(entry.hub_id) for entry in ENTRIES] == ENTRIES
    assert of_hub("somebody/else") is None


def test_only_dinov3_has_terms_to_accept() -> None:
    assert {e.family for e in ENTRIES if e.must_accept_licence} == {"dinov3"}
    assert {e.licence for e in ENTRIES if not e.must_accept_licence} == {"Apache-2.0"}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_layout_of_the_real_size_has_the_published_number_of_parameters(entry: KnownTeacher) -> None:
    whole = layouts(entry.family, config_of(entry))[0]
    counted = whole.shapes if entry.family == "sam2" else whole.encoder
    millions = sum(torch.Size(whole.shapes[key]).numel() for key in counted) / 1e6
    assert millions == pytest.approx(PUBLISHED[entry.name], rel=0.006)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_layout_gives_every_weight_of_the_backbone_in_its_shape(entry: KnownTeacher) -> None:
    with torch.device("meta"):
        backbone = build_backbone(entry.family, config_of(entry))
    wanted = {f"encoder.{key}": tuple(value.shape) for key, value in backbone.state_dict().items()}
    found = layouts(entry.family, config_of(entry))
    assert len({layout.name for layout in found}) == len(found) >= 2
    for layout in found:
        assert {goal: layout.shapes[key] for key, goal in layout.encoder.items()} == wanted, layout.name


@pytest.mark.parametrize(("name", "keys"), [("sam-vit-b", 314), ("sam-vit-l", 482), ("sam-vit-h", 594)])
def test_the_original_sam_files_have_these_keys(name: str, keys: int) -> None:
    """Against the names written out in tests.foundation_checkpoints, at the real sizes (meta device)."""
    entry = CATALOGUE[name]
    with torch.device("meta"):
        theirs = original_sam(SamModel(SamConfig(vision_config=dict(config_of(entry)))))
    layout = next(item for item in layouts("sam", config_of(entry)) if item.name == "segment-anything .pth")
    assert layout.faults({key: tuple(value.shape) for key, value in theirs.items()}) == []
    assert len(theirs) == len(layout.shapes) == keys


def test_the_original_vit_h_has_its_real_shapes() -> None:
    layout = next(item for item in layouts("sam", config_of(CATALOGUE["sam-vit-h"])) if ".pth" in item.name)
    assert layout.shapes["image_encoder.pos_embed"] == (1, 64, 64, 1280)
    assert layout.shapes["image_encoder.blocks.31.attn.rel_pos_h"] == (127, 80)  # global: 2 x 64 - 1
    assert layout.shapes["image_encoder.blocks.0.attn.rel_pos_h"] == (27, 80)  # window: 2 x 14 - 1
    assert layout.shapes["image_encoder.neck.2.weight"] == (256, 256, 3, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_each_kind_fits_exactly_one_layout(kind: str) -> None:
    network = model(kind)
    family, below = MODEL_TYPES[network.config.model_type]
    whole = network.config.to_dict()
    found = layouts(family, encoder_config(family, whole[below] if below else whole), whole)
    shapes = {key: tuple(value.shape) for key, value in hub_tensors(kind, network).items()}
    fitting = [layout.name for layout in found if not layout.faults(shapes)]
    assert fitting == [f"Hugging Face {kind}"]


def test_the_names_of_transformers_5_are_a_layout_too() -> None:
    for kind in ("Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel"):
        network = model(kind)
        family, _ = MODEL_TYPES[network.config.model_type]
        shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        found = layouts(family, encoder_config(family, network.config.to_dict()))
        assert [item.name for item in found if not item.faults(shapes)] == [
            f"Hugging Face {kind}, names of transformers 5"
        ]


def test_faults_name_every_missing_unexpected_and_wrongly_shaped_key() -> None:
    layout = layouts("sam", config_of(CATALOGUE["sam-vit-b"]))[1]
    shapes = dict(layout.shapes)
    del shapes["vision_encoder.layers.3.attn.qkv.weight"]
    shapes["vision_encoder.layers.4.attn.kqv.weight"] = shapes.pop("vision_encoder.layers.4.attn.qkv.weight")
    shapes["vision_encoder.pos_embed"] = (1, 32, 32, 768)
    assert layout.faults(shapes) == [
        "missing: vision_encoder.layers.3.attn.qkv.weight (2304, 768)",
        "missing: vision_encoder.layers.4.attn.qkv.weight (2304, 768)",
        "unexpected: vision_encoder.layers.4.attn.kqv.weight (2304, 768)",
        "wrong shape: vision_encoder.pos_embed is (1, 32, 32, 768), not (1, 64, 64, 768)",
    ]


def test_one_of_two_copies_may_be_absent_but_not_both() -> None:
    layout = layouts("sam", config_of(CATALOGUE["sam-vit-b"]))[0]
    assert len(layout.copies) == 2
    for absent in layout.copies:
        assert not layout.faults({key: shape for key, shape in layout.shapes.items() if key != absent})
    neither = {key: shape for key, shape in layout.shapes.items() if key not in layout.copies}
    assert [line.split()[0] for line in layout.faults(neither)] == ["missing:", "missing:"]


def test_pixel_statistics_are_no_weights() -> None:
    layout = next(item for item in layouts("sam", config_of(CATALOGUE["sam-vit-b"])) if ".pth" in item.name)
    assert not layout.faults({**layout.shapes, "pixel_mean": (3, 1, 1), "pixel_std": (3, 1, 1)})


def test_renaming_is_one_to_one() -> None:
    keys = layouts("sam", config_of(CATALOGUE["sam-vit-b"]))[0].shapes
    renamed = {original_sam_key(key) for key in keys if not key.startswith("shared_image_embedding")}
    assert len(renamed) == len(keys) - 1
    assert not [key for key in renamed if re.search(r"layer_norm|proj_in|\.mask_embed|upscale", key)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_transformers_refuses_is_named(family: str) -> None:
    key = "fpn_hidden_size" if family == "sam2" else "hidden_size"
    with pytest.raises(ArtefactError, match=rf"none of a {family} encoder.*{key}"):
        encoder_config(family, {key: "wide"})


def test_two_configs_are_one_architecture_whatever_their_training_settings() -> None:
    plain = encoder_config("dinov2", {"hidden_size": 384, "drop_path_rate": 0.3, "initializer_range": 0.5})
    assert plain == encoder_config("dinov2", {"hidden_size": 384})
    assert plain != encoder_config("dinov2", {"hidden_size": 384, "layer_norm_eps": 1e-5})


def test_the_benchmark_can_see_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its table says 0 where nothing differs: here one weight of the imported encoder does."""
    from simulations.benchmark import imports

    def changed(checkpoint: Checkpoint, identity: Identity) -> dict[str, torch.Tensor]:
        tensors = teacher_tensors(checkpoint, identity)
        key = "encoder.vision_encoder.encoder.layer.3.mlp.fc1.weight"
        return {**tensors, key: tensors[key].flip(0)}

    assert imports.output_difference("dinov2", "Hugging Face Dinov2Model") <= 1e-5
    imports.output_difference.cache_clear()
    monkeypatch.setattr(imports, "teacher_tensors", changed)
    assert imports.output_difference("dinov2", "Hugging Face Dinov2Model") > 1e-3
    imports.output_difference.cache_clear()


def test_the_benchmark_names_the_refused_keys() -> None:
    from simulations.benchmark.imports import refused_keys

    told = refused_keys(layouts("dinov3", config_of(CATALOGUE["dinov3-vitl16"]))[0])
    assert [line.split(":")[0] for line in told] == ["missing", "missing", "unexpected"]
