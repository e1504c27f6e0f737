"""A warm start is made of public images alone, is one file for all sites, and teaches something."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from common import checkpoints
from common.config import load_recipe
from common.errors import ArtefactError
from common.recipe import Anatomy
from common.teacher import initial_adapter, resident_teacher, shipped_teacher
from server.planning import build_plan
from simulations import warm_start
from simulations.pretrain import head_dice
from simulations.public_hospitals import hospital_bank, hospital_scene, random_scanner
from simulations.scenes import KINDS, TARGETS

BASE, SIZE = "ward-sam-tiny", 64
opened: list[str] | None = None


def _listen(event: str, given: tuple[object, ...]) -> None:
    if event == "open" and opened is not None:
        opened.append(str(given[0]))


sys.addaudithook(_listen)  # of the interpreter: no way of opening a file goes round it


@contextmanager
def openings() -> Iterator[list[str]]:
    global opened
    opened = []
    try:
        yield opened
    finally:
        opened = None


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(warm_start, "IMAGES", 8)
    monkeypatch.setattr(warm_start, "HELD_OUT", 4)
    monkeypatch.setattr(warm_start, "BATCH", 4)
    monkeypatch.setenv(checkpoints.VARIABLE, str(tmp_path))
    return tmp_path


def made(folder: Path, name: str = "warm", seed: int = 3) -> dict[str, object]:
    return warm_start.make(BASE, name, Anatomy.lesions, (seed, 2, SIZE), folder)


@pytest.mark.parametrize("anatomy", [Anatomy.lesions, Anatomy.cells])
def test_a_public_scene_shows_what_its_targets_say(anatomy: Anatomy) -> None:
    for number in range(12):
        scene = hospital_scene(np.random.default_rng(number), SIZE, anatomy)
        shape = TARGETS.index({"lesions": "region", "cells": "blob"}[anatomy])
        solid = scene.targets[shape]
        bright, dark = (scene.targets[TARGETS.index(name)] for name in ("bright", "dark"))
        assert 0 < solid.mean() < 1
        assert np.array_equal(solid, bright | dark)
        assert not (bright.any() and dark.any())
        if solid.sum() > 60:  # a smaller one may drown in speckle
            difference = float(scene.image[solid].mean()) - float(scene.image[~solid].mean())
            assert (difference > 0) == bright.any(), number
    assert KINDS[scene.kind] == {"lesions": "regions", "cells": "cells"}[anatomy]


def test_scanners_are_drawn_wide_and_are_nobodys() -> None:
    """No site of any recipe has one of them, and the draws reach beyond the sites' on either side."""
    drawn = [random_scanner(np.random.default_rng(seed)) for seed in range(300)]
    sites = [site.phantom.scanner for site in load_recipe("phantom-dp").sites if site.phantom is not None]
    assert len(sites) == 3
    assert not set(map(repr, drawn)) & set(map(repr, sites))
    for name in ("gain", "gamma", "blur", "speckle", "contrast"):
        values = [getattr(one, name) for one in drawn]
        own = [getattr(one, name) for one in sites]
        assert min(values) < min(own), name
        assert max(own) < max(values), name


def test_a_bank_is_a_function_of_its_seed() -> None:
    first, again = (hospital_bank(5, 3, SIZE, Anatomy.lesions) for _ in range(2))
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    other = hospital_bank(6, 3, SIZE, Anatomy.lesions)
    assert not np.array_equal(first[0], other[0])
    longer = hospital_bank(5, 4, SIZE, Anatomy.lesions)
    assert np.array_equal(longer[0][:3], first[0])


def test_no_image_of_anybody_is_opened(tmp_path: Path) -> None:
    """Whatever a warm start opens is a file of code, or the weights and the card of the teacher before it."""
    made(tmp_path)  # code is loaded here
    with openings() as found:
        made(tmp_path, "again")
    outside = {Path(name) for name in found} - {
        checkpoints.FOLDER / f"{BASE}.{suffix}" for suffix in ("json", "safetensors")
    }
    assert found
    outside = {path for path in outside if path != tmp_path and path.suffix != ".py"}
    assert {path.name.strip(".").split(".")[0] for path in outside} == {"again"}
    assert all(tmp_path in path.parents for path in outside)


def test_the_same_seed_makes_the_same_file_and_another_seed_another(tmp_path: Path) -> None:
    digests = []
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        torch.manual_seed(np.random.default_rng().integers(1 << 30))  # whatever ran before
        digests.append(made(tmp_path, name, seed)["sha256"])
    assert digests[0] == digests[1] != digests[2]


def test_every_site_starts_from_the_one_file_that_the_plan_names(tmp_path: Path) -> None:
    card = made(tmp_path)
    recipe = load_recipe("phantom-dp", ["teacher.name=warm"])
    plan = build_plan(recipe, "run")
    assert plan.models["warm"] == card["sha256"]
    start = initial_adapter(plan.teacher, plan.data, plan.seed)
    assert start.base_sha256 == card["sha256"]
    cold = load_recipe("phantom-dp", [f"teacher.name={BASE}"]).teacher
    before = initial_adapter(cold, plan.data, plan.seed)
    assert start.tensors.keys() == before.tensors.keys()
    assert any(not torch.equal(start.tensors[name], before.tensors[name]) for name in start.tensors)
    # What is frozen was warmed too, and comes with the file: an adapter does not carry it.
    encoders = [resident_teacher(one, plan.data).network.encoder.state_dict() for one in (plan.teacher, cold)]
    assert any(not torch.equal(encoders[0][name], encoders[1][name]) for name in encoders[0])


def test_it_learns_from_the_public_bank() -> None:
    bank = warm_start.public_bank(1, 8, SIZE, Anatomy.lesions)
    network = shipped_teacher(BASE, SIZE)
    before = head_dice(lambda image: network(image).logits, bank)["region"]
    warm_start.warm(network, bank, 30, 0)
    assert head_dice(lambda image: network(image).logits, bank)["region"] > before + 0.1


def test_the_shipped_one_says_how_to_make_it_again() -> None:
    """To make it takes minutes; what is held here is that the card is of this code and this base."""
    card = checkpoints.card("ward-sam-tiny-lesions")
    assert card["warmed_from"] == {"name": BASE, "sha256": checkpoints.base_sha256(BASE)}
    assert card["steps"] == warm_start.STEPS
    bank = warm_start.public_bank(99, 20, SIZE, Anatomy.lesions)
    dice = {}
    for name in (BASE, "ward-sam-tiny-lesions"):
        network = shipped_teacher(name, SIZE)
        dice[name] = head_dice(lambda image, network=network: network(image).logits, bank)["region"]  # type: ignore[misc]
    assert dice["ward-sam-tiny-lesions"] > dice[BASE] + 0.3


def test_a_shipped_name_and_an_unknown_teacher_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ArtefactError, match="shipped model"):
        made(tmp_path, BASE)
    with pytest.raises(SystemExit) as ended:
        warm_start.main(["nobody", "warm"])
    assert ended.value.code == ArtefactError.exit_code
    assert "no shipped model 'nobody'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_its_card_says_how_it_was_made(tmp_path: Path) -> None:
    card = made(tmp_path)
    assert card["warmed_from"] == {"name": BASE, "sha256": checkpoints.base_sha256(BASE)}
    assert "no real image" in str(card["trained_on"])
    command = str(card["reproduce"]).split()
    assert command[:3] == ["python", "-m", "simulations.warm_start"]
    warm_start.main([*command[3:], "--folder", str(tmp_path / "again")])
    made_again = (tmp_path / "again" / "warm.safetensors").read_bytes()
    assert made_again == (tmp_path / "warm.safetensors").read_bytes()
