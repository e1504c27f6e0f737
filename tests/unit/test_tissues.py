"""Scenes closer to what cameras and microscopes show."""

from __future__ import annotations

import numpy as np
import pytest

from simulations.scenes import TARGETS
from simulations.tissues import PAINTERS, Painter, fine_tree, random_tissue_scene, tissue_bank

EVERY = [pytest.param(kind, paint, id=paint.__name__) for kind, row in PAINTERS.items() for paint, _ in row]
OBJECT = {0: "vessel", 1: "blob", 2: "region"}


@pytest.mark.parametrize(("kind", "paint"), EVERY)
def test_a_scene_shows_its_kind_and_nothing_else_is_a_target(kind: int, paint: Painter) -> None:
    scenes = [paint(np.random.default_rng(seed), 96) for seed in range(12)]
    for scene in scenes:
        assert scene.image.shape == (96, 96, 3)
        assert scene.image.dtype == np.uint8
        assert scene.kind == kind
        planes = dict(zip(TARGETS, scene.targets, strict=True))
        solid = planes[OBJECT[kind]]
        # Each object is either bright or dark, and neither plane holds anything besides.
        assert (planes["bright"] | planes["dark"]).tolist() == solid.tolist()
        assert not (planes["bright"] & planes["dark"]).any()
        assert all(not planes[name].any() for name in set(OBJECT.values()) - {OBJECT[kind]})
    assert np.mean([scene.targets.any() for scene in scenes]) > 0.7


@pytest.mark.parametrize(("kind", "paint"), EVERY)
def test_objects_can_be_seen(kind: int, paint: Painter) -> None:
    """Over scenes, objects differ from their ground more than chance: a network has something to find."""
    steps = []
    for seed in range(24):
        scene = paint(np.random.default_rng(seed), 96)
        solid = scene.targets[TARGETS.index(OBJECT[kind])]
        if 30 < solid.sum() < solid.size - 30:
            grey = scene.image.mean(2)
            steps.append(abs(grey[solid].mean() - grey[~solid].mean()) / (grey.std() + 1e-6))
    assert np.mean(steps) > 0.3


def test_vessels_are_fine_and_their_width_is_told() -> None:
    cover, width = fine_tree(np.random.default_rng(3), 96)
    assert cover.min() >= 0
    assert cover.max() <= 1
    assert (width[cover > 0.5] >= 1.0).all()
    assert width.max() <= 7
    assert not width[cover == 0].any()


def test_a_bank_is_the_same_again_and_every_kind_has_its_share() -> None:
    images, targets, kinds = tissue_bank(7, 9, 64)
    again = tissue_bank(7, 9, 64)
    assert (images == again[0]).all()
    assert (targets == again[1]).all()
    assert images.shape == (9, 3, 64, 64)
    assert targets.shape == (9, len(TARGETS), 64, 64)
    assert np.bincount(kinds).tolist() == [3, 3, 3]
    assert (tissue_bank(8, 9, 64)[0] != images).any()


def test_colour_is_no_clue() -> None:
    """The same kind comes dark and bright, grey and coloured."""
    scenes = [random_tissue_scene(np.random.default_rng(seed), 64, 1) for seed in range(40)]
    bright = [scene.targets[TARGETS.index("bright")].any() for scene in scenes]
    grey = [bool((scene.image == scene.image[..., :1]).all()) for scene in scenes]
    assert 2 < sum(bright) < 38
    assert 2 < sum(grey) < 38
