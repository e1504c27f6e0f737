"""The cells of `simulations.benchmark.privacy_utility` as a table and as a curve: Dice over epsilon.

``python -m simulations.benchmark.privacy_curve CELLS.json [--plot FILE.svg]`` draws what was measured, by
whatever code.

An interval is Student's t over the seeds, 95 %. A seed draws other patients to train and to test on, other
batches and other noise, so their spread holds all that chance did to a figure; to resample one seed's test
patients would leave out the noise, which is what is measured here. Three seeds give wide intervals (2.5 times
their standard deviation), and one gives none. What is lost is taken seed by seed, on the same test patients.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from markupsafe import Markup
from scipy.stats import t as student_t

from common.errors import UsageError
from common.pages.drawing import Scale, element, ticks
from common.plan import rebuild
from simulations.benchmark.privacy_rows import Cell, Row
from simulations.results import spread

COVERAGE = 0.95
BySeed = Mapping[int, float]
Value = Callable[[Cell], float | None]
Cells = Mapping[Row, Mapping[int, Cell]]

TOP, FOOT, LEFT, PANEL, GAP = 34.0, 300.0, 44.0, 300.0, 40.0
WIDTH = 2 * PANEL + GAP + LEFT + 12
INK, MUTED, LINE = "#1c2430", "#586271", "#dcdfe3"
MODELS = (("teacher", "#0067a5"), ("student", "#c9560a"))


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, and how far to either side of it 95 % reach; None: of one seed."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> Interval:
        known = list(values)
        if len(known) < 2:
            return cls(known[0], None)
        factor = float(student_t.ppf((1 + COVERAGE) / 2, len(known) - 1))
        return cls(mean(known), factor * stdev(known) / math.sqrt(len(known)))

    def __str__(self) -> str:
        if self.half is None:
            return "-"
        return f"{self.mean - self.half:.3f} to {self.mean + self.half:.3f}"


def by_row(cells: Sequence[Cell]) -> Cells:
    """Row -> seed -> cell, in the order of ``cells``."""
    found: dict[Row, dict[int, Cell]] = {}
    for cell in cells:
        found.setdefault(cell.row, {})[cell.seed] = cell
    return found


def sites_mean(cell: Cell) -> float:
    return mean(cell.sites)


def worst_site(cell: Cell) -> float:
    return min(cell.sites)


def reference(rows: Cells, row: Row) -> Row | None:
    """Of the rows without noise and with as many patients the one of the highest mean."""
    found = [one for one in rows if (one.epsilon, one.patients) == (None, row.patients)]
    return max(found, key=lambda one: mean(map(sites_mean, rows[one].values())), default=None)


def lost(rows: Cells, row: Row, value: Value = sites_mean) -> list[float]:
    """By how much ``row`` lies below its `reference`, for every seed that both have."""
    best = reference(rows, row)
    pairs = [] if best is None else [(rows[best].get(seed), cell) for seed, cell in rows[row].items()]
    values = [(value(one), value(cell)) for one, cell in pairs if one is not None]
    return [high - low for high, low in values if high is not None and low is not None]


def table(cells: Sequence[Cell]) -> str:
    """Markdown, a row each: means over the seeds, each seed's own value behind; *lost* is to `reference`."""
    head = [
        "epsilon", "patients a site", "steps", "noise a coordinate", "teacher, mean of the sites (seeds)",
        "95 %", "lost (seeds)", "95 %", "worst site", "worst site lost", "student, own site",
        "student, worst site", "CPU s",
    ]  # fmt: skip
    rows = by_row(cells)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(_columns(rows, row))} |" for row in rows]
    return "\n".join(lines)


def _columns(rows: Cells, row: Row) -> list[str]:
    found = list(rows[row].values())
    itself = row == reference(rows, row)
    away, worst = ([] if itself else lost(rows, row, value) for value in (sites_mean, worst_site))
    return [
        _name(row),
        f"{mean(cell.patients for cell in found):.0f}",
        str(found[0].steps),
        f"{mean(cell.noise for cell in found):.4f}",
        spread(map(sites_mean, found)),
        str(Interval.of(map(sites_mean, found))),
        spread(away),
        str(Interval.of(away)) if away else "-",
        spread(map(worst_site, found)),
        f"{mean(worst):.3f}" if worst else "-",
        spread(cell.student.get("own") for cell in found),
        spread(cell.student.get("worst") for cell in found),
        f"{mean(cell.cpu_s for cell in found):.0f}",
    ]


def _name(row: Row) -> str:
    if row.epsilon is not None:
        return f"{row.epsilon:g}"
    return "none, whole decoder, new crops" if row.best else "none"


def curve(cells: Sequence[Cell]) -> str:
    """An SVG of its own: the mean of the sites on the left, the worst site on the right.

    From left to right epsilon grows, up to none; of several rows of one epsilon the best mean is drawn.
    Across lies the teacher before any label (dotted) and the best without noise (dashed).

    Raises ``UsageError`` if there are rows of several numbers of patients, or none with noise.
    """
    rows = by_row(cells)
    if len({row.patients for row in rows}) != 1:
        raise UsageError("a curve is of one number of patients: draw the others apart")
    drawn = _drawn(rows)
    if len(drawn) < 2:
        raise UsageError("a curve wants a row with noise, and one without that was trained")
    start = next((row for row in rows if row.epsilon is None and found_steps(rows, row) == 0), None)
    panels: list[tuple[str, Value, Value]] = [
        ("mean of the sites", sites_mean, lambda cell: cell.student.get("own")),
        ("worst site", worst_site, lambda cell: cell.student.get("worst")),
    ]
    low, high = _reach(rows, drawn, start, panels)
    up = Scale(low, high, FOOT, TOP)
    marks = [element("rect", width=WIDTH, height=FOOT + 62, fill="#ffffff")]
    for number, (title, *values) in enumerate(panels):
        left = LEFT + number * (PANEL + GAP)
        marks += _frame(title, up, left, [_tick(row) for row in drawn])
        marks += _levels(rows, [(start, "2 3"), (drawn[-1], "7 3")], values[0], up, left)
        for shift, (model, value) in zip((-5.0, 5.0), zip(MODELS, values, strict=True), strict=True):
            marks += _series(model, [_at_seeds(rows[row], value) for row in drawn], up, left, shift)
    taught = any(cell.student for cell in cells)
    marks += _legend(MODELS if taught else MODELS[:1])
    box = f"0 0 {WIDTH:.0f} {FOOT + 62:.0f}"
    about = "Dice over epsilon, of teacher and student, with 95 % intervals over the seeds."
    svg = element(
        "svg", *marks, xmlns="http://www.w3.org/2000/svg", viewBox=box, width=WIDTH, height=FOOT + 62,
        font_family="sans-serif", font_size="12", role="img", aria_label=about,
    )  # fmt: skip
    return str(svg) + "\n"


def found_steps(rows: Cells, row: Row) -> int:
    return next(iter(rows[row].values())).steps


def _drawn(rows: Cells) -> list[Row]:
    """One row an epsilon, ascending, and last the best without noise that was trained."""
    best: dict[float, Row] = {}
    for row in rows:
        if row.epsilon is None and found_steps(rows, row) == 0:
            continue
        key = math.inf if row.epsilon is None else row.epsilon
        best[key] = max(row, best.get(key, row), key=lambda one: mean(map(sites_mean, rows[one].values())))
    noised = [key for key in best if key < math.inf]
    return [best[key] for key in sorted(best)] if noised and math.inf in best else []


def _tick(row: Row) -> str:
    return "no noise" if row.epsilon is None else f"{row.epsilon:g}"


def _at_seeds(cells: Mapping[int, Cell], value: Value) -> Interval | None:
    known = [found for cell in cells.values() if (found := value(cell)) is not None]
    return Interval.of(known) if known else None


def _reach(
    rows: Cells, drawn: Sequence[Row], start: Row | None, panels: Sequence[tuple[str, Value, Value]]
) -> tuple[float, float]:
    """The Dice from below to above all that is drawn, of ``start`` the teacher's mean; 1 at most."""
    ends = []
    for row in [*drawn, *([start] if start else [])]:
        for _, *values in panels:
            found = [_at_seeds(rows[row], value) for value in (values if row is not start else values[:1])]
            for one in found:
                if one is not None:
                    half = (one.half or 0.0) if row is not start else 0.0
                    ends += [one.mean - half, one.mean + half]
    low, high = math.floor(20 * min(ends)) / 20, math.ceil(20 * max(ends)) / 20
    return max(0.0, low), min(1.0, high)


def _frame(title: str, up: Scale, left: float, names: Sequence[str]) -> list[Markup]:
    right = left + PANEL
    marks = [element("text", title, x=left, y=TOP - 14, fill=INK, font_weight="bold")]
    for tick in ticks(up.low, up.high, 6):
        y = up.at(tick)
        marks.append(element("line", x1=left, x2=right, y1=y, y2=y, stroke=LINE))
        marks.append(element("text", f"{tick:.2f}", x=left - 6, y=y + 4, fill=MUTED, text_anchor="end"))
    for number, name in enumerate(names):
        x = _place(left, number, len(names))
        marks.append(element("text", name, x=x, y=FOOT + 17, fill=INK, text_anchor="middle"))
    under = element("text", "epsilon", x=(left + right) / 2, y=FOOT + 34, fill=MUTED, text_anchor="middle")
    return [*marks, under]


def _place(left: float, number: int, count: int) -> float:
    return left + PANEL * (number + 0.5) / count


def _levels(
    rows: Cells, levels: Sequence[tuple[Row | None, str]], value: Value, up: Scale, left: float
) -> list[Markup]:
    """The teacher's figure of a row, across the whole panel."""
    known = [(_at_seeds(rows[row], value), dash) for row, dash in levels if row is not None]
    places = [(up.at(found.mean), dash) for found, dash in known if found is not None]
    return [
        element(
            "line", x1=left, x2=left + PANEL, y1=y, y2=y, stroke=MODELS[0][1], stroke_dasharray=dash,
            class_="level",
        )
        for y, dash in places
    ]  # fmt: skip


def _series(
    model: tuple[str, str], points: Sequence[Interval | None], up: Scale, left: float, shift: float
) -> list[Markup]:
    """Dots, joined, each with its interval; the teacher's are round and the student's square."""
    name, colour = model
    marks, path = [], []
    for number, point in enumerate(points):
        if point is None:
            continue
        x, y = _place(left, number, len(points)) + shift, up.at(point.mean)
        path.append(f"{x:.1f},{y:.1f}")
        if point.half is not None:
            ends = up.at(point.mean - point.half), up.at(point.mean + point.half)
            marks.append(element("line", x1=x, x2=x, y1=ends[0], y2=ends[1], stroke=colour, class_="whisker"))
        marks.append(_dot(name, colour, x, y))
    line = element("polyline", points=" ".join(path), fill="none", stroke=colour, stroke_width="1.5")
    return [line, *marks]


def _dot(name: str, colour: str, x: float, y: float) -> Markup:
    if name == "teacher":
        return element("circle", cx=x, cy=y, r=4.5, fill=colour, class_=name)
    return element("rect", x=x - 4, y=y - 4, width=8, height=8, fill=colour, class_=name)


def _legend(models: Sequence[tuple[str, str]]) -> list[Markup]:
    y, marks, x = FOOT + 52, [], LEFT
    for name, colour in models:
        marks += [_dot(f"{name}", colour, x + 5, y - 4), element("text", name, x=x + 16, y=y, fill=INK)]
        x += 86
    for text, dash in (
        ("teacher, best without noise", "7 3"),
        ("teacher, before any label", "2 3"),
    ):
        line = element(
            "line", x1=x, x2=x + 26, y1=y - 4, y2=y - 4, stroke=MODELS[0][1], stroke_dasharray=dash
        )
        marks += [line, element("text", text, x=x + 32, y=y, fill=INK)]
        x += 210
    return marks


def load(path: Path) -> list[Cell]:
    """The cells that a measurement kept in ``path``. Raises ``UsageError`` if it holds none."""
    try:
        found = [rebuild(Cell, cell) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} holds no cells: name a file that privacy_utility --json wrote") from error
    if not found:
        raise UsageError(f"{path} holds no cells yet: wait for the first")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cells", type=Path, metavar="CELLS.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the curve here")
    given = parser.parse_args(arguments)
    try:
        cells = load(given.cells)
        sys.stdout.write(table(cells) + "\n")
        if given.plot:
            given.plot.write_text(curve(cells), encoding="utf-8")
    except UsageError as error:
        parser.exit(error.exit_code, f"{error}\n")


if __name__ == "__main__":
    main()
