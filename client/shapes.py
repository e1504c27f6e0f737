"""A procedural shape prior: masks of cells, vessels and lesions that never belonged to anybody.

The generator paints its images on these (`client.generation`), and the simulator's phantoms are built
from them, so no conditioning mask is ever taken from a patient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatImage = NDArray[np.float32]
IntImage = NDArray[np.int32]


@dataclass(frozen=True)
class Outline:
    """A closed curve r(angle) = radius * (1 + sum of a few cosines), stretched along one axis."""

    row: float
    column: float
    radius: float
    aspect: float
    tilt: float
    amplitudes: tuple[float, ...]
    phases: tuple[float, ...]


def random_outline(rng: np.random.Generator, size: int, radius: float, roughness: float = 0.12) -> Outline:
    """An outline whose centre lies in a ``size`` x ``size`` image; ``roughness`` 0 is an ellipse."""
    orders = 4
    amplitudes = roughness * rng.normal(size=orders) / (1.0 + 0.5 * np.arange(orders))
    return Outline(
        row=float(rng.uniform(0, size)),
        column=float(rng.uniform(0, size)),
        radius=radius,
        aspect=float(np.exp(rng.uniform(-0.35, 0.35))),
        tilt=float(rng.uniform(0, np.pi)),
        amplitudes=tuple(amplitudes.tolist()),
        phases=tuple(rng.uniform(0, 2 * np.pi, orders).tolist()),
    )


def outline_window(outline: Outline, size: int) -> tuple[tuple[slice, slice], NDArray[np.bool_]] | None:
    """The part of the image that the outline touches, and which of its pixels lie inside; None if outside."""
    reach = outline.radius * 1.9 + 1
    top, bottom = max(0, int(outline.row - reach)), min(size, int(outline.row + reach) + 1)
    left, right = max(0, int(outline.column - reach)), min(size, int(outline.column + reach) + 1)
    if top >= bottom or left >= right:
        return None
    dy = np.arange(top, bottom)[:, None] - outline.row
    dx = np.arange(left, right)[None, :] - outline.column
    along = (dx * np.cos(outline.tilt) + dy * np.sin(outline.tilt)) / outline.aspect
    across = (dy * np.cos(outline.tilt) - dx * np.sin(outline.tilt)) * outline.aspect
    angle = np.arctan2(across, along)
    limit = np.ones_like(angle)
    for order, (amplitude, phase) in enumerate(zip(outline.amplitudes, outline.phases, strict=True), start=2):
        limit += amplitude * np.cos(order * angle + phase)
    inside = along**2 + across**2 < (outline.radius * np.maximum(limit, 0.3)) ** 2
    return (slice(top, bottom), slice(left, right)), inside


def cells(
    rng: np.random.Generator, size: int, radius: tuple[float, float], coverage: float, overlap: bool = False
) -> IntImage:
    """Instance map (size, size): 0 background, 1.. one number a cell.

    Args:
        radius: smallest and largest mean radius, pixels (log-uniform for the scene, then spread by 25 %).
        coverage: share of the image to fill; the last cell may pass it.
        overlap: whether a later cell may lie on an earlier one.
    """
    instances = np.zeros((size, size), np.int32)
    typical = float(np.exp(rng.uniform(np.log(radius[0]), np.log(radius[1]))))
    target, filled, number = coverage * size * size, 0, 0
    for _ in range(400):
        if filled >= target:
            break
        outline = random_outline(rng, size, typical * float(np.exp(rng.normal(0, 0.25))), roughness=0.06)
        window = outline_window(outline, size)
        if window is None:
            continue
        where, inside = window
        view = instances[where]
        if not overlap and (view[inside] > 0).any():
            continue
        number += 1
        filled += int((inside & (view == 0)).sum())
        view[inside] = number
    return instances


def vessels(
    rng: np.random.Generator, size: int, width: tuple[float, float], trees: int, spread: float = 0.12
) -> FloatImage:
    """Soft coverage (size, size) in [0, 1] of branching, tapering vessels.

    Args:
        width: smallest and largest width, pixels; branches taper from the largest to the smallest.
        trees: number of stems, each entering from the image's edge or its middle.
        spread: standard deviation of the change of direction a pixel, radians.
    """
    canvas = np.zeros((size, size), np.float32)
    tips: list[tuple[float, float, float, float]] = []
    for _ in range(trees):
        edge, along = int(rng.integers(4)), float(rng.uniform(0, size))
        start = [(0.0, along), (size - 1.0, along), (along, 0.0), (along, size - 1.0)][edge]
        inward = np.arctan2(size / 2 - start[0], size / 2 - start[1]) + rng.normal(0, 0.5)
        tips.append((*start, float(inward), float(rng.uniform(0.5, 1.0)) * width[1] / 2))
    drawn = 0
    while tips and drawn < 60:
        row, column, heading, radius = tips.pop()
        drawn += 1
        for _ in range(int(rng.uniform(0.25, 0.8) * size)):
            heading += float(rng.normal(0, spread))
            row, column = row + np.sin(heading), column + np.cos(heading)
            radius = max(width[0] / 2, radius * 0.997)
            if not (-2 <= row < size + 2 and -2 <= column < size + 2):
                break
            if (disc := soft_disc(size, row, column, radius)) is not None:
                np.maximum(canvas[disc[0]], disc[1], out=canvas[disc[0]])
            if rng.random() < 0.03 and radius > width[0] / 2 * 1.1:
                side = heading + float(rng.choice([-1, 1]) * rng.uniform(0.4, 1.0))
                tips.append((row, column, side, max(width[0] / 2, radius * float(rng.uniform(0.5, 0.8)))))
                radius *= 0.93
    return canvas


def soft_disc(
    size: int, row: float, column: float, radius: float
) -> tuple[tuple[slice, slice], FloatImage] | None:
    """The part of a (size, size) image that a disc touches, and its coverage there; None outside."""
    reach = radius + 1
    top, bottom = max(0, int(row - reach)), min(size, int(row + reach) + 2)
    left, right = max(0, int(column - reach)), min(size, int(column + reach) + 2)
    if top >= bottom or left >= right:
        return None
    distance = np.hypot(np.arange(top, bottom)[:, None] - row, np.arange(left, right)[None, :] - column)
    coverage: FloatImage = np.clip(radius - distance + 0.5, 0, 1).astype(np.float32)
    return (slice(top, bottom), slice(left, right)), coverage


def lesion(rng: np.random.Generator, size: int, radius: tuple[float, float], count: int = 1) -> IntImage:
    """Instance map (size, size) of ``count`` large irregular bodies whose centres lie well inside.

    Args:
        radius: smallest and largest mean radius, pixels.
    """
    instances = np.zeros((size, size), np.int32)
    for number in range(1, count + 1):
        reach = float(rng.uniform(*radius))
        outline = random_outline(rng, size, reach, roughness=0.1)
        margin = min(0.45 * size, 0.6 * reach + 2)
        centred = Outline(
            row=float(rng.uniform(margin, size - margin)),
            column=float(rng.uniform(margin, size - margin)),
            radius=outline.radius, aspect=outline.aspect, tilt=outline.tilt,
            amplitudes=outline.amplitudes, phases=outline.phases,
        )  # fmt: skip
        window = outline_window(centred, size)
        if window is not None:
            where, inside = window
            instances[where][inside] = number
    return instances


def prior_cells(rng: np.random.Generator, size: int) -> NDArray[np.bool_]:
    coverage = float(np.exp(rng.uniform(np.log(0.02), np.log(0.5))))
    return cells(rng, size, (1.8, 13.0), coverage, overlap=bool(rng.random() < 0.3)) > 0


def prior_vessels(rng: np.random.Generator, size: int) -> NDArray[np.bool_]:
    widest = float(rng.uniform(2.5, 6.5))
    return vessels(rng, size, (1.2, widest), int(rng.integers(1, 5))) > 0.5


def prior_lesions(rng: np.random.Generator, size: int) -> NDArray[np.bool_]:
    return lesion(rng, size, (0.05 * size, 0.33 * size), int(rng.integers(1, 3))) > 0


# The shape prior by the pre-trained head that a class starts from (`ClassConfig.like`).
PRIORS: dict[str, Callable[[np.random.Generator, int], NDArray[np.bool_]]] = {
    "vessel": prior_vessels,
    "blob": prior_cells,
    "region": prior_lesions,
    "bright": prior_lesions,
    "dark": prior_lesions,
}
