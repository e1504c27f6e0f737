"""The folder of synthetic images that a site keeps to itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from client.evaluation import THRESHOLD
from client.painters import PAINTERS, painter_of
from client.prediction import label_image
from client.transfer.sets import TransferSet
from common.plan import RunPlan

PROCEDURAL = "procedural shape prior (client.shapes); no patient's mask"
OWN_MASKS = "of this site's labelled patients"
OWN_PIXELS = "yes, of this site's labelled patients: these images never leave, whatever a policy allows"


def save_synthetic(images: TransferSet, folder: Path, plan: RunPlan) -> None:
    """The kept synthetic images and masks as PNG, with their provenance; the folder never leaves the site."""
    folder.mkdir(exist_ok=True)
    for index, (image, mask) in enumerate(zip(images.images, images.masks, strict=True)):
        pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:04d}.png")
        values = label_image(mask, plan.data, THRESHOLD)
        Image.fromarray(values).save(folder / f"{index:04d}_mask.png")
    (folder / "provenance.json").write_text(json.dumps(provenance(len(images), plan), indent=2) + "\n")


def provenance(images: int, plan: RunPlan) -> dict[str, Any]:
    """What the images are made of: whose masks, whose pixels, and which network, if any."""
    name = painter_of(plan.generator.scope)
    kind = None if name is None else PAINTERS[name]
    found = {
        "images": images,
        "plan_sha256": plan.digest,
        "scope": str(plan.generator.scope),
        "made_by": "diffusion network" if kind is None else kind.about,
        "masks": PROCEDURAL if kind is None or not kind.own_pixels else OWN_MASKS,
        "pixels_of_patients": OWN_PIXELS if kind is not None and kind.own_pixels else "",
    }
    return found if kind is not None else found | {"generator_sha256": plan.models[plan.generator.name]}
