"""What the page derives from a report: means, differences and whether two intervals overlap.

A mean is always the unweighted mean over sites (and classes, where there are several). A difference is
student minus local_only, taken before rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean

from common.pages.wording import plural
from server.report.schema import BenefitCell, RunReport
from server.report.wording import LOWER_IS_BETTER, METRICS, MODELS


class Verdict(StrEnum):
    """Of a student against local training at one site, by the two 95 % intervals."""

    above = "above"
    below = "below"
    overlap = "overlap"
    unknown = "unknown"  # an interval is missing


@dataclass(frozen=True)
class Pair:
    """A student and its ``local_only`` twin, tested on the same patients; both have a value."""

    name: str
    student: BenefitCell
    local: BenefitCell

    @property
    def difference(self) -> float:
        assert self.student.value is not None
        assert self.local.value is not None
        return self.student.value - self.local.value

    @property
    def verdict(self) -> Verdict:
        if self.student.ci95 is None or self.local.ci95 is None:
            return Verdict.unknown
        if self.student.ci95[0] > self.local.ci95[1]:
            return Verdict.above
        if self.student.ci95[1] < self.local.ci95[0]:
            return Verdict.below
        return Verdict.overlap


@dataclass(frozen=True)
class Comparison:
    """Students against local training over every site where both were measured (Dice)."""

    tested_on: str
    pairs: list[Pair]
    over: str  # what the means are taken over, for the reader
    classes: int = 1

    @property
    def student(self) -> float:
        return fmean(pair.student.value for pair in self.pairs if pair.student.value is not None)

    @property
    def local(self) -> float:
        return fmean(pair.local.value for pair in self.pairs if pair.local.value is not None)

    @property
    def difference(self) -> float:
        return self.student - self.local

    @property
    def counted(self) -> str:
        return plural(len(self.pairs), "comparison" if self.classes > 1 else "site")

    def of(self, verdict: Verdict) -> list[Pair]:
        return [pair for pair in self.pairs if pair.verdict is verdict]


@dataclass(frozen=True)
class Row:
    """One site and class of a benefit matrix. ``cells`` runs along the matrix's models."""

    site: str
    class_name: str
    cells: list[BenefitCell | None]

    @property
    def patients(self) -> int | None:
        """The number of patients tested, where it is one number for the whole row."""
        numbers = {cell.patients for cell in self.cells if cell is not None and cell.value is not None}
        return numbers.pop() if len(numbers) == 1 else None

    def marked(self, cell: BenefitCell | None) -> bool:
        """True for the best value of the row, where there is more than one value."""
        values = [each.value for each in self.cells if each is not None and each.value is not None]
        if cell is None or cell.value is None or len(values) < 2:
            return False
        if cell.metric in LOWER_IS_BETTER:
            return cell.value == min(values)
        return cell.value == max(values)


@dataclass(frozen=True)
class Matrix:
    metric: str
    tested_on: str
    models: list[str]
    rows: list[Row]
    span: tuple[float, float]  # the axis of the interval bars

    @property
    def classes(self) -> list[str]:
        return list(dict.fromkeys(row.class_name for row in self.rows))

    @property
    def complete(self) -> list[Row]:
        """Rows in which every model has a value: only over these are the models' means comparable."""
        return [
            row for row in self.rows if all(cell is not None and cell.value is not None for cell in row.cells)
        ]

    @property
    def means(self) -> list[float]:
        rows = self.complete
        columns: list[list[float]] = [[] for _ in self.models]
        for row in rows:
            for column, cell in zip(columns, row.cells, strict=True):
                if cell is not None and cell.value is not None:
                    column.append(cell.value)
        return [fmean(column) for column in columns] if rows else []

    @property
    def over(self) -> str:
        return over(self.complete, self.classes)


def over(rows: Sequence[Row], classes: Sequence[str]) -> str:
    text = plural(len({row.site for row in rows}), "site")
    return text if len(classes) < 2 else f"{text} and {len(classes)} classes"


def metrics_of(report: RunReport) -> list[str]:
    found = list(dict.fromkeys(cell.metric for cell in report.benefit))
    return [name for name in METRICS if name in found] + [name for name in found if name not in METRICS]


def models_of(cells: Sequence[BenefitCell]) -> list[str]:
    """The models of ``cells`` in the page's order: known ones, others as they come, the student last."""
    found = list(dict.fromkeys(cell.model for cell in cells))
    known = [model for model in MODELS if model in found and model != "student"]
    others = [model for model in found if model not in MODELS]
    return [*known, *others, *(["student"] if "student" in found else [])]


def matrix_of(report: RunReport, metric: str, tested_on: str) -> Matrix | None:
    """The matrix of one metric, or None where nothing of the kind was measured."""
    cells = [cell for cell in report.benefit if cell.metric == metric and cell.tested_on == tested_on]
    if not cells:
        return None
    models = models_of([cell for cell in report.benefit if cell.metric == metric])
    classes = list(dict.fromkeys(cell.class_name for cell in cells))
    index = {(cell.site, cell.class_name, cell.model): cell for cell in cells}
    rows = [
        Row(site.id, name, [index.get((site.id, name, model)) for model in models])
        for site in report.sites
        for name in classes
    ]
    rows = [row for row in rows if any(cell is not None for cell in row.cells)]
    return Matrix(metric, tested_on, models, rows, _span(report.benefit, metric))


def _span(cells: Sequence[BenefitCell], metric: str) -> tuple[float, float]:
    """One axis for every cell of a metric: the range of values and intervals, a little widened."""
    numbers = [
        number
        for cell in cells
        if cell.metric == metric and cell.value is not None
        for number in (cell.value, *(cell.ci95 or ()))
    ]
    if not numbers:
        return 0.0, 1.0
    low, high = min(numbers), max(numbers)
    margin = 0.06 * (high - low) or 0.05
    bounded = metric not in LOWER_IS_BETTER
    return max(0.0, low - margin), min(1.0, high + margin) if bounded and high <= 1 else high + margin


def compare(report: RunReport, tested_on: str) -> Comparison | None:
    """Dice of ``student`` against ``local_only``; None where no site has both."""
    matrix = matrix_of(report, "dice", tested_on)
    if matrix is None or not {"student", "local_only"} <= set(matrix.models):
        return None
    student, local = matrix.models.index("student"), matrix.models.index("local_only")
    pairs, rows = [], []
    for row in matrix.rows:
        ours, theirs = row.cells[student], row.cells[local]
        if ours is None or theirs is None or ours.value is None or theirs.value is None:
            continue
        name = row.site if len(matrix.classes) < 2 else f"{row.site} ({row.class_name})"
        pairs.append(Pair(name, ours, theirs))
        rows.append(row)
    return Comparison(tested_on, pairs, over(rows, matrix.classes), len(matrix.classes)) if pairs else None
