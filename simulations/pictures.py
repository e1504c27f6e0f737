"""Pictures for a simulation's report: what each model drew, and real images beside synthetic ones.

A deployed coordinator never has these: they show patients.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_dilation, zoom

from client.evaluation import predict
from client.measuring import opened_models
from client.patients import Patient, Sample, Split, of_split
from client.site import Site
from common.adapter import Adapter
from common.plan import RunPlan
from server.report.schema import Picture

CASES, PAIRS, SIDE, GAP = 3, 8, 160, 6
TRUTH, FOUND = (46, 204, 113), (255, 176, 0)  # green and amber: apart for every kind of colour vision
Pixels = NDArray[np.uint8]


def site_pictures(site: Site, plan: RunPlan, adapter: Adapter) -> list[Picture]:
    """One panel of test cases and, where there are synthetic images, one of real beside synthetic."""
    test = of_split(site.patients(plan.data, plan.seed), Split.test)
    cases = [patient.samples[0] for patient in test[:CASES]]
    pictures = [case_panel(site, plan, adapter, cases)]
    synthetic = sorted(
        path for path in (site.folder / "synthetic").glob("[0-9]*.png") if "mask" not in path.name
    )
    if synthetic:
        train = of_split(site.patients(plan.data, plan.seed), Split.train)
        pictures.append(
            synthetic_panel(site, plan, train, [np.asarray(Image.open(p)) for p in synthetic[:PAIRS]])
        )
    return pictures


def case_panel(site: Site, plan: RunPlan, adapter: Adapter, cases: Sequence[Sample]) -> Picture:
    found: dict[str, list[torch.Tensor]] = {}
    with opened_models(site, plan, adapter) as models:
        for name in ("teacher", "student"):
            if name in models:
                forward = models[name]()
                found[name] = [
                    predict(forward, case.image, plan.data, plan.evaluation.overlap) for case in cases
                ]
    rows = []
    for index, case in enumerate(cases):
        truth = (
            case.mask.amax(0).numpy() > 0 if case.mask is not None else np.zeros(case.image.shape[1:], bool)
        )
        tiles = [_tile(case.image), _outlined(case.image, truth, TRUTH)]
        for maps in found.values():
            drawn = (maps[index].amax(0).numpy() > 0.5) & case.valid.numpy()
            tiles.append(_outlined(case.image, drawn, FOUND))
        rows.append(_join(tiles, axis=1))
    columns = ["image", "truth", *found]
    return Picture(
        site.name, "cases", "Test patients of this site, never trained on.", columns, _png(_join(rows, 0))
    )


def synthetic_panel(
    site: Site, plan: RunPlan, train: Sequence[Patient], synthetic: Sequence[Pixels]
) -> Picture:
    size = plan.data.image_size
    real = [patient.samples[0].image for patient in train[:PAIRS]]
    corners = [(max(0, (i.shape[1] - size) // 2), max(0, (i.shape[2] - size) // 2)) for i in real]
    crops = [i[:, y : y + size, x : x + size] for i, (y, x) in zip(real, corners, strict=True)]
    tiles = [_join([_tile(crop) for crop in crops], 1), _join([_fit(image) for image in synthetic], 1)]
    width = min(tile.shape[1] for tile in tiles)
    caption = "Above: real training images of this site. Below: synthetic images in the styles of all sites."
    if plan.generator.scope == "local":
        caption = (
            "Above: real training images of this site. Below: synthetic images in this site's own style."
        )
    if plan.generator.scope == "recolour":
        caption = "Above: real training images of this site. Below: such images in the colours of all sites."
    rows = [tile[:, :width] for tile in tiles]
    return Picture(site.name, "synthetic", caption, ["real (above), synthetic (below)"], _png(_join(rows, 0)))


def _tile(image: torch.Tensor) -> Pixels:
    return _fit((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


def _fit(pixels: Pixels) -> Pixels:
    """Scaled to the panel's height, by whole pixels where small, so that nothing is smoothed away."""
    height, width = pixels.shape[:2]
    target = (round(width * SIDE / height), SIDE)
    method = Image.Resampling.NEAREST if height < SIDE else Image.Resampling.BOX
    return np.asarray(Image.fromarray(pixels).resize(target, method))


def _outlined(image: torch.Tensor, mask: NDArray[np.bool_], colour: tuple[int, int, int]) -> Pixels:
    """The image with the mask's border drawn in ``colour``, one or two screen pixels wide."""
    tile = _tile(image).copy()
    scale = (tile.shape[0] / mask.shape[0], tile.shape[1] / mask.shape[1])
    large = zoom(mask.astype(np.uint8), scale, order=0)[: tile.shape[0], : tile.shape[1]] > 0
    border = binary_dilation(large) & ~large
    tile[: border.shape[0], : border.shape[1]][border] = colour
    return tile


def _join(tiles: Sequence[Pixels], axis: int) -> Pixels:
    """Side by side (axis 1) or one below the other (axis 0), with a white gap, padded to equal size."""
    other = 1 - axis
    most = max(tile.shape[other] for tile in tiles)
    parts: list[Pixels] = []
    for tile in tiles:
        pad = [(0, 0), (0, 0), (0, 0)]
        pad[other] = (0, most - tile.shape[other])
        parts.append(np.pad(tile, pad, constant_values=255))
        gap = [most, most, 3]
        gap[axis] = GAP
        parts.append(np.full(gap, 255, np.uint8))
    return np.concatenate(parts[:-1], axis)


def _png(pixels: Pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
