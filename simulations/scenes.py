"""Procedural scenes for pre-training: varied anatomy under random texture, contrast and scanner.

No real pixel is used anywhere. The recipe is domain randomisation: what does not hold across scenes (colour,
polarity, texture, blur, noise) cannot be relied on, so a network trained here has to look for shape. Scenes
end with the same percentile stretch that real images get in `client.data`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom

from client.shapes import FloatImage, IntImage, cells, lesion, vessels

TARGETS = ("vessel", "blob", "region", "bright", "dark")
KINDS = ("vessels", "cells", "regions")


@dataclass(frozen=True)
class Scene:
    """``image`` (S, S, 3) uint8; ``targets`` (5, S, S) bool, as `TARGETS`; ``kind`` indexes `KINDS`."""

    image: NDArray[np.uint8]
    targets: NDArray[np.bool_]
    kind: int


def smooth_noise(rng: np.random.Generator, size: int, cell: float) -> FloatImage:
    """Unit-variance noise whose features are about ``cell`` pixels wide."""
    side = max(2, int(np.ceil(size / cell)) + 3)
    coarse = rng.normal(size=(side, side))
    fine = (
        zoom(coarse, size / (side - 1) * 1.05, order=1)[:size, :size] if side < size else coarse[:size, :size]
    )
    return (fine / (fine.std() + 1e-6)).astype(np.float32)


def texture(rng: np.random.Generator, size: int) -> FloatImage:
    """A random mixture of noise at up to three scales, unit variance."""
    scales = rng.choice([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], size=int(rng.integers(1, 4)), replace=False)
    total = sum(rng.uniform(0.3, 1.0) * smooth_noise(rng, size, float(scale)) for scale in scales)
    if rng.random() < 0.2:  # layers, as in tissue cut across
        rows = np.arange(size)[:, None] + 4 * smooth_noise(rng, size, 24.0)
        total = total + rng.uniform(0.5, 2.0) * np.sin(rows * rng.uniform(0.1, 0.7))
    result: FloatImage = np.asarray(total / (np.std(total) + 1e-6), np.float32)
    return result


def stretch(image: FloatImage) -> FloatImage:
    """Percentile stretch 0.5/99.7 a channel, the counterpart of `client.data` without a field of view."""
    low, high = np.percentile(image, [0.5, 99.7], axis=(0, 1))
    result: FloatImage = np.clip((image - low) / np.maximum(high - low, 0.05), 0, 1).astype(np.float32)
    return result


def random_scene(rng: np.random.Generator, size: int, kind: int, distractors: float = 0.3) -> Scene:
    """One scene of ``KINDS[kind]``; a share ``distractors`` of scenes also shows bodies of another kind."""
    coverage: dict[str, FloatImage] = {}
    if kind == 0:
        coverage["vessel"] = vessels(rng, size, (1.3, float(rng.uniform(2.0, 6.5))), int(rng.integers(1, 5)))
    elif kind == 1:
        share = float(np.exp(rng.uniform(np.log(0.01), np.log(0.5))))
        coverage["blob"] = _cell_intensity(
            rng, cells(rng, size, (1.8, 13.0), share, bool(rng.random() < 0.3))
        )
    else:
        reach = (0.05 * size, 0.36 * size)
        coverage["region"] = (lesion(rng, size, reach, int(rng.integers(1, 4))) > 0).astype(np.float32)
    if rng.random() < distractors:
        _add_distractor(rng, size, kind, coverage)
    signs = {name: 1 if rng.random() < 0.5 else -1 for name in coverage}
    image = _paint(rng, size, coverage, signs)
    targets = np.zeros((len(TARGETS), size, size), bool)
    for name, cover in coverage.items():
        solid = cover > (0.5 if name == "vessel" else 0.02)
        targets[TARGETS.index(name)] |= solid
        targets[TARGETS.index("bright" if signs[name] > 0 else "dark")] |= solid
    return Scene((image * 255).round().astype(np.uint8), targets, kind)


def _add_distractor(rng: np.random.Generator, size: int, kind: int, coverage: dict[str, FloatImage]) -> None:
    other = int(rng.choice([k for k in range(3) if k != kind]))
    if other == 0:
        coverage["vessel"] = vessels(rng, size, (1.3, 4.0), 1)
    elif other == 1:
        coverage["blob"] = _cell_intensity(rng, cells(rng, size, (1.8, 6.0), 0.02))
    else:
        coverage["region"] = (lesion(rng, size, (0.05 * size, 0.15 * size)) > 0).astype(np.float32)


def _cell_intensity(rng: np.random.Generator, instances: IntImage) -> FloatImage:
    """Each cell its own strength in [0.35, 1]; sometimes a rim, as membranes show."""
    strength = np.concatenate([[0.0], rng.uniform(0.35, 1.0, int(instances.max()))])
    cover = strength[instances]
    if rng.random() < 0.25:
        inner = gaussian_filter((instances > 0).astype(np.float32), 1.5) > 0.9
        cover = np.where(inner, cover * rng.uniform(0.5, 0.9), cover)
    return np.asarray(cover, np.float32)


def _paint(
    rng: np.random.Generator, size: int, coverage: dict[str, FloatImage], signs: dict[str, int]
) -> FloatImage:
    dark_field = "blob" in coverage and signs["blob"] > 0 and rng.random() < 0.5  # fluorescence
    ground = rng.uniform(0.0, 0.12) if dark_field else rng.uniform(0.25, 0.75)
    grain = rng.uniform(0.0, 0.03) if dark_field else rng.uniform(0.01, 0.1)
    grey = ground + grain * texture(rng, size)
    ramp = np.linspace(-1, 1, size)
    if rng.random() < 0.6:  # uneven illumination
        grey = grey + rng.normal(0, 0.08) * ramp[:, None] + rng.normal(0, 0.08) * ramp[None, :]
    layer = np.repeat(grey[..., None], 3, axis=2)
    if rng.random() < 0.55:
        layer = layer * rng.uniform(0.5, 1.3, 3)
    for name, cover in coverage.items():
        depth = rng.uniform(0.06, 0.4) if name == "vessel" else rng.uniform(0.12, 0.6)
        inner = depth * (1 + rng.uniform(0.0, 0.35) * texture(rng, size))
        tone = rng.uniform(0.4, 1.3, 3) if rng.random() < 0.5 else np.ones(3)
        edge = gaussian_filter(cover, rng.uniform(0.3, 0.9))
        layer = layer + signs[name] * (edge * inner)[..., None] * tone
    return _scan(rng, np.asarray(layer, np.float32))


def _scan(rng: np.random.Generator, image: FloatImage) -> FloatImage:
    """A random scanner: blur, speckle, haze, vignette, round field of view, noise, gamma."""
    size = image.shape[0]
    if rng.random() < 0.5:
        image = gaussian_filter(image, (s := rng.uniform(0.2, 1.3), s, 0))
    if rng.random() < 0.35:  # multiplicative speckle, Rayleigh as in ultrasound
        grain = gaussian_filter(rng.rayleigh(1.0, (size, size)), rng.uniform(0.4, 1.3))
        image = image * (1 + rng.uniform(0.2, 1.0) * (grain / grain.mean() - 1))[..., None]
    if rng.random() < 0.3:
        image = image + rng.uniform(0.02, 0.12) * smooth_noise(rng, size, 24.0)[..., None]
    distance = np.hypot(*np.meshgrid(*[np.linspace(-1, 1, size)] * 2))
    if rng.random() < 0.3:
        image = image * (1 - rng.uniform(0.1, 0.5) * distance**2)[..., None]
    if rng.random() < 0.1:
        image = image * (distance < rng.uniform(1.0, 1.3))[..., None]
    image = image + rng.normal(0, rng.uniform(0.0, 0.05), image.shape)
    image = stretch(np.asarray(image, np.float32))
    image = image ** np.exp(rng.normal(0, 0.25))
    if rng.random() < 0.45:
        image = np.repeat(image.mean(2, keepdims=True), 3, axis=2)
    return stretch(np.asarray(image, np.float32))


def scene_bank(
    seed: int, count: int, size: int, distractors: float = 0.3
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.int8]]:
    """``count`` scenes, kinds in equal shares: images (N, 3, S, S), targets (N, 5, S, S), kinds (N,)."""
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng, size, index % len(KINDS), distractors) for index in range(count)]
    images = np.stack([scene.image.transpose(2, 0, 1) for scene in scenes])
    return images, np.stack([s.targets for s in scenes]), np.array([s.kind for s in scenes], np.int8)
