"""Curves over the number of labels, as one SVG file that needs no page around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from markupsafe import Markup

from common.durable import write_atomic
from common.pages.drawing import COLOURS, DASHES, WIDTH, Scale, element, marker
from server.report.charts import end_labels, frame
from server.report.wording import model_name

LEFT, RIGHT, TOP, HEIGHT = 46.0, WIDTH - 130.0, 30.0, 230.0
PANELS = {"own": "Dice on the site's own test patients", "all": "Dice on all sites' test patients"}
MARGIN = 0.02  # of Dice, above and below the curves


@dataclass(frozen=True)
class Curve:
    """``points``: (labels, mean, (low, high) of its 95 % interval), by labels."""

    model: str
    points: Sequence[tuple[int, float, tuple[float, float]]]


def save_plot(path: Path, panels: Mapping[str, Sequence[Curve]]) -> None:
    """Write one panel beside the other, on one scale. Raises ``ArtefactError`` if the disk is full."""
    write_atomic(path, str(plot(panels)).encode())


def plot(panels: Mapping[str, Sequence[Curve]]) -> Markup:
    """The whole picture. Every curve is named at its end and differs by dashes and by its marks' shape."""
    shown = [point for curves in panels.values() for curve in curves for point in curve.points]
    ends = [end for _, _, interval in shown for end in interval]
    up = Scale(min(ends, default=0.0) - MARGIN, min(1.0, max(ends, default=1.0) + MARGIN), TOP + HEIGHT, TOP)
    labels = sorted({labels for labels, _, _ in shown})
    drawn = [
        element("g", *_panel(PANELS[name], curves, labels, up), transform=f"translate({place * WIDTH + 8},0)")
        for place, (name, curves) in enumerate(panels.items())
    ]
    style = element("style", Markup(files("common.pages").joinpath("style.css").read_text(encoding="utf-8")))
    box = f"0 0 {WIDTH * len(panels) + 8} {TOP + HEIGHT + 46:.0f}"
    about = "Dice against labelled training patients a site, a curve a model, with 95 % intervals"
    return element(
        "svg", style, *drawn, xmlns="http://www.w3.org/2000/svg", viewBox=box, class_="chart", role="img",
        aria_label=about,
    )  # fmt: skip


def _panel(title: str, curves: Sequence[Curve], labels: Sequence[int], up: Scale) -> list[Markup]:
    # A place a number: doubling the labels is a step to the right.
    across = Scale(0, max(1, len(labels) - 1), LEFT + 14, RIGHT - 14)
    marks = [element("text", title, x=LEFT, y=16, class_="group"), *frame(up, LEFT, RIGHT)]
    for place, count in enumerate(labels):
        marks.append(
            element("text", str(count), x=across.at(place), y=TOP + HEIGHT + 17, class_="tick middle")
        )
    under = "labelled training patients a site"
    marks.append(element("text", under, x=(LEFT + RIGHT) / 2, y=TOP + HEIGHT + 36, class_="tick middle"))
    ends = []
    for number, curve in enumerate(curves):
        if curve.points:
            places = [across.at(labels.index(count)) for count, _, _ in curve.points]
            marks.append(_curve(number, curve, places, up))
            ends.append((up.at(curve.points[-1][1]), number, model_name(curve.model)))
    return [*marks, *end_labels(ends, RIGHT + 6, TOP, TOP + HEIGHT)]


def _curve(number: int, curve: Curve, places: Sequence[float], up: Scale) -> Markup:
    parts = [element("title", model_name(curve.model))]
    line = " ".join(
        f"{x:.1f},{up.at(mean):.1f}" for x, (_, mean, _) in zip(places, curve.points, strict=True)
    )
    dashes = DASHES[number % len(DASHES)]
    parts.append(element("polyline", points=line, class_="curve", stroke_dasharray=dashes))
    for x, (_, mean, (low, high)) in zip(places, curve.points, strict=True):
        parts.append(element("line", x1=x, x2=x, y1=up.at(low), y2=up.at(high), class_="whisker"))
        parts.append(marker(number % COLOURS, x, up.at(mean)))
    return element("g", *parts, class_=f"s{number % COLOURS}")
