"""Inline SVG: marks, scales and ticks that every page of ours draws its charts with.

Colours come from ``style.css`` by class, so that they follow its scheme. Every series also differs by its
marker's shape or its line's dashes: no chart needs colour to be read. Coordinates are rounded, so that equal
numbers give equal bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH = 460
COLOURS = 7  # --series-0 .. --series-6 in style.css
DASHES = ("none", "7 3", "2 3", "8 3 2 3", "1 2", "12 4", "4 2 4 6")


def element(name: str, *children: str | Markup, **attributes: str | float) -> Markup:
    """``element("line", x1=0, class_="axis")``: texts and attributes are escaped, numbers rounded."""
    pairs = [
        (key.rstrip("_").replace("_", "-"), f"{value:.1f}" if isinstance(value, float) else str(value))
        for key, value in attributes.items()
    ]
    head = Markup("").join(Markup(' {}="{}"').format(key, value) for key, value in pairs)
    inner = Markup("").join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), head, inner)


def picture(height: float, label: str, *marks: Markup, width: int = WIDTH) -> Markup:
    """The frame of a chart; ``label`` is its text alternative."""
    box = f"0 0 {width} {height:.0f}"
    return element("svg", *marks, viewBox=box, class_="chart", role="img", aria_label=label)


@dataclass(frozen=True)
class Scale:
    """A linear map from [low, high] to [start, end], clamped."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``: steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / wanted
    if raw < 1e-11:  # nothing that a rounded label could tell apart
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def marker(shape: int, x: float, y: float) -> Markup:
    """One of seven shapes of about 9 units across, centred."""
    corners: dict[int, list[tuple[float, float]]] = {
        1: [(-4, -4), (4, -4), (4, 4), (-4, 4)],
        2: [(0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)],
        3: [(0, -5.2), (5, 4), (-5, 4)],
        4: [(0, 5.2), (5, -4), (-5, -4)],
        5: [(-5, -2), (-2, -2), (-2, -5), (2, -5), (2, -2), (5, -2),
            (5, 2), (2, 2), (2, 5), (-2, 5), (-2, 2), (-5, 2)],
        6: [(-5, 0), (-2.5, -4.4), (2.5, -4.4), (5, 0), (2.5, 4.4), (-2.5, 4.4)],
    }  # fmt: skip
    if shape not in corners:
        return element("circle", cx=x, cy=y, r=4.6, class_="mark")
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners[shape])
    return element("polygon", points=points, class_="mark")


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}\u2026"
