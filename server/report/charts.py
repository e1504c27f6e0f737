"""The run report's charts. Every series is named beside its marks; see `common.pages.drawing`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from common.pages.drawing import COLOURS, DASHES, WIDTH, Scale, element, marker, picture, shortened, ticks
from common.pages.wording import small
from server.report.wording import interval, model_name, score

LETTER = 6.4  # width of a label's letter, on average, with room to spare
ROUND_LABEL = 60.0  # width that a round's name takes, with room beside it
SLOTS = {
    "student": 0, "local_only": 1, "teacher": 2, "local_only_scratch": 3, "local_teacher": 4,
    "personal_teacher": 5,
}  # fmt: skip


def slot(model: str) -> int:
    return SLOTS.get(model, COLOURS - 1)


def interval_bar(value: float, ci95: list[float] | None, span: tuple[float, float]) -> Markup:
    """A cell's small bar: the axis, the 95 % interval, the value. The cell's text says the same."""
    scale = Scale(*span, 3.0, 97.0)
    marks = [element("line", x1=0, x2=100, y1=5, y2=5, class_="rail")]
    if ci95 is not None:
        marks.append(element("line", x1=scale.at(ci95[0]), x2=scale.at(ci95[1]), y1=5, y2=5, class_="range"))
    marks.append(element("circle", cx=scale.at(value), cy=5, r=3, class_="mark"))
    return element("svg", *marks, viewBox="0 0 100 10", class_="bar", aria_hidden="true")


@dataclass(frozen=True)
class Dot:
    """One model at one site. ``value`` None is drawn as the word "withheld"."""

    model: str
    value: float | None
    ci95: list[float] | None


def dot_chart(groups: Sequence[tuple[str, Sequence[Dot]]], span: tuple[float, float], label: str) -> Markup:
    """Dots with their 95 % intervals, one group a site, one row a model."""
    longest = max((len(model_name(dot.model)) for _, dots in groups for dot in dots), default=0)
    left, row_height, y = max(168.0, 8 + LETTER * longest), 19.0, 6.0
    scale = Scale(*span, left + 8, WIDTH - 12.0)
    marks: list[Markup] = []
    for name, dots in groups:
        y += 19
        marks.append(element("text", element("title", name), shortened(name, 58), x=0, y=y, class_="group"))
        for dot in dots:
            y += row_height
            marks.append(element("text", model_name(dot.model), x=left - 6, y=y + 4, class_="label end"))
            marks.append(_dot(dot, scale, y))
        y += 12
    grid: list[Markup] = []
    for tick in ticks(*span):
        x = scale.at(tick)
        grid.append(element("line", x1=x, x2=x, y1=8, y2=y + 2, class_="grid"))
        grid.append(element("text", f"{tick:.4g}", x=x, y=y + 16, class_="tick middle"))
    return picture(y + 22, label, *grid, *marks)


def _dot(dot: Dot, scale: Scale, y: float) -> Markup:
    if dot.value is None:
        return element("text", "withheld", x=scale.start, y=y + 4, class_="label muted")
    parts = [element("title", _dot_text(dot))]
    if dot.ci95 is not None:
        low, high = scale.at(dot.ci95[0]), scale.at(dot.ci95[1])
        parts.append(element("line", x1=low, x2=high, y1=y, y2=y, class_="whisker"))
    parts.append(marker(slot(dot.model), scale.at(dot.value), y))
    return element("g", *parts, class_=f"s{slot(dot.model)}")


def _dot_text(dot: Dot) -> str:
    text = f"{model_name(dot.model)}: {score(dot.value or 0.0)}"
    return text if dot.ci95 is None else f"{text}, 95 % interval {interval(dot.ci95)}"


def curves(series: Mapping[str, Sequence[tuple[int, Sequence[float]]]], label: str) -> Markup:
    """Lines over rounds, one a name: ``name -> [(round, values within the round)]``.

    The values of a round are spread over its width, so that a round reads from left to right; a dotted
    line leads to the next one. The name stands at the line's end.
    """
    left, right, top = 46.0, WIDTH - 110.0, 10.0
    height = max(150.0, 15.0 * len(series) + 20)
    rounds = sorted({index for points in series.values() for index, _ in points})
    peak = max((value for points in series.values() for _, values in points for value in values), default=0.0)
    across = Scale(0, len(rounds), left, right)
    up = Scale(0.0, peak * 1.04 or 1.0, top + height, top)
    marks = frame(up, left, right)
    named = max(1, math.ceil(len(rounds) * ROUND_LABEL / (right - left)))  # one of so many has room
    for place, index in enumerate(rounds):
        if place % named:
            continue
        x = across.at(place + 0.5)
        marks.append(element("text", f"round {index}", x=x, y=top + height + 17, class_="tick middle"))
        if place:
            x = across.at(place)
            marks.append(element("line", x1=x, x2=x, y1=top, y2=top + height, class_="grid"))
    ends: list[tuple[float, int, str]] = []
    for number, (name, points) in enumerate(series.items()):
        paths = [_within(rounds.index(index), values, across, up) for index, values in points if values]
        if paths:
            marks.append(_line(number, name, paths))
            ends.append((paths[-1][-1][1], number, name))
    return picture(top + height + 24, label, *marks, *end_labels(ends, right + 8, top, top + height))


Point = tuple[float, float]


def _within(place: int, values: Sequence[float], across: Scale, up: Scale) -> list[Point]:
    last = max(1, len(values) - 1)
    shares = [0.5] if len(values) == 1 else [0.12 + 0.76 * step / last for step in range(len(values))]
    return [(across.at(place + share), up.at(value)) for share, value in zip(shares, values, strict=True)]


def _line(number: int, name: str, paths: Sequence[Sequence[Point]]) -> Markup:
    parts = [element("title", name)]
    for before, after in pairwise(paths):
        (x1, y1), (x2, y2) = before[-1], after[0]
        parts.append(element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_="jump"))
    for path in paths:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in path)
        dashes = DASHES[number % len(DASHES)]
        parts.append(element("polyline", points=points, class_="curve", stroke_dasharray=dashes))
        parts += [marker(number % COLOURS, x, y) for x, y in path]
    return element("g", *parts, class_=f"s{number % COLOURS}")


def frame(up: Scale, left: float, right: float) -> list[Markup]:
    """The horizontal lines of a chart with their numbers."""
    marks = []
    for tick in ticks(up.low, up.high):
        y = up.at(tick)
        marks.append(element("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
        marks.append(element("text", small(tick), x=left - 7, y=y + 4, class_="tick end"))
    return marks


def end_labels(ends: Sequence[tuple[float, int, str]], x: float, top: float, bottom: float) -> list[Markup]:
    """Names beside the line ends, pushed apart so that none covers another, downwards and then back up."""
    gap, marks = 15.0, []
    places: list[float] = []
    ordered = sorted(ends)
    for y, _, _ in ordered:
        places.append(max(y, places[-1] + gap) if places else max(y, top))
    for place, (rank, (_, number, name)) in zip(places, enumerate(ordered), strict=True):
        y = min(place, bottom - gap * (len(ordered) - 1 - rank)) + 4
        entry = element("text", element("title", name), shortened(name, 15), x=x, y=y, class_="label")
        marks.append(element("g", entry, class_=f"s{number % COLOURS}"))
    return marks


def byte_bars(
    rows: Sequence[tuple[str, float, float]], texts: Sequence[tuple[str, str]], label: str
) -> Markup:
    """Two bars a row: up (solid) and down (outlined), with their amounts at the ends."""
    left, y = 132.0, 4.0
    scale = Scale(0.0, max((max(up, down) for _, up, down in rows), default=1.0), 0.0, WIDTH - left - 86)
    marks: list[Markup] = []
    for (name, *amounts), words in zip(rows, texts, strict=True):
        marks.append(element("text", name, x=left - 8, y=y + 19, class_="label end"))
        for kind, amount, word in zip(("up", "down"), amounts, words, strict=True):
            length = max(1.5, scale.at(amount)) if amount else 0.0
            marks.append(element("rect", x=left, y=y, width=length, height=12, rx=2, class_=f"bytes {kind}"))
            text = f"{word} {kind}"
            marks.append(element("text", text, x=left + length + 6, y=y + 10, class_="label derived-label"))
            y += 15
        y += 9
    return picture(y, label, *marks)


def share_bar(parts: Sequence[int], label: str) -> Markup:
    """One bar cut in the proportions of ``parts``: kept solid, each kind of dropped hatched lighter."""
    total, x, marks = sum(parts) or 1, 0.0, []
    for number, part in enumerate(parts):
        width = 200.0 * part / total
        marks.append(element("rect", x=x, y=1, width=width, height=12, class_=f"share part{number}"))
        x += width
    box = "0 0 200 14"
    return element("svg", *marks, viewBox=box, class_="share-bar", role="img", aria_label=label)
