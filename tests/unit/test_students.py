"""The student: it can say 'nothing there', and its file says what it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from client.students import UNetXS, build_student, load_student, save_student, start_of
from common.errors import ArtefactError, ConfigError
from common.names import SHIPPED_STUDENTS, STUDENTS
from common.recipe import ClassConfig, DataConfig, Start

DATA = DataConfig(image_size=32, classes=[ClassConfig("cell", 255, "blob")])


def test_pretrained_and_scratch_differ_and_repeat() -> None:
    shipped, scratch, again = (
        build_student("unet-xs", DATA, pretrained, 7) for pretrained in (True, False, False)
    )
    values = [torch.cat([p.flatten() for p in m.parameters()]) for m in (shipped, scratch, again)]
    assert not torch.equal(values[0], values[1])
    assert torch.equal(values[1], values[2])


def test_building_a_student_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    build_student("unet-xs", DATA, False, 7)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_kind_has_its_usual_start_and_takes_another(kind: str) -> None:
    ships = kind in SHIPPED_STUDENTS
    assert start_of(kind, None) is (Start.shipped if ships else Start.mae)
    assert [start_of(kind, asked) for asked in (Start.random, Start.moco)] == [Start.random, Start.moco]
    if ships:
        assert start_of(kind, Start.shipped) is Start.shipped
    else:
        with pytest.raises(ConfigError, match=r"ships no weights.*student.start=mae"):
            start_of(kind, Start.shipped)


def test_shipped_weights_that_there_are_none_of_are_refused() -> None:
    with pytest.raises(ArtefactError, match="no shipped model 'vit-tiny'"):
        build_student("vit-tiny", DATA, True, 0)
    with pytest.raises(ArtefactError, match="no student 'resnet'; there are: unet-xs"):
        build_student("resnet", DATA, False, 0)


def test_a_saved_student_predicts_the_same(tmp_path: Path) -> None:
    student = build_student("unet-xs", DATA, True, 0).eval()
    about = {"run_id": "r", "model": "student"}
    card = save_student(student, tmp_path / "s.safetensors", "unet-xs", DATA, about)
    loaded = load_student(tmp_path / "s.safetensors")
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(loaded.module(image), student(image))
    assert loaded.card == card
    assert card.data_config().classes == DATA.classes


def test_a_card_says_what_its_logits_mean(tmp_path: Path) -> None:
    """A card of an earlier version, which has no such entry, means independent classes."""
    path = tmp_path / "s.safetensors"
    data = replace(DATA, exclusive=True, classes=[ClassConfig("cell", 255, "blob", also=[3])])
    save_student(UNetXS(1), path, "unet-xs", data, {"run_id": "r", "model": "student"})
    assert load_student(path).card.data_config() == data
    old = json.loads(path.with_suffix(".json").read_text())
    del old["exclusive"], old["start"], old["classes"][0]["also"]
    path.with_suffix(".json").write_text(json.dumps(old))
    assert load_student(path).card.data_config() == DATA


@pytest.mark.parametrize("harm", ["missing card", "changed weights", "unknown name", "no json"])
def test_a_harmed_student_is_refused(tmp_path: Path, harm: str) -> None:
    path = tmp_path / "s.safetensors"
    save_student(UNetXS(1), path, "unet-xs", DATA, {"run_id": "r", "model": "student"})
    card = path.with_suffix(".json")
    if harm == "missing card":
        card.unlink()
    elif harm == "changed weights":
        path.write_bytes(path.read_bytes() + b" ")
    elif harm == "unknown name":
        card.write_text(json.dumps({**json.loads(card.read_text()), "name": "other"}))
    else:
        card.write_text("{")
    with pytest.raises(ArtefactError):
        load_student(path)
