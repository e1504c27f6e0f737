"""Procedural anatomy, scenes and patients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.shapes import PRIORS, cells, lesion, outline_window, random_outline, vessels
from common.recipe import Anatomy, PhantomConfig, ScannerConfig
from simulations.phantoms import write_site
from simulations.scenes import KINDS, TARGETS, random_scene, scene_bank


@pytest.mark.parametrize("like", PRIORS)
def test_a_prior_repeats_and_draws_something_but_not_everything(like: str) -> None:
    first, again = (PRIORS[like](np.random.default_rng(5), 64) for _ in range(2))
    assert np.array_equal(first, again)
    shares = [PRIORS[like](np.random.default_rng(seed), 64).mean() for seed in range(20)]
    assert max(shares) < 0.95
    assert np.median(shares) > 0.005


def test_cells_do_not_overlap_unless_asked() -> None:
    instances = cells(np.random.default_rng(0), 96, (3, 8), 0.3)
    assert instances.max() > 5
    assert 0.05 < (instances > 0).mean() < 0.6


def test_an_outline_without_roughness_has_the_area_of_its_ellipse() -> None:
    outline = replace(random_outline(np.random.default_rng(1), 200, 30.0, 0.0), row=100.0, column=100.0)
    window = outline_window(outline, 200)
    assert window is not None
    assert window[1].sum() == pytest.approx(np.pi * 30**2, rel=0.02)


def test_vessels_keep_within_their_widths() -> None:
    from scipy.ndimage import distance_transform_edt

    mask = vessels(np.random.default_rng(2), 96, (1.5, 6.0), 2) > 0.5
    assert mask.any()
    assert 2 * distance_transform_edt(mask).max() <= 9  # crossings are a little wider than one vessel


def test_lesions_lie_inside_the_image() -> None:
    for seed in range(20):
        assert (lesion(np.random.default_rng(seed), 64, (6, 10)) > 0).sum() > 40


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_a_scene_shows_its_kind_and_says_which_polarity(kind: int) -> None:
    scene = random_scene(np.random.default_rng(3), 64, kind, distractors=0.0)
    shown = scene.targets.any((1, 2))
    assert scene.image.shape == (64, 64, 3)
    assert shown[kind]
    assert not shown[[k for k in range(3) if k != kind]].any()
    assert shown[TARGETS.index("bright")] != shown[TARGETS.index("dark")]


def test_a_scene_bank_repeats_and_holds_the_kinds_in_equal_shares() -> None:
    images, targets, kinds = scene_bank(0, 6, 64)
    again, _, _ = scene_bank(0, 6, 64)
    assert np.array_equal(images, again)
    assert targets.shape == (6, 5, 64, 64)
    assert np.bincount(kinds).tolist() == [2, 2, 2]


@pytest.mark.parametrize("anatomy", Anatomy)
def test_a_site_is_written_with_exact_counts_and_repeats(tmp_path: Path, anatomy: Anatomy) -> None:
    config = PhantomConfig(
        anatomy=anatomy, train_patients=2, val_patients=1, test_patients=1, images_per_patient=2,
        unlabelled_patients=1, image_size=64, object_size=[0.08, 0.1],
    )  # fmt: skip
    first = write_site(config, tmp_path / "a", 0, "north")
    again = write_site(config, tmp_path / "b", 0, "north")
    other = write_site(config, tmp_path / "c", 1, "north")
    rows = first.read_text().splitlines()
    assert len(rows) == 1 + 2 * (2 + 1 + 1 + 1)
    assert sum(",," in row for row in rows) == 2
    assert first.read_text() == again.read_text()
    pixels = [(path.parent / "images" / "p000-0.png").read_bytes() for path in (first, again, other)]
    assert pixels[0] == pixels[1] != pixels[2]
    mask = np.asarray(Image.open(first.parent / "masks" / "p000-0.png"))
    assert set(np.unique(mask)) <= {0, 255}
    assert (mask > 0).any()


def test_another_scanner_changes_the_image_and_not_the_mask(tmp_path: Path) -> None:
    config = PhantomConfig(train_patients=1, val_patients=0, test_patients=0, image_size=64)
    dark = replace(config, scanner=ScannerConfig(gain=0.5, gamma=2.0))
    one, two = (write_site(c, tmp_path / n, 0, "s").parent for c, n in ((config, "a"), (dark, "b")))
    assert (one / "masks/p000-0.png").read_bytes() == (two / "masks/p000-0.png").read_bytes()
    means = [np.asarray(Image.open(path / "images/p000-0.png")).mean() for path in (one, two)]
    assert means[1] < means[0] / 2
