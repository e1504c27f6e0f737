"""Patients of nobody, seen by scanners of no site: what a teacher is warmed on before a private run.

Public data cost no privacy, so whatever a teacher can learn from them it need not learn under noise. Each
image has a scanner and a size of object of its own, drawn from ranges far wider than any one hospital's; they
are written down here, and no recipe, no site and no file is asked for them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.recipe import Anatomy, PhantomConfig, ScannerConfig
from common.seeding import derive_rng
from simulations.phantoms import draw_objects, random_tissue, scan
from simulations.scenes import KINDS, TARGETS, Scene, stretch

RADII = (0.05, 0.36)  # of objects, share of the image's side
TARGET_OF = {Anatomy.vessels: "vessel", Anatomy.cells: "blob", Anatomy.lesions: "region"}
KIND_OF = {Anatomy.vessels: "vessels", Anatomy.cells: "cells", Anatomy.lesions: "regions"}


def random_scanner(rng: np.random.Generator) -> ScannerConfig:
    """A machine from the worst to the best that an image can still be read of."""
    tint = rng.uniform(0.6, 1.0, 3) if rng.random() < 0.3 else np.ones(3)
    return ScannerConfig(
        gain=float(rng.uniform(0.5, 1.4)),
        gamma=float(np.exp(rng.uniform(np.log(0.5), np.log(2.0)))),
        blur=float(rng.uniform(0.2, 2.0)),
        speckle=float(rng.uniform(0.0, 1.0)),
        noise=float(rng.uniform(0.0, 0.06)),
        contrast=float(rng.uniform(0.08, 0.4)),
        bright_objects=bool(rng.random() < 0.5),
        tint=tint.tolist(),
    )


def hospital_scene(rng: np.random.Generator, size: int, anatomy: Anatomy) -> Scene:
    """One image of ``anatomy``, as a site would read it, with its targets."""
    config = PhantomConfig(
        anatomy=anatomy, image_size=size, object_size=list(RADII), scanner=random_scanner(rng)
    )
    tissue = random_tissue(rng, config)
    objects = draw_objects(rng, config, tissue)
    image = (scan(rng, objects, tissue, config.scanner) * 255).round() / 255  # as its file would hold it
    targets = np.zeros((len(TARGETS), size, size), bool)
    for name in (TARGET_OF[anatomy], "bright" if config.scanner.bright_objects else "dark"):
        targets[TARGETS.index(name)] = objects > 0.5
    shown = (stretch(np.asarray(image, np.float32)) * 255).round().astype(np.uint8)
    return Scene(shown, targets, KINDS.index(KIND_OF[anatomy]))


def hospital_bank(
    seed: int, count: int, size: int, anatomy: Anatomy
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.int8]]:
    """``count`` scenes as `simulations.scenes.scene_bank` gives them; a function of the arguments alone."""
    scenes = [hospital_scene(derive_rng(seed, "hospital", number), size, anatomy) for number in range(count)]
    images = np.stack([scene.image.transpose(2, 0, 1) for scene in scenes])
    return images, np.stack([s.targets for s in scenes]), np.array([s.kind for s in scenes], np.int8)
