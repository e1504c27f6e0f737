"""The curve of what privacy costs: its intervals, what is lost to what, and where the picture's marks lie."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from common.errors import UsageError
from simulations.benchmark.privacy_curve import Interval, by_row, curve, load, lost, main, table
from simulations.benchmark.privacy_rows import Cell, Row

SHIPPED, HELD, BEST, PRIVATE = Row(steps=0), Row(steps=30), Row(steps=300, best=True), Row(epsilon=8)
STRICT = Row(epsilon=1)


def cell(row: Row, seed: int, small: float, large: float, student: float | None = None) -> Cell:
    dice = {"all": 0.0, "site a": small, "site b": large}
    steps = 80 if row.steps is None else row.steps
    made = {} if student is None else {"own": student, "worst": student - 0.1, "all": student}
    return Cell(row, seed, dice, 10.0, steps, 0.01, 400.0, made)


def study() -> list[Cell]:
    """Three seeds; a row's figures move with them, and the private ones keep their distance almost."""
    cells = []
    for seed, moved in enumerate((0.0, 0.02, -0.02)):
        cells += [
            cell(SHIPPED, seed, 0.5 + moved, 0.7 + moved),
            cell(HELD, seed, 0.7 + moved, 0.9 + moved, 0.8),
            cell(BEST, seed, 0.8 + moved, 0.9 + moved, 0.85 + moved),
            cell(PRIVATE, seed, 0.7 + moved + seed / 100, 0.9 + moved, 0.8 + moved),
            cell(STRICT, seed, 0.6 + moved, 0.8 + moved),
        ]
    return cells


def test_an_interval_is_students() -> None:
    """By hand: t of 2 degrees of freedom at 0.975 is 4.3027, and the deviation of 1, 2 and 3 is 1."""
    found = Interval.of([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert str(Interval.of([0.5])) == "-"


def test_what_is_lost_is_lost_to_the_best_row_without_noise_seed_by_seed() -> None:
    rows = by_row(study())
    assert lost(rows, PRIVATE) == pytest.approx([0.05, 0.045, 0.04])
    assert lost(rows, HELD) == pytest.approx([0.05] * 3)
    del rows[BEST][1]  # type: ignore[attr-defined]
    assert lost(rows, PRIVATE) == pytest.approx([0.05, 0.04])
    few = Row(epsilon=8, patients=200)
    assert lost(by_row([*study(), cell(few, 0, 0.1, 0.1)]), few) == []


def test_the_table_has_an_interval_for_what_is_lost() -> None:
    lines = [[part.strip() for part in line.split("|")[1:-1]] for line in table(study()).splitlines()]
    head, rows = lines[0], {(line[0], line[2]): dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
    assert len(set(head)) == len(head) - 1  # two of 95 %
    best, private = rows["none, whole decoder, new crops", "300"], rows["8", "80"]
    assert best["lost (seeds)"] == "-"
    assert private["lost (seeds)"] == "0.045 (0.050 0.045 0.040)"
    assert private["95 %"] == "0.033 to 0.057"  # the later of the two: 4.30 * 0.005 / sqrt(3) to either side
    assert private["worst site lost"] == "0.090"
    assert private["student, own site"] == "0.800 (0.800 0.820 0.780)"


def marks(cells: Sequence[Cell], kind: str, name: str) -> list[dict[str, float]]:
    """Attributes of the marks of class ``name``, numbers alone; those of the legend come last."""
    tree = ElementTree.fromstring(curve(cells))
    found = [one for one in tree.iter(f"{{http://www.w3.org/2000/svg}}{kind}") if one.get("class") == name]
    return [{k: float(v) for k, v in one.items() if k in {"x1", "y1", "y2", "cx", "cy"}} for one in found]


def test_the_picture_shows_each_figure_where_it_is() -> None:
    teacher = marks(study(), "circle", "teacher")[:-1]
    left, right = teacher[:3], teacher[3:]
    assert [one["cx"] for one in left] == sorted(one["cx"] for one in left)
    # Epsilon 1, 8, none: means of the sites .70, .805, .85, and the worst site's .60, .71, .80.
    means = [(0.70, left[0]), (0.805, left[1]), (0.85, left[2])]
    means += [(0.60, right[0]), (0.71, right[1]), (0.80, right[2])]
    slope = (means[2][1]["cy"] - means[0][1]["cy"]) / (0.85 - 0.70)
    for value, mark in means:
        assert mark["cy"] == pytest.approx(left[0]["cy"] + slope * (value - 0.70), abs=0.15)
    whisker = marks(study(), "line", "whisker")[0]
    assert abs(whisker["y1"] - whisker["y2"]) == pytest.approx(-slope * 2 * 4.30265 * 0.02 / 3**0.5, abs=0.3)
    levels = marks(study(), "line", "level")
    assert levels[1]["y1"] == left[2]["cy"], "dashed: the best without noise"
    assert levels[0]["y1"] > left[0]["cy"], "dotted: before any label lies below all"


def test_a_seed_alone_has_no_whisker_and_no_student_no_square() -> None:
    one = [found for found in study() if found.seed == 0]
    assert marks(one, "line", "whisker") == []
    bare = [cell(found.row, 0, *found.sites) for found in one]
    assert marks(bare, "rect", "student") == []


@pytest.mark.parametrize(
    ("rows", "said"),
    [([SHIPPED, PRIVATE], "trained"), ([BEST], "noise"), ([BEST, Row(8, patients=9)], "number of patients")],
)
def test_what_makes_no_curve_is_refused(rows: list[Row], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        curve([cell(row, 0, 0.5, 0.6) for row in rows])


def test_a_file_of_another_code_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, picture = tmp_path / "cells.json", tmp_path / "curve.svg"
    held = [asdict(one) for one in study()]
    for one in held:  # as it was written before rows could be the best
        one["row"].pop("best")
    kept.write_text(json.dumps({"code_sha256": "of last week", "cells": held}))
    with pytest.raises(UsageError, match="no cells"):
        load(tmp_path / "missing.json")
    main([str(kept), "--plot", str(picture)])
    assert capsys.readouterr().out == table(load(kept)) + "\n"
    assert picture.read_text() == curve(load(kept))
    kept.write_text(json.dumps({"cells": []}))
    with pytest.raises(SystemExit) as ended:
        main([str(kept)])
    assert ended.value.code == UsageError.exit_code
