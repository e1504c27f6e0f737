"""The folder of synthetic images that a site keeps to itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from client.evaluation import THRESHOLD
from client.prediction import label_image
from client.transfer.sets import TransferSet
from common.plan import RunPlan


def save_synthetic(images: TransferSet, folder: Path, plan: RunPlan) -> None:
    """The kept synthetic images and masks as PNG, with their provenance; the folder never leaves the site."""
    folder.mkdir(exist_ok=True)
    for index, (image, mask) in enumerate(zip(images.images, images.masks, strict=True)):
        pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:04d}.png")
        values = label_image(mask, plan.data, THRESHOLD)
        Image.fromarray(values).save(folder / f"{index:04d}_mask.png")
    provenance = {
        "images": len(images),
        "plan_sha256": plan.digest,
        "generator_sha256": plan.models[plan.generator.name],
        "scope": str(plan.generator.scope),
        "masks": "procedural shape prior (client.shapes); no patient's mask",
    }
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
