"""Import of official checkpoints: what is refused, and in which words."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from common import checkpoints
from common.errors import ArtefactError, UsageError
from common.foundation.catalogue import CATALOGUE
from common.foundation.importing import ImportOptions, import_teacher
from tests.foundation_checkpoints import (
    KINDS,
    difference,
    folder_of,
    hub_tensors,
    model,
    original_sam,
    write_folder,
    write_shards,
)

ANY = ImportOptions(accept_licence=True)


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
    found = {(e.card["name"], e.folder): e.hidden_by for e in checkpoints.found_models()}
    assert found == {
        ("ward-sam-tiny", checkpoints.FOLDER): None,
        ("ward-sam-tiny-lesions", checkpoints.FOLDER): None,
        ("mine", teachers): None,
        ("mine", home): teachers,
        ("other", home): None,
        ("ward-sam-tiny", home): checkpoints.FOLDER,
    }
    assert checkpoints.imported_names() == ["mine", "other"]
    assert not {"mine", "other"} & set(checkpoints.names())
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
