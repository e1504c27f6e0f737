"""`wardround teacher import` as a user runs it: what it prints, its exit codes, and using what it made."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from common import checkpoints
from common.config import load_recipe
from common.errors import ConfigError
from common.foundation.catalogue import CATALOGUE
from common.foundation.layouts import layouts
from common.names import TEACHERS
from tests.e2e import walks
from tests.foundation_checkpoints import hub_tensors, model, weightless, write_folder
from wardround import main

pytestmark = pytest.mark.usefixtures("elsewhere", "no_teachers")


@pytest.fixture
def no_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(checkpoints.VARIABLE, raising=False)
    checkpoints.card.cache_clear()
    yield
    checkpoints.card.cache_clear()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["teacher", *arguments])


def dinov2() -> str:
    return checkpoint("Dinov2Model")


def checkpoint(kind: str) -> str:
    network = model(kind)
    return str(write_folder(Path("tiny"), network, hub_tensors(kind, network)))


def original_pth(name: str, file: str) -> dict[str, torch.Tensor]:
    """The whole state dict of an original SAM at its real shapes, written without one key and one renamed."""
    layout = next(
        item for item in layouts("sam", CATALOGUE[name].config) if item.name == "segment-anything .pth"
    )
    state = weightless(layout.shapes)
    del state["image_encoder.blocks.1.norm1.weight"]
    state["image_encoder.blocks.2.attention.qkv.weight"] = state.pop("image_encoder.blocks.2.attn.qkv.weight")
    torch.save(state, file)
    return state


def test_an_import_says_how_to_use_the_teacher_and_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("import", dinov2(), "my teachers", "--as", "mine")
    assert result.exit_code == 0, result.output
    folder = Path("my teachers").resolve()
    assert f"export WARDROUND_TEACHERS='{folder}'" in result.stdout
    assert "teacher.name=mine" in result.stdout
    with pytest.raises(ConfigError, match="'mine'"):
        load_recipe("smoke", ["teacher.name=mine"])
    monkeypatch.setenv(checkpoints.VARIABLE, str(folder))
    assert load_recipe("smoke", ["teacher.name=mine"]).teacher.name == "mine"
    listed = run("list")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == [*TEACHERS, "mine"]
    assert not listed.stderr


@pytest.mark.parametrize("kind", ["SamModel", "Sam2Model", "Dinov2Model"])
def test_a_whole_run_with_an_imported_teacher(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From images to students: tokens of other widths and strides, decoders that start untrained."""
    assert run("import", checkpoint(kind), "teachers", "--as", "mine").exit_code == 0
    monkeypatch.setenv(checkpoints.VARIABLE, "teachers")
    result = walks.invoke(
        "simulate", "smoke", "teacher.name=mine", "baselines=[local_only,local_only_scratch]", "--out", "run"
    )
    assert result.exit_code == 0, result.output
    report = walks.report_of(Path("run"))
    assert report.teacher.name == "mine"
    assert report.teacher.base_sha256 == checkpoints.base_sha256("mine")
    assert not [rejection for one in report.rounds for rejection in one.rejected]
    assert len(report.students) == len(report.sites) == 2


def test_a_recipe_names_an_imported_teacher_without_loading_torch() -> None:
    run("import", dinov2(), "teachers", "--as", "mine")
    script = (
        "import sys\n"
        "from common.config import load_recipe; load_recipe('smoke', ['teacher.name=mine'])\n"
        "assert 'torch' not in sys.modules"
    )
    environment = walks.environment(WARDROUND_TEACHERS="teachers")
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["sam-vit-b", "sam-vit-l", "sam-vit-h"])
def test_a_removed_and_a_renamed_key_are_named_and_exit_12(name: str) -> None:
    """An original .pth of the real size and key set."""
    original_pth(name, "weights.pth")
    result = run("import", "weights.pth", "teachers", "--model", name)
    assert result.exit_code == 12
    assert "3 keys do not fit" in result.stderr
    told = [line.strip(" -").split(" (")[0] for line in result.stderr.splitlines()[1:]]
    assert sorted(told) == [
        "missing: image_encoder.blocks.1.norm1.weight",
        "missing: image_encoder.blocks.2.attn.qkv.weight",
        "unexpected: image_encoder.blocks.2.attention.qkv.weight",
    ]
    assert not Path("teachers").exists()


def test_what_is_no_checkpoint_exits_with_12() -> None:
    Path("notes.pth").write_text("hello")
    result = run("import", "notes.pth", "teachers", "--model", "sam-vit-b")
    assert result.exit_code == 12
    assert "notes.pth" in result.stderr


def test_a_hub_id_that_is_not_cached_exits_with_12_and_names_the_fix() -> None:
    result = run("import", "facebook/no-such-model", "teachers")
    assert result.exit_code == 12
    assert "--download" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere.pth",), "no file or folder nowhere.pth"),
        (("tiny", "--model", "sam"), "no model 'sam'"),
        (("tiny", "--as", "a/b"), "cannot name a teacher"),
        (("tiny", "--as", "taken"), "--replace"),
        (("dinov3-vitl16",), "--accept-licence"),
    ],
)
def test_a_wrong_call_exits_with_2(arguments: tuple[str, ...], words: str) -> None:
    dinov2()
    Path("teachers").mkdir()
    Path("teachers/taken.json").write_text("{}")
    result = run("import", arguments[0], "teachers", *arguments[1:])
    assert result.exit_code == 2
    assert words in result.stderr


def test_the_card_is_one_json_document() -> None:
    result = run("import", dinov2(), "teachers", "--json")
    card = json.loads(result.stdout)
    assert card == json.loads(Path("teachers/tiny.json").read_text())


def test_a_name_defined_twice_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("one", "two"):
        assert run("import", dinov2(), folder, "--as", "mine").exit_code == 0
    monkeypatch.setenv(checkpoints.VARIABLE, "one:two")
    result = run("list", "--json")
    assert "warning: mine in two is not used: one has one too" in result.stderr
    assert [card["name"] for card in json.loads(result.stdout)] == [*TEACHERS, "mine"]


def test_the_known_checkpoints_are_listed_with_their_licence() -> None:
    known = json.loads(run("list", "--known", "--json").stdout)
    assert [entry["name"] for entry in known] == list(CATALOGUE)
    plain = run("list", "--known").stdout
    assert "LicenseRef-DINOv3" in plain
    assert len(plain.splitlines()) == len(CATALOGUE)
