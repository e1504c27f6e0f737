"""The shipped teacher, its resident copy, and other image sizes."""

from __future__ import annotations

import pytest
import torch

import common.teacher as teacher_module
from common import checkpoints, names
from common.errors import ArtefactError
from common.recipe import ClassConfig, DataConfig, TeacherConfig
from common.teacher import HEADS, initial_adapter, resident_teacher, shipped_teacher
from simulations.scenes import TARGETS

DATA = DataConfig(image_size=64, classes=[ClassConfig("a", 1, "blob"), ClassConfig("b", 2, "vessel")])


def test_output_shapes_and_heads_follow_the_classes() -> None:
    teacher = resident_teacher(TeacherConfig(), DATA)
    with teacher.visit(initial_adapter(TeacherConfig(), DATA, 0)) as network, torch.inference_mode():
        output = network(torch.rand(2, 3, 64, 64))
    assert output.logits.shape == (2, 2, 64, 64)
    assert output.tokens.shape == (2, 96, 8, 8)
    assert output.feature.shape == (2, 32, 32, 32)


def test_round_zero_is_the_shipped_teacher() -> None:
    image = torch.rand(2, 3, 64, 64)
    teacher = resident_teacher(TeacherConfig(), DATA)
    shipped = shipped_teacher("ward-sam-tiny", 64).eval()
    with torch.inference_mode():
        with teacher.visit(initial_adapter(TeacherConfig(), DATA, 0)) as network:
            ours = network(image).logits
        rows = [HEADS.index("blob"), HEADS.index("vessel")]
        assert torch.allclose(ours, shipped(image).logits[:, rows], atol=1e-4)


def test_one_process_builds_one_teacher() -> None:
    resident_teacher(TeacherConfig(), DATA)
    built = teacher_module.teachers_built
    for steps in (1, 2, 3):
        resident_teacher(TeacherConfig(steps=steps, learning_rate=steps / 10), DATA)
    assert teacher_module.teachers_built == built


def test_position_tables_are_interpolated_not_made_anew() -> None:
    large, small = shipped_teacher("ward-sam-tiny", 96), shipped_teacher("ward-sam-tiny", 64)
    old = large.encoder.vision_encoder.pos_embed
    new = small.encoder.vision_encoder.pos_embed
    assert new.shape == (1, 8, 8, 128)
    assert torch.allclose(old.mean((1, 2)), new.mean((1, 2)), atol=0.02)
    assert small(torch.rand(1, 3, 64, 64)).logits.shape == (1, 5, 64, 64)


def test_an_image_size_off_the_windows_is_refused() -> None:
    with pytest.raises(ArtefactError, match="multiples of 32"):
        shipped_teacher("ward-sam-tiny", 72)


def test_the_initial_adapter_is_the_same_for_a_seed_and_another_for_another() -> None:
    first, again, other = (initial_adapter(TeacherConfig(), DATA, seed).digest for seed in (0, 0, 1))
    assert first == again != other


def test_the_encoder_is_not_numerically_dead() -> None:
    """transformers' default initializer_range (1e-10) would leave it so; the config sets its own."""
    teacher = shipped_teacher("ward-sam-tiny", 96)
    with torch.inference_mode():
        tokens = teacher(torch.rand(2, 3, 96, 96)).tokens
    assert tokens.std() > 0.05


@pytest.mark.parametrize("name", checkpoints.names())
def test_shipped_weights_are_their_cards_and_small_enough(name: str) -> None:
    card = checkpoints.card(name)
    limit = {"teacher": 8, "student": 4, "generator": 4}[card["kind"]]
    assert card["bytes"] <= limit * 2**20
    assert card["licence"] == "Apache-2.0"
    assert sum(t.numel() for t in checkpoints.load_tensors(name).values()) >= card["params"]


def test_scenes_and_heads_name_the_same_structures_in_the_same_order() -> None:
    assert TARGETS == HEADS


def test_the_shipped_models_are_those_of_the_recipe() -> None:
    assert checkpoints.names() == sorted([*names.SHIPPED_STUDENTS, *names.GENERATORS, *names.TEACHERS])


def test_changed_weights_are_refused(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    for suffix in ("json", "safetensors"):
        source = checkpoints.FOLDER / f"unet-xs.{suffix}"
        (tmp_path / source.name).write_bytes(source.read_bytes() + (b" " if suffix == "safetensors" else b""))
    monkeypatch.setattr(checkpoints, "FOLDER", tmp_path)
    checkpoints.card.cache_clear()
    try:
        with pytest.raises(ArtefactError, match="not those of its card"):
            checkpoints.card("unet-xs")
    finally:
        checkpoints.card.cache_clear()


def test_an_unknown_model_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ArtefactError, match="ward-sam-tiny"):
        checkpoints.card("sam-enormous")
