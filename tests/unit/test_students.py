"""The student: it can say 'nothing there', and its file says what it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from client.losses import segmentation_loss
from client.students import STUDENTS, UNetXS, build_student, load_student, save_student
from common.errors import ArtefactError
from common.recipe import ClassConfig, DataConfig

DATA = DataConfig(image_size=32, classes=[ClassConfig("cell", 255, "blob")])


def test_an_all_background_image_can_be_represented() -> None:
    """One empty and one full image: a head whose output is normalised an image cannot tell them apart."""
    torch.manual_seed(0)
    student = UNetXS(1)
    images = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)]) + 0.05 * torch.rand(2, 3, 32, 32)
    images[1, :, ::2] -= 0.5  # another texture: instance norm removes mere brightness
    masks = torch.stack([torch.zeros(1, 32, 32), torch.ones(1, 32, 32)])
    optimiser = torch.optim.Adam(student.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        segmentation_loss(student(images), masks, False).backward()
        optimiser.step()
    share = (student(images) > 0).float().mean((1, 2, 3))
    assert share[0] < 0.02
    assert share[1] > 0.98


def test_the_unrolled_body_is_monais_own_forward() -> None:
    student = UNetXS(3).eval()
    image = torch.rand(2, 3, 64, 64)
    expected = student.head(student.body((image - 0.45) / 0.25))
    assert torch.equal(student(image), expected)
    output = student.outputs(image)
    assert torch.equal(output.logits, expected)
    assert output.deep.shape == (2, student.deep_channels, 8, 8)
    assert output.late.shape == (2, student.late_channels, 32, 32)


@pytest.mark.parametrize("name", STUDENTS)
def test_no_student_carries_statistics(name: str) -> None:
    assert list(STUDENTS[name](1).buffers()) == []


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
    del old["exclusive"], old["classes"][0]["also"]
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
