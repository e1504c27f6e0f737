"""The officer's charts, drawn from the document: its numbers, its ticks, nothing computed but places."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from markupsafe import Markup

from common.pages.drawing import DASHES, WIDTH, Scale, element, marker, picture, shortened
from common.pages.wording import exact

LEFT, TOP, HEIGHT = 46.0, 10.0, 210.0
RIGHT = WIDTH - 118.0
Document = dict[str, Any]
Place = Callable[[float], float]


def stage_bar(document: Document) -> Markup:
    """What each stage added to the joint epsilon, end to end, with the policy's caps."""
    axis, policy, rows = document["plots"]["stages"], document["policy"], document["budget"]["stages"]
    across, top = Scale(0.0, axis[-1], 8.0, WIDTH - 12.0), 8.0 + 15 * len(rows)
    foot = top + 34
    marks, start = _uprights(axis, across.at, top - 6, foot), 0.0
    for number, row in enumerate(rows):
        x, end = across.at(start), across.at(row["joint"])
        box = element("rect", x=x, y=top, width=max(1.0, end - x), height=26, class_="fill")
        text = _beside(f"{row['stage']} +{exact(row['added'])}", x, 12.0 + 15 * number)
        marks.append(element("g", box, text, class_=f"s{number % 7}"))
        start = row["joint"]
    caps = {} if policy is None else {"cap in all": "max_epsilon_total", "cap a run": "max_epsilon_per_run"}
    for place, (name, key) in enumerate(caps.items()):
        x = across.at(policy[key])
        marks.append(element("line", x1=x, x2=x, y1=top - 8, y2=foot + 2, class_="cap"))
        marks.append(_beside(f"{name} {exact(policy[key])}", x, foot + 34 + 15 * place))
    height = foot + 24 + 15 * len(caps)
    return picture(height, "Epsilon by stage, stacked, against the caps of the policy.", *marks)


def _beside(text: str, x: float, y: float) -> Markup:
    """A label that starts at ``x``, or ends there where it would not fit."""
    return element("text", text, x=x, y=y, class_="label end" if x > WIDTH / 2 else "label")


def step_lines(document: Document) -> Markup:
    """Epsilon by noised step: planned and booked."""
    axes, points = document["plots"]["steps"], document["budget"]["by_step"]
    across = Scale(0.0, axes["x"][-1], LEFT, RIGHT)
    up = Scale(0.0, axes["y"][-1], TOP + HEIGHT, TOP)
    lines = [("planned", points["planned"]), ("booked", points["booked"])]
    drawn = [
        _line(number, name, [(across.at(x), up.at(y)) for x, y in line], marks=number == 0)
        for number, (name, line) in enumerate(lines)
    ]
    frame = _frame(axes["x"], axes["y"], across.at, up.at)
    title = element("text", "noised steps", x=(LEFT + RIGHT) / 2, y=TOP + HEIGHT + 34, class_="tick middle")
    label = "Epsilon after each noised step, as planned and as the ledger booked it."
    return picture(TOP + HEIGHT + 40, label, *frame, title, *drawn, *_legend([name for name, _ in lines]))


def class_bars(document: Document) -> Markup:
    """Patients by what they have spent over all projects."""
    axis, rows = document["plots"]["classes"], document["budget"]["classes"]
    across, y = Scale(0.0, axis[-1], 130.0, WIDTH - 60.0), 8.0
    marks: list[Markup] = []
    for row in rows:
        figure = "NO GUARANTEE" if row["epsilon"] is None else f"\u03b5 {exact(row['epsilon'])}"
        marks.append(element("text", figure, x=122, y=y + 13, class_="label end"))
        end = across.at(row["patients"])
        marks.append(element("rect", x=130, y=y, width=max(1.5, end - 130), height=17, class_="bytes up"))
        text = f"{exact(row['patients'])} patients"
        marks.append(element("text", text, x=end + 6, y=y + 13, class_="label"))
        y += 24
    return picture(
        y + 24, "Patients by epsilon spent over all projects.", *_uprights(axis, across.at, 4.0, y), *marks
    )


def roc_curve(document: Document) -> Markup:
    """Most of an attacker, the crude bound, guessing, and what audits found. Logarithmic across."""
    axes, roc = document["plots"]["roc"], document["meaning"]["roc"]
    low = math.log10(axes["x"][0])

    def across(rate: float) -> float:
        return LEFT + (RIGHT - LEFT) * (1 - math.log10(max(rate, axes["x"][0])) / low)

    up = Scale(0.0, 1.0, TOP + HEIGHT, TOP).at
    guess = [[x, x] for x, _ in roc["ceiling"]]
    lines = [("most possible", roc["ceiling"]), ("\u03b5, \u03b4 alone", roc["crude"]), ("guessing", guess)]
    lines += [(f"found: {audit['artefact']}", audit["roc"]) for audit in document["artefacts"]]
    drawn = [
        _line(number, name, [(across(x), up(y)) for x, y in line])
        for number, (name, line) in enumerate(lines)
    ]
    title = element(
        "text", "share wrongly named", x=(LEFT + RIGHT) / 2, y=TOP + HEIGHT + 34, class_="tick middle"
    )
    label = (
        "Share of patients found for a share wrongly named: the most any attacker can reach, and guessing."
    )
    frame = _frame(axes["x"], axes["y"], across, up)
    return picture(TOP + HEIGHT + 40, label, *frame, title, *drawn, *_legend([name for name, _ in lines]))


def noise_quantiles(document: Document) -> Markup:
    """Found minus expected quantile of the rehearsal's noise, with the band of a right build."""
    axes, rows = document["plots"]["noise"], document["rehearsal"]["figures"]["quantiles"]
    across = Scale(axes["x"][0], axes["x"][-1], LEFT, RIGHT)
    up = Scale(-axes["reach"], axes["reach"], TOP + HEIGHT, TOP)
    edge = [(across.at(x), up.at(half)) for x, _, half in rows]
    edge += [(across.at(x), up.at(-half)) for x, _, half in reversed(rows)]
    band = element("polygon", points=_points(edge), class_="band")
    dots = [marker(0, across.at(x), up.at(found)) for x, found, _ in rows]
    frame = _frame(axes["x"], axes["y"], across.at, up.at)
    title = element(
        "text", "expected quantile", x=(LEFT + RIGHT) / 2, y=TOP + HEIGHT + 34, class_="tick middle"
    )
    label = "Quantiles of the noise, found minus expected, within the band of a right build."
    return picture(TOP + HEIGHT + 40, label, *frame, title, band, element("g", *dots, class_="s0 tiny"))


def batch_sizes(document: Document) -> Markup:
    """Steps by how many patients they drew, and how many independent draws would give."""
    axes, rows = document["plots"]["batches"], document["rehearsal"]["figures"]["batches"]
    width = rows[1][0] - rows[0][0] if len(rows) > 1 else 1
    across = Scale(rows[0][0], rows[-1][0] + width, LEFT, RIGHT)
    up = Scale(0.0, axes["y"][-1], TOP + HEIGHT, TOP)
    marks = _frame(axes["x"], axes["y"], lambda size: across.at(size + width / 2), up.at)
    dots = []
    for size, found, expected in rows:
        x, y = across.at(size), up.at(found)
        wide = (across.at(size + width) - x) * 0.8
        marks.append(
            element("rect", x=x + wide * 0.1, y=y, width=wide, height=TOP + HEIGHT - y, class_="bytes up")
        )
        dots.append(marker(2, x + wide * 0.6, up.at(expected)))
    marks.append(element("g", *dots, class_="s1 tiny"))
    title = element("text", "patients drawn", x=(LEFT + RIGHT) / 2, y=TOP + HEIGHT + 34, class_="tick middle")
    names = []
    for place, name in enumerate(("bars: found", "marks: expected")):
        text = element("text", name, x=RIGHT + 8, y=TOP + 14 + 18 * place, class_="label")
        names.append(element("g", text, class_=f"s{place}"))
    label = "Batch sizes of the rehearsal against those of independent draws (binomial)."
    return picture(TOP + HEIGHT + 40, label, *marks, title, *names)


def audit_bars(document: Document) -> Markup:
    """Each audit's lower bound, the most that it could have found, and what is claimed."""
    axis, y = document["plots"]["audits"], 12.0
    across = Scale(0.0, axis[-1], 8.0, WIDTH - 16.0)
    marks: list[Markup] = []
    for audit in filter(itemgetter("bounded"), document["artefacts"]):
        y += 12
        marks.append(
            element(
                "text", shortened(f"{audit['artefact']}: {audit['verdict']}", 50), x=8, y=y, class_="group"
            )
        )
        y += 14
        marks.append(element("line", x1=8, x2=across.at(audit["ceiling"]), y1=y, y2=y, class_="range s6"))
        for shape, (name, key) in enumerate(
            (("lower bound", "lower"), ("could find", "ceiling"), ("claimed", "upper"))
        ):
            if audit[key] is not None:
                x = across.at(audit[key])
                mark = [element("title", f"{name} {exact(audit[key])}"), marker(shape, x, y)]
                marks.append(element("g", *mark, class_=f"s{shape}"))
        y += 18
    names = ("\u25cf lower bound", "\u25a0 most it could find", "\u25c6 claimed")
    for place, name in enumerate(names):
        text = element("text", name, x=8 + 150 * place, y=y + 34, class_="label")
        marks.append(element("g", text, class_=f"s{place}"))
    grid = _uprights(axis, across.at, 4.0, y)
    return picture(y + 42, "Audits: lower bound, most that could be found, and the claim.", *grid, *marks)


def _frame(x_ticks: Sequence[float], y_ticks: Sequence[float], across: Place, up: Place) -> list[Markup]:
    marks = []
    for tick in y_ticks:
        y = up(tick)
        marks.append(element("line", x1=LEFT, x2=RIGHT, y1=y, y2=y, class_="grid"))
        marks.append(element("text", exact(tick), x=LEFT - 6, y=y + 4, class_="tick end"))
    return marks + _uprights(x_ticks, across, TOP, TOP + HEIGHT)


def _uprights(axis: Sequence[float], across: Place, top: float, foot: float) -> list[Markup]:
    marks = []
    for tick in axis:
        x = across(tick)
        marks.append(element("line", x1=x, x2=x, y1=top, y2=foot, class_="grid"))
        marks.append(element("text", exact(tick), x=x, y=foot + 16, class_="tick middle"))
    return marks


def _line(number: int, name: str, places: Sequence[tuple[float, float]], marks: bool = False) -> Markup:
    dashes = DASHES[number % len(DASHES)]
    parts = [element("title", name)]
    parts.append(element("polyline", points=_points(places), class_="curve", stroke_dasharray=dashes))
    if marks:
        parts += [marker(number, x, y) for x, y in places]
    return element("g", *parts, class_=f"s{number % 7}")


def _legend(names: Sequence[str]) -> list[Markup]:
    """Names with their dashes, right of the frame."""
    found = []
    for number, name in enumerate(names):
        y = TOP + 14 + 20 * number
        dashes = DASHES[number % len(DASHES)]
        stroke = element(
            "line", x1=RIGHT + 8, x2=RIGHT + 30, y1=y - 4, y2=y - 4, class_="curve", stroke_dasharray=dashes
        )
        text = element("text", element("title", name), shortened(name, 14), x=RIGHT + 34, y=y, class_="label")
        found.append(element("g", stroke, text, class_=f"s{number % 7}"))
    return found


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
