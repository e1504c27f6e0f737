"""Scenes closer to what cameras and microscopes show: a fundus with fine vessels, stained tissue, thin glass.

Still domain randomisation, and still no real pixel: shapes, colours, polarity and noise are drawn afresh for
each scene. What is taken from life is structure alone, things that any textbook says of such images: vessels
fade as they narrow, spring from a bright disc and cross a mottled ground; nuclei lie in a cytoplasm of the
same stain; unstained cells are seen by their rims.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from client.shapes import FloatImage, IntImage, cells, lesion, soft_disc
from simulations.scenes import TARGETS, Scene, smooth_noise, stretch, texture


def fine_tree(rng: np.random.Generator, size: int) -> tuple[FloatImage, FloatImage]:
    """Vessels down to one pixel: soft coverage (size, size), and each pixel's vessel width in pixels."""
    cover, width = np.zeros((size, size), np.float32), np.zeros((size, size), np.float32)
    widest = float(np.exp(rng.uniform(np.log(1.5), np.log(6.0))))
    branching, wander = float(rng.uniform(0.01, 0.04)), float(rng.uniform(0.04, 0.13))
    tips: list[tuple[float, float, float, float]] = []
    root = rng.uniform(-0.3 * size, 1.3 * size, 2)
    for _ in range(int(rng.integers(1, 5))):
        if rng.random() < 0.6:
            row, column = root
        else:
            row, column = rng.uniform(-2, size + 2, 2)
        heading = np.arctan2(size / 2 - row, size / 2 - column) + rng.normal(0, 0.9)
        tips.append((row, column, float(heading), float(rng.uniform(0.3, 1.0)) * widest / 2))
    drawn = 0
    while tips and drawn < 30:
        row, column, heading, radius = tips.pop(0)
        drawn += 1
        for _ in range(int(rng.uniform(0.2, 1.1) * size)):
            heading += float(rng.normal(0, wander))
            row, column = row + np.sin(heading), column + np.cos(heading)
            radius = max(0.5, radius * 0.996)
            if not (-0.35 * size <= row < 1.35 * size and -0.35 * size <= column < 1.35 * size):
                break
            _stamp(cover, width, row, column, radius)
            if rng.random() < branching:
                side = heading + float(rng.choice([-1, 1]) * rng.uniform(0.35, 1.2))
                tips.append((row, column, side, max(0.5, radius * float(rng.uniform(0.5, 0.85)))))
                radius *= float(rng.uniform(0.85, 1.0))
    return cover, width


def _stamp(cover: FloatImage, width: FloatImage, row: float, column: float, radius: float) -> None:
    disc = soft_disc(len(cover), row, column, radius)
    if disc is not None:
        where, soft = disc
        np.maximum(cover[where], soft, out=cover[where])
        np.maximum(width[where], (soft > 0) * 2 * radius, out=width[where], casting="same_kind")


def fundus(rng: np.random.Generator, size: int) -> Scene:
    """Fine vessels, dark or bright, on a mottled ground; a disc, spots and broad shadows are distractors."""
    cover, width = fine_tree(rng, size)
    sign = -1 if rng.random() < 0.75 else 1
    ground = rng.uniform(0.35, 0.75) if sign < 0 else rng.uniform(0.1, 0.5)
    tone = rng.uniform(0.2, 1.2, 3) if rng.random() < 0.8 else np.ones(3)
    grey = ground + sum(
        rng.uniform(0.0, amount) * smooth_noise(rng, size, cell)
        for cell, amount in ((3.0, 0.015), (8.0, 0.03), (24.0, 0.06), (60.0, 0.1))
    )
    if rng.random() < 0.35:  # broad vessels behind the tissue: seen, but nobody labels them
        behind, _ = fine_tree(rng, size)
        grey = grey + rng.normal(0, 0.1) * gaussian_filter(behind, rng.uniform(2.0, 5.0)) / 0.3
    image = np.asarray(grey, np.float32)[..., None] * tone
    image = _spots(rng, image)
    # A vessel's contrast falls with its width; so it does in every tone, in its own proportion.
    strength = rng.uniform(0.12, 0.5) * np.clip(rng.uniform(0.4, 0.9) + width / rng.uniform(3.0, 8.0), 0, 1.2)
    soft = gaussian_filter(cover, rng.uniform(0.2, 0.6))
    depth = soft * strength * (1 + rng.uniform(0, 0.25) * smooth_noise(rng, size, 10.0))
    if rng.random() < 0.4:  # the bright line along a broad vessel
        depth = depth * (
            1 - rng.uniform(0.2, 0.6) * np.clip(gaussian_filter(cover * (width > 3), 0.8) * 2 - 1, 0, 1)
        )
    image = (
        image * (1 + sign * depth[..., None] * rng.uniform(0.5, 1.5, 3))
        if sign < 0
        else (image + (depth[..., None] * rng.uniform(0.4, 1.2, 3)))
    )
    return _finish(rng, image, {"vessel": cover > 0.5}, sign, 0)


def _spots(rng: np.random.Generator, image: NDArray[np.float32]) -> NDArray[np.float32]:
    """A bright disc, and small bright or dark spots; none of them is a target."""
    size = image.shape[0]
    if rng.random() < 0.3:
        disc = gaussian_filter((lesion(rng, size, (0.08 * size, 0.22 * size)) > 0).astype(np.float32), 2.0)
        image = image + disc[..., None] * rng.uniform(0.15, 0.6) * rng.uniform(0.6, 1.1, 3)
    if rng.random() < 0.4:
        small = cells(rng, size, (0.8, 4.0), float(rng.uniform(0.002, 0.02))) > 0
        soft = gaussian_filter(small.astype(np.float32), rng.uniform(0.4, 1.2))
        image = image + soft[..., None] * rng.normal(0, 0.3) * rng.uniform(0.5, 1.2, 3)
    return np.asarray(image, np.float32)


def stained(rng: np.random.Generator, size: int) -> Scene:
    """Nuclei in stained tissue: darker than a cytoplasm of the same stain, on light, mottled ground."""
    share = float(np.exp(rng.uniform(np.log(0.03), np.log(0.5))))
    instances = cells(rng, size, (2.0, 12.0), share, bool(rng.random() < 0.3))
    nuclei = (instances > 0).astype(np.float32)
    light, stain = rng.uniform(0.6, 1.0, 3), rng.uniform(0.15, 1.0, 3)
    tissue = 0.5 + 0.5 * np.tanh(rng.uniform(0.5, 2.0) * texture(rng, size) + rng.normal(0, 0.7))
    if rng.random() < 0.6:  # each nucleus has its cell around it
        tissue = np.maximum(
            tissue * rng.uniform(0.2, 1.0), gaussian_filter(nuclei, rng.uniform(2.0, 5.0)) ** 0.5
        )
    dye = rng.uniform(0.1, 0.8) * tissue[..., None] * rng.uniform(0.2, 1.0, 3) * stain
    chromatin = 1 + rng.uniform(0, 0.4) * smooth_noise(rng, size, rng.uniform(1.0, 4.0))
    strength = _each(rng, instances, 0.5, 1.0)
    body = gaussian_filter(nuclei * strength, rng.uniform(0.3, 0.9)) * chromatin
    dye = dye + rng.uniform(0.4, 1.6) * body[..., None] * rng.uniform(0.5, 1.0, 3) * stain
    image = light * np.exp(-dye)  # Beer and Lambert
    sign = -1
    if rng.random() < 0.2:
        image, sign = 1 - image, 1
    return _finish(rng, np.asarray(image, np.float32), {"blob": instances > 0}, sign, 1)


def unstained(rng: np.random.Generator, size: int) -> Scene:
    """Cells seen by their rims and a little shade, as bright-field and phase contrast show them."""
    share = float(np.exp(rng.uniform(np.log(0.03), np.log(0.45))))
    instances = cells(rng, size, (2.5, 13.0), share, bool(rng.random() < 0.3))
    solid = (instances > 0).astype(np.float32)
    rim = np.abs(gaussian_filter(solid, 0.6) - gaussian_filter(solid, rng.uniform(1.0, 2.5)))
    sign = 1 if rng.random() < 0.5 else -1
    grey = rng.uniform(0.3, 0.7) + rng.uniform(0.01, 0.08) * texture(rng, size)
    grey = grey + rng.uniform(-1.2, 1.2) * rim + sign * rng.uniform(0.02, 0.25) * gaussian_filter(solid, 0.6)
    grain = (
        rng.uniform(0.0, 0.15) * smooth_noise(rng, size, rng.uniform(1.0, 4.0)) * gaussian_filter(solid, 0.8)
    )
    tone = rng.uniform(0.6, 1.2, 3) if rng.random() < 0.4 else np.ones(3)
    return _finish(
        rng, np.asarray((grey + grain)[..., None] * tone, np.float32), {"blob": instances > 0}, sign, 1
    )


def layered(rng: np.random.Generator, size: int) -> Scene:
    """Organs and cysts in layered, speckled tissue: regions told from their ground by texture or shade."""
    instances = lesion(rng, size, (0.06 * size, 0.4 * size), int(rng.integers(1, 4)))
    solid = (instances > 0).astype(np.float32)
    soft = gaussian_filter(solid, rng.uniform(0.5, 2.0))
    rows = np.arange(size)[:, None] + rng.uniform(2, 10) * smooth_noise(rng, size, 24.0)
    tilt = rng.normal(0, 0.3) * np.arange(size)[None, :]
    ground = rng.uniform(0.3, 0.7) + rng.uniform(0, 0.12) * np.sin((rows + tilt) * rng.uniform(0.1, 0.6))
    ground = ground + rng.uniform(0.02, 0.1) * texture(rng, size)
    sign = 1 if rng.random() < 0.5 else -1
    inner = ground.mean() + sign * rng.uniform(0.08, 0.35) + rng.uniform(0.0, 0.1) * texture(rng, size)
    grey = ground * (1 - soft) + inner * soft
    grain = gaussian_filter(rng.rayleigh(1.0, (size, size)), rng.uniform(0.4, 1.5))
    grey = grey * (1 + rng.uniform(0.0, 0.9) * (grain / grain.mean() - 1))
    shadow = 1 - rng.uniform(0, 0.5) * np.linspace(0, 1, size)[:, None] ** 2
    tone = rng.uniform(0.4, 1.3, 3) if rng.random() < 0.3 else np.ones(3)
    return _finish(
        rng, np.asarray((grey * shadow)[..., None] * tone, np.float32), {"region": solid > 0}, sign, 2
    )


def _each(rng: np.random.Generator, instances: IntImage, low: float, high: float) -> FloatImage:
    """A strength of its own for every body; 0 on the background."""
    strength = np.concatenate([[0.0], rng.uniform(low, high, int(instances.max()))])
    return np.asarray(strength[instances], np.float32)


def _finish(
    rng: np.random.Generator,
    image: NDArray[np.float32],
    found: dict[str, NDArray[np.bool_]],
    sign: int,
    kind: int,
) -> Scene:
    """A mild scanner, the stretch, and the targets. A tile of a large image does not span the full range."""
    size = image.shape[0]
    ramp = np.linspace(-1, 1, size)
    image = image * (
        1 + rng.normal(0, 0.15) * ramp[:, None, None] + rng.normal(0, 0.15) * ramp[None, :, None]
    )
    if rng.random() < 0.5:
        image = gaussian_filter(image, (s := rng.uniform(0.2, 0.9), s, 0))
    image = image + rng.normal(0, rng.uniform(0.0, 0.03), image.shape)
    image = stretch(np.asarray(image, np.float32))
    valid = np.ones((size, size), bool)
    if rng.random() < 0.2:  # the edge of a round field of view crosses the tile
        centre, reach = rng.uniform(-1.0, 2.0, 2) * size, rng.uniform(0.7, 2.0) * size
        rows, columns = np.mgrid[:size, :size]
        valid = np.hypot(rows - centre[0], columns - centre[1]) < reach
        valid = valid if valid.mean() > 0.4 else np.ones_like(valid)
    if rng.random() < 0.6:
        low, high = rng.uniform(0.0, 0.3, 3), rng.uniform(0.5, 1.0, 3)
        image = low + (high - low) * image
    image = np.clip(image, 0, 1) ** np.exp(rng.normal(0, 0.25))
    if rng.random() < 0.25:
        image = np.repeat(image.mean(2, keepdims=True), 3, axis=2)
    image = image * valid[..., None]
    targets = np.zeros((len(TARGETS), size, size), bool)
    for name, solid in found.items():
        targets[TARGETS.index(name)] |= solid & valid
        targets[TARGETS.index("bright" if sign > 0 else "dark")] |= solid & valid
    return Scene((image * 255).round().astype(np.uint8), targets, kind)


Painter = Callable[[np.random.Generator, int], Scene]
PAINTERS: dict[int, tuple[tuple[Painter, float], ...]] = {  # kind (`scenes.KINDS`): painters and their shares
    0: ((fundus, 1.0),),
    1: ((stained, 0.6), (unstained, 0.4)),
    2: ((layered, 1.0),),
}


def random_tissue_scene(rng: np.random.Generator, size: int, kind: int) -> Scene:
    painters, shares = zip(*PAINTERS[kind], strict=True)
    paint: Painter = painters[int(rng.choice(len(painters), p=shares))]
    return paint(rng, size)


def tissue_bank(
    seed: int, count: int, size: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.int8]]:
    """``count`` scenes, kinds in equal shares, as `scenes.scene_bank` gives them."""
    rng = np.random.default_rng(seed)
    scenes = [random_tissue_scene(rng, size, index % len(PAINTERS)) for index in range(count)]
    images = np.stack([scene.image.transpose(2, 0, 1) for scene in scenes])
    return images, np.stack([s.targets for s in scenes]), np.array([s.kind for s in scenes], np.int8)
