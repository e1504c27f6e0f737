"""Procedural patients: tissue, lesions, cells or vessels, seen through each simulated site's own scanner.

A patient is a random tissue with its own typical object size; a patient's images are views of it. Masks are
exact, because the object was drawn before the scanner touched it.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from client.shapes import FloatImage, cells, lesion, vessels
from common.recipe import Anatomy, PhantomConfig, ScannerConfig
from common.seeding import derive_rng
from simulations.scenes import smooth_noise

LABEL = 255


@dataclass(frozen=True)
class Tissue:
    """What stays the same over one patient's images: ``size`` is a radius (or width) in pixels."""

    size: float
    ground: float
    texture: float
    layers: float


def random_tissue(rng: np.random.Generator, config: PhantomConfig) -> Tissue:
    low, high = config.object_size
    return Tissue(
        size=float(np.exp(rng.uniform(np.log(low), np.log(high)))) * config.image_size,
        ground=float(rng.uniform(0.4, 0.6)),
        texture=float(rng.uniform(0.02, 0.06)),
        layers=float(rng.uniform(0.0, 0.08)),
    )


def draw_objects(rng: np.random.Generator, config: PhantomConfig, tissue: Tissue) -> FloatImage:
    """Soft coverage (S, S) in [0, 1] of this view's objects; the mask is coverage > 0.5."""
    size = config.image_size
    spread = (0.85 * tissue.size, 1.15 * tissue.size)
    if config.anatomy == Anatomy.vessels:
        return vessels(rng, size, (1.2, max(1.5, tissue.size)), int(rng.integers(2, 5)))
    if config.anatomy == Anatomy.cells:
        coverage = float(np.exp(rng.uniform(np.log(0.08), np.log(0.35))))
        return (cells(rng, size, spread, coverage) > 0).astype(np.float32)
    return (lesion(rng, size, spread, 1 if rng.random() < 0.8 else 2) > 0).astype(np.float32)


def scan(rng: np.random.Generator, objects: FloatImage, tissue: Tissue, scanner: ScannerConfig) -> FloatImage:
    """One image (S, S, 3) in [0, 1] of ``objects`` in ``tissue`` by ``scanner``."""
    size = objects.shape[0]
    ground = tissue.ground if not scanner.bright_objects else 0.35 * tissue.ground
    grey = ground + tissue.texture * smooth_noise(rng, size, 12.0)
    rows = np.arange(size)[:, None] + 3 * smooth_noise(rng, size, 24.0)
    grey = grey + tissue.layers * np.sin(rows * 0.35)
    sign = 1.0 if scanner.bright_objects else -1.0
    strength = scanner.contrast * (1 + 0.15 * smooth_noise(rng, size, 6.0))
    grey = grey + sign * gaussian_filter(objects, 0.5) * strength
    grain = gaussian_filter(rng.rayleigh(1.0, (size, size)), 0.6)
    grey = grey * (1 + scanner.speckle * (grain / grain.mean() - 1))
    grey = gaussian_filter(grey, scanner.blur) + rng.normal(0, scanner.noise, grey.shape)
    grey = np.clip(scanner.gain * grey, 0, 1) ** scanner.gamma
    image: FloatImage = np.clip(grey[..., None] * np.array(scanner.tint), 0, 1).astype(np.float32)
    return image


def write_site(config: PhantomConfig, folder: Path, run_seed: int, site: str) -> Path:
    """Write ``folder/manifest.csv`` with images and masks beside it; returns the manifest's path.

    Deterministic in (run_seed, site, config).
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "masks").mkdir(exist_ok=True)
    counts = {"train": config.train_patients, "val": config.val_patients, "test": config.test_patients}
    plan = [(split, True) for split, count in counts.items() for _ in range(count)]
    plan += [("train", False)] * config.unlabelled_patients
    rows = []
    for number, (split, labelled) in enumerate(plan):
        rng = derive_rng(run_seed, site, "phantom", number)
        tissue = random_tissue(rng, config)
        for view in range(config.images_per_patient):
            objects = draw_objects(rng, config, tissue)
            name = f"p{number:03d}-{view}.png"
            _save(folder / "images" / name, scan(rng, objects, tissue, config.scanner))
            if labelled:
                Image.fromarray(((objects > 0.5) * LABEL).astype(np.uint8)).save(folder / "masks" / name)
            rows.append([f"images/{name}", f"masks/{name}" if labelled else "", f"p{number:03d}", split])
    manifest = folder / "manifest.csv"
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows([["image", "mask", "patient", "split"], *rows])
    return manifest


def _save(path: Path, image: NDArray[np.float32]) -> None:
    Image.fromarray((image * 255).round().astype(np.uint8)).save(path)
