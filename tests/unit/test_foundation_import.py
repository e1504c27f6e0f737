"""Import of official checkpoints: what comes out computes what transformers' own model computes."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from common import checkpoints
from common.errors import ArtefactError, UsageError
from common.foundation.catalogue import CATALOGUE, IMAGENET_MEAN
from common.foundation.importing import ImportOptions, import_teacher
from common.foundation.layouts import layouts
from common.teacher import HEADS, shipped_teacher
from tests.foundation_checkpoints import (
    KINDS,
    SIDE,
    hub_tensors,
    model,
    original_sam,
    reference_tokens,
    weightless,
    write_folder,
    write_shards,
)

ANY = ImportOptions(accept_licence=True)


@pytest.fixture(autouse=True)
def teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder into which teachers are imported, and where they are looked for."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(checkpoints.VARIABLE, str(tmp_path / "teachers"))
    checkpoints.card.cache_clear()
    yield tmp_path / "teachers"
    checkpoints.card.cache_clear()


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


@pytest.fixture
def small_sam(monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalogue whose only SAM models are the small one and the small MedSAM."""
    from common.foundation import importing
    from tests.foundation_checkpoints import SAM_USUAL

    changed = {}
    for name in ("sam-vit-b", "medsam-vit-b"):
        fields = {**vars(CATALOGUE[name]), "config": SAM_USUAL, "image_size": SIDE}
        changed[name] = type(CATALOGUE[name])(**fields)
    monkeypatch.setattr(importing, "CATALOGUE", changed)


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


def damaged(kind: str) -> tuple[dict[str, torch.Tensor], set[str]]:
    """A checkpoint with one key removed and one renamed, and the three names that must be told."""
    tensors = hub_tensors(kind, model(kind))
    removed, renamed = [key for key in tensors if key.endswith("norm1.weight")][1:3]
    del tensors[removed]
    tensors[f"{renamed}_"] = tensors.pop(renamed)
    return tensors, {f"missing: {removed}", f"missing: {renamed}", f"unexpected: {renamed}_"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_removed_and_a_renamed_key_are_both_named(kind: str, tmp_path: Path, teachers: Path) -> None:
    tensors, told = damaged(kind)
    folder = write_folder(tmp_path / "damaged", model(kind), tensors)
    with pytest.raises(ArtefactError, match="3 keys do not fit") as caught:
        import_teacher(str(folder), teachers, ANY)
    assert {line.rsplit(" (")[0] for line in caught.value.faults} == told
    assert not teachers.exists()


def test_destination_is_untouched_by_a_checkpoint_that_is_refused(tmp_path: Path, teachers: Path) -> None:
    folder = folder_of("Dinov2Model", tmp_path)
    import_teacher(str(folder), teachers, ImportOptions(name="mine"))
    before = {path.name: path.read_bytes() for path in teachers.iterdir()}
    tensors, _ = damaged("Dinov2Model")
    broken = write_folder(tmp_path / "broken", model("Dinov2Model"), tensors)
    with pytest.raises(ArtefactError):
        import_teacher(str(broken), teachers, ImportOptions(name="mine", replace=True))
    with pytest.raises(UsageError, match="--replace"):
        import_teacher(str(folder), teachers, ImportOptions(name="mine"))
    assert {path.name: path.read_bytes() for path in teachers.iterdir()} == before
    import_teacher(str(folder), teachers, ImportOptions(name="mine", replace=True))


class Calls:
    """A pickle of it runs a command when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


def write_code(path: Path) -> None:
    torch.save({"weight": Calls(path.with_name("it-ran"))}, path)


BAD_FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "text as pth": ("a.pth", lambda path: path.write_text("not a checkpoint"), "is damaged"),
    "text as safetensors": ("a.safetensors", lambda path: path.write_text("no"), "no safetensors file"),
    "a pickle that runs code": ("a.pth", write_code, "nothing in it was run"),
    "a plain pickle": (
        "a.pth",
        lambda path: path.write_bytes(pickle.dumps({1: {2}})),
        "nothing in it was run",
    ),
    "an empty file": ("a.bin", lambda path: path.write_bytes(b""), "is damaged"),
    "a single tensor": ("a.pth", lambda path: torch.save(torch.zeros(2), path), "not a state dict"),
    "no tensors": ("a.pth", lambda path: torch.save({"epoch": 3}, path), "epoch: int"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_no_checkpoint_is_refused_in_words(case: str, tmp_path: Path, teachers: Path) -> None:
    name, write, words = BAD_FILES[case]
    write(tmp_path / name)
    with pytest.raises(ArtefactError, match=words):
        import_teacher(str(tmp_path / name), teachers, ImportOptions())
    assert not (tmp_path / "it-ran").exists()


def test_the_pickle_of_the_test_would_run_code(tmp_path: Path) -> None:
    write_code(tmp_path / "a.pth")
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert (tmp_path / "it-ran").exists()


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, teachers: Path) -> None:
    network = model("Dinov2Model")
    tensors = hub_tensors("Dinov2Model", network)
    tensors["layernorm.weight"] = torch.full_like(tensors["layernorm.weight"], float("nan"))
    tensors["layernorm.bias"] = tensors["layernorm.bias"].long()
    with pytest.raises(ArtefactError) as caught:
        import_teacher(str(write_folder(tmp_path / "odd", network, tensors)), teachers, ANY)
    assert {fault.split()[0] for fault in caught.value.faults} == {"layernorm.weight", "layernorm.bias"}


def test_missing_shards_are_all_named(tmp_path: Path, teachers: Path) -> None:
    network = model("Dinov2Model")
    folder = write_shards(tmp_path / "parts", network, hub_tensors("Dinov2Model", network))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ArtefactError) as caught:
        import_teacher(str(folder), teachers, ANY)
    assert len(caught.value.faults) == 2
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ArtefactError, match="elsewhere"):
        import_teacher(str(folder), teachers, ANY)


def test_a_model_type_that_no_teacher_is_made_from_is_named(tmp_path: Path, teachers: Path) -> None:
    folder = folder_of("Dinov2Model", tmp_path)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ArtefactError, match="'bert'"):
        import_teacher(str(folder), teachers, ANY)
    (folder / "config.json").write_text("{")
    with pytest.raises(ArtefactError, match="not JSON"):
        import_teacher(str(folder), teachers, ANY)


def test_another_model_than_named_is_refused_with_what_differs(tmp_path: Path, teachers: Path) -> None:
    folder = folder_of("Dinov2Model", tmp_path)
    with pytest.raises(ArtefactError, match=r"hidden_size: 24 in config.json, 384 in dinov2-small"):
        import_teacher(str(folder), teachers, ImportOptions(model="dinov2-small"))
    with pytest.raises(ArtefactError, match="a dinov2 encoder, and sam-vit-b a sam one"):
        import_teacher(str(folder), teachers, ImportOptions(model="sam-vit-b"))


@pytest.mark.usefixtures("small_sam")
@pytest.mark.parametrize("form", ["file", "folder"])
def test_sam_or_medsam_must_be_said(form: str, tmp_path: Path, teachers: Path) -> None:
    network = model("SamModel, usual decoder")
    source = tmp_path / "sam"
    if form == "folder":
        write_folder(source, network, hub_tensors("SamModel", network))
    else:
        torch.save(original_sam(network), source)
    with pytest.raises(UsageError) as caught:
        import_teacher(str(source), teachers, ImportOptions())
    assert set(caught.value.faults) == {"--model sam-vit-b", "--model medsam-vit-b"}
    card = import_teacher(str(source), teachers, ImportOptions(model="medsam-vit-b", name="mine"))
    assert card["preprocessing"]["std"] == [1.0] * 3


def test_dinov3_needs_its_licence_accepted(tmp_path: Path, teachers: Path) -> None:
    """Before anything is fetched where the name tells, else before anything is written."""
    for source in (
        str(folder_of("DINOv3ViTModel", tmp_path)),
        "dinov3-vits16",
        CATALOGUE["dinov3-vits16"].hub_id,
    ):
        with pytest.raises(UsageError, match="--accept-licence"):
            import_teacher(source, teachers, ImportOptions())
    assert not teachers.exists()


def test_nothing_is_downloaded_unless_download(
    tmp_path: Path, teachers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def fake(hub_id: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append(local_files_only)
        raise LocalEntryNotFoundError("not cached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ArtefactError, match="--download"):
        import_teacher("facebook/dinov2-small", teachers, ImportOptions())
    with pytest.raises(ArtefactError, match="could not be fetched"):
        import_teacher("dinov2-small", teachers, ImportOptions(download=True))
    assert asked == [True, False]


def test_a_cached_repository_is_found_without_a_download(
    tmp_path: Path, teachers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "cache" / "models--someone--tiny-dinov2"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    network = model("Dinov2Model")
    write_folder(repository / "snapshots" / "abc123", network, hub_tensors("Dinov2Model", network))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    card = import_teacher("someone/tiny-dinov2", teachers, ImportOptions())
    assert (card["name"], card["source"]) == ("tiny-dinov2", "someone/tiny-dinov2 at abc123")
    assert difference("Dinov2Model", "tiny-dinov2") <= 1e-5


def test_a_name_must_be_free_and_a_name(tmp_path: Path, teachers: Path) -> None:
    folder = str(folder_of("Dinov2Model", tmp_path))
    for name, words in (("ward-sam-tiny", "ships with"), ("../up", "cannot name")):
        with pytest.raises(UsageError, match=words):
            import_teacher(folder, teachers, ImportOptions(name=name))
    with pytest.raises(UsageError, match=r"no model 'dinov2-smal'.*did you mean dinov2-small"):
        import_teacher(folder, teachers, ImportOptions(model="dinov2-smal"))
    with pytest.raises(UsageError, match="no file or folder"):
        import_teacher("nowhere.pth", teachers, ImportOptions())


def test_imported_teachers_are_found_by_name_and_a_shipped_name_wins(
    tmp_path: Path, teachers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(folder_of("Dinov2Model", tmp_path))
    home = tmp_path / "home" / ".wardround" / "teachers"
    import_teacher(folder, teachers, ImportOptions(name="mine"))
    import_teacher(folder, home, ImportOptions(name="mine"))
    import_teacher(folder, home, ImportOptions(name="other"))
    for suffix in ("json", "safetensors"):
        (home / f"ward-sam-tiny.{suffix}").write_bytes(
            (checkpoints.FOLDER / f"ward-sam-tiny.{suffix}").read_bytes()
        )
    (home / "notes.json").write_text("[1]")
    found = {(e.card["name"], e.folder): e.hidden_by for e in checkpoints.found_teachers()}
    assert found == {
        ("ward-sam-tiny", checkpoints.FOLDER): None,
        ("mine", teachers): None,
        ("mine", home): teachers,
        ("other", home): None,
        ("ward-sam-tiny", home): checkpoints.FOLDER,
    }
    assert checkpoints.imported_names() == ["mine", "other"]
    assert checkpoints.names() == ["unet-xs", "ward-diffusion-tiny", "ward-sam-tiny"]
    monkeypatch.delenv(checkpoints.VARIABLE)
    (home / "mine.json").unlink()
    checkpoints.card.cache_clear()
    with pytest.raises(ArtefactError, match="Imported teachers: other"):
        checkpoints.card("mine")
    with pytest.raises(ArtefactError, match="no shipped model"):
        checkpoints.card("../teachers/mine")


def test_changed_weights_of_an_imported_teacher_are_refused(tmp_path: Path, teachers: Path) -> None:
    import_teacher(str(folder_of("Dinov2Model", tmp_path)), teachers, ImportOptions(name="mine"))
    with (teachers / "mine.safetensors").open("ab") as file:
        file.write(b" ")
    with pytest.raises(ArtefactError, match=r"not those of its card.*--replace"):
        checkpoints.card("mine")
