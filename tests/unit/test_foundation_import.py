"""Import of official checkpoints: what comes out computes what transformers' own model computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import checkpoints
from common.foundation.catalogue import CATALOGUE, IMAGENET_MEAN
from common.foundation.importing import ImportOptions, import_teacher
from common.foundation.layouts import layouts
from common.teacher import HEADS, shipped_teacher
from tests.foundation_checkpoints import (
    KINDS,
    difference,
    folder_of,
    hub_tensors,
    model,
    original_sam,
    weightless,
    write_folder,
    write_shards,
)

ANY = ImportOptions(accept_licence=True)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_equal_those_of_transformers_own_model(kind: str, tmp_path: Path, teachers: Path) -> None:
    card = import_teacher(str(folder_of(kind, tmp_path)), teachers, ANY)
    assert card["source_layout"] == f"Hugging Face {kind}"
    assert difference(kind, card["name"]) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_saves_itself_is_taken(kind: str, tmp_path: Path, teachers: Path) -> None:
    model(kind).save_pretrained(tmp_path / "saved")
    import_teacher(str(tmp_path / "saved"), teachers, ANY)
    assert difference(kind, "saved") <= 1e-5


@pytest.mark.parametrize("kind", ["SamModel", "Dinov2Model"])
@pytest.mark.parametrize("form", ["shards", "bin", "bin shards", "old pickle"])
def test_every_file_form_gives_the_same_teacher(form: str, kind: str, tmp_path: Path, teachers: Path) -> None:
    network = model(kind)
    tensors = hub_tensors(kind, network)
    plain = import_teacher(str(write_folder(tmp_path / "plain", network, tensors)), teachers, ANY)
    folder = write_shards(tmp_path / "other", network, tensors)
    index = folder / "model.safetensors.index.json"
    if form == "bin shards":
        table = json.loads(index.read_text().replace(".safetensors", ".bin"))
        for file in folder.glob("*.safetensors"):
            torch.save(load_file(file), file.with_suffix(".bin"))
            file.unlink()
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(table))
    if form in ("bin", "old pickle"):
        for file in folder.glob("*.safetensors"):
            file.unlink()
        zipped = form == "bin"
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    if form != "shards":
        index.unlink()
    other = import_teacher(str(folder), teachers, ANY)
    assert other["sha256"] == plain["sha256"]
    assert len(other["source_sha256"]) == (2 if "shards" in form else 1)


@pytest.mark.usefixtures("small_sam")
@pytest.mark.parametrize("part", ["whole", "encoder only"])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_an_original_pth_becomes_the_same_function(
    wrapper: str | None, part: str, tmp_path: Path, teachers: Path
) -> None:
    state = original_sam(model("SamModel, usual decoder"))
    if part == "encoder only":
        state = {key: value for key, value in state.items() if key.startswith("image_encoder.")}
    torch.save({wrapper: state} if wrapper else state, tmp_path / "sam.pth")
    card = import_teacher(str(tmp_path / "sam.pth"), teachers, ImportOptions(model="medsam-vit-b"))
    suffix = "" if part == "whole" else ", encoder only"
    assert card["source_layout"] == f"segment-anything .pth{suffix}"
    assert card["preprocessing"] == {
        "mean": [0.0] * 3, "std": [1.0] * 3, "channel_order": "RGB", "range": [0, 1],
    }  # fmt: skip
    assert difference("SamModel, usual decoder", "medsam-vit-b") <= 1e-5


def test_a_whole_original_vit_b_pth_is_taken(tmp_path: Path, teachers: Path) -> None:
    """All 314 keys at their real shapes; the weights are one number each."""
    layout = next(
        item for item in layouts("sam", CATALOGUE["sam-vit-b"].config) if item.name == "segment-anything .pth"
    )
    state = weightless({**layout.shapes, "pixel_mean": (3, 1, 1), "pixel_std": (3, 1, 1)})
    torch.save(state, tmp_path / "sam_vit_b_01ec64.pth")
    assert (tmp_path / "sam_vit_b_01ec64.pth").stat().st_size < 300_000
    options = ImportOptions(model="sam-vit-b")
    card = import_teacher(str(tmp_path / "sam_vit_b_01ec64.pth"), teachers, options)
    assert card["keys"] == {"mapped": 177, "left_out": 139}
    assert card["image_size"] == 1024
    assert card["preprocessing"]["mean"] == list(IMAGENET_MEAN)
    shapes = {k: tuple(v.shape) for k, v in load_file(teachers / "sam-vit-b.safetensors").items()}
    assert shapes["encoder.vision_encoder.layers.11.attn.rel_pos_h"] == (127, 64)


def test_a_file_without_a_config_is_told_by_its_shapes(tmp_path: Path, teachers: Path) -> None:
    layout = layouts("dinov2", CATALOGUE["dinov2-small"].config)[0]
    tensors = {key: value.contiguous() for key, value in weightless(layout.shapes).items()}
    save_file(tensors, tmp_path / "weights.safetensors")
    card = import_teacher(str(tmp_path / "weights.safetensors"), teachers, ImportOptions())
    assert (card["name"], card["identified_by"]) == ("dinov2-small", "shapes")
    assert card["params"] > sum(value.numel() for value in tensors.values())


def test_the_encoder_is_taken_bit_for_bit_and_the_decoder_is_reproducible(
    tmp_path: Path, teachers: Path
) -> None:
    folder = folder_of("Dinov2Model", tmp_path)
    first = import_teacher(str(folder), teachers, ImportOptions(name="first"))
    torch.manual_seed(5)
    second = import_teacher(str(folder), teachers, ImportOptions(name="second"))
    assert first["sha256"] == second["sha256"]
    saved = load_file(teachers / "first.safetensors")
    for key, value in model("Dinov2Model").state_dict().items():
        assert torch.equal(saved[f"encoder.vision_encoder.{key}"], value)
    assert {key.split(".")[0] for key in saved} == {"encoder", "decoder"}
    assert saved["decoder.head.weight"].shape[0] == len(HEADS)


def test_an_import_draws_no_number_from_the_global_generator(tmp_path: Path, teachers: Path) -> None:
    folder = folder_of("Dinov2Model", tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    import_teacher(str(folder), teachers, ANY)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("kind", ["SamModel", "Sam2Model", "Dinov2Model", "DINOv3ViTModel"])
def test_an_imported_teacher_works_at_other_image_sizes(kind: str, tmp_path: Path, teachers: Path) -> None:
    card = import_teacher(str(folder_of(kind, tmp_path)), teachers, ANY)
    teacher = shipped_teacher(card["name"], 96).eval()
    with torch.inference_mode():
        out = teacher(torch.rand(1, 3, 96, 96))
    assert out.logits.shape == (1, len(HEADS), 96, 96)
    assert out.logits.isfinite().all()


def test_the_card_has_the_fields_of_a_shipped_one(tmp_path: Path, teachers: Path) -> None:
    card = import_teacher(str(folder_of("SamModel", tmp_path)), teachers, ANY)
    shipped = checkpoints.card("ward-sam-tiny")
    wanted = {
        "name", "kind", "params", "image_size", "encoder", "preprocessing", "multi_scale", "heads",
        "licence", "trained_on", "intended_use", "sha256", "bytes",
    }  # fmt: skip
    assert wanted <= set(card) & set(shipped)
    assert wanted | {
        "source",
        "source_sha256",
        "source_layout",
        "identified_by",
        "keys",
        "decoder_seed",
    } == set(card)
    assert checkpoints.card(card["name"]) == card == json.loads((teachers / "SamModel.json").read_text())
    assert str(tmp_path) not in json.dumps(card)  # a card travels
    assert card["encoder"]["config"]["initializer_range"] == 0.02


def test_an_unlisted_model_takes_its_own_preprocessing(tmp_path: Path, teachers: Path) -> None:
    processor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]}
    card = import_teacher(str(folder_of("Dinov2Model", tmp_path, processor=processor)), teachers, ANY)
    assert card["preprocessing"]["mean"] == [0.5, 0.4, 0.3]
    assert card["preprocessing"]["std"] == [0.2, 0.2, 0.2]
    assert card["licence"].startswith("not stated")
    assert "not in the catalogue" in card["identified_by"]
