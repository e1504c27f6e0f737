"""The charts lie where their numbers are, and can be read without colour."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.names import BASELINES
from common.pages import STYLE, drawing
from server.report import charts, wording


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_round_and_inside(low: float, length: float) -> None:
    high = low + length
    if high <= low:
        return
    found = drawing.ticks(low, high)
    assert len(found) <= 7
    assert all(low - 1e-6 * length - 1e-9 <= tick <= high + 1e-6 * length + 1e-9 for tick in found)


@settings(deadline=None)
@example([[5e-324]])
@given(st.lists(st.lists(st.floats(0, 50), min_size=0, max_size=5), min_size=1, max_size=9))
def test_curves_stay_inside_their_frame(losses: list[list[float]]) -> None:
    series = {f"site-{number}": [(0, values), (2, values)] for number, values in enumerate(losses)}
    svg = str(charts.curves(series, "losses"))
    height = float(re.search(r'viewBox="0 0 460 (\d+)"', svg)[1])  # type: ignore[index]
    for points in re.findall(r'points="([^"]*)"', svg):
        for pair in points.split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= drawing.WIDTH
            assert 0 <= y <= height
    assert all(0 <= float(y) <= height for y in re.findall(r'<text x="[^"]*" y="([^"]*)"', svg))


@pytest.mark.parametrize("count", [1, 3, 6, 30, 200])
def test_the_names_of_rounds_do_not_overlap(count: int) -> None:
    svg = str(charts.curves({"adapter": [(index, [0.1]) for index in range(count)]}, "residual"))
    places = [float(x) for x in re.findall(r'<text x="([^"]*)"[^>]*>round \d+<', svg)]
    assert places
    assert all(after - before >= 50 for before, after in pairwise(places))


def test_dots_and_intervals_lie_at_their_values() -> None:
    svg = str(charts.dot_chart([("A", [charts.Dot("student", 0.5, [0.25, 0.75])])], (0.0, 1.0), "one dot"))
    whisker = re.search(r'<line x1="([\d.]+)" x2="([\d.]+)"[^>]*class="whisker"', svg)
    dot = re.search(r'<circle cx="([\d.]+)"', svg)
    assert whisker is not None
    assert dot is not None
    left, right, middle = float(whisker[1]), float(whisker[2]), float(dot[1])
    assert middle == pytest.approx((left + right) / 2, abs=0.1)
    scale = drawing.Scale(0.0, 1.0, 176.0, 448.0)
    assert [left, middle, right] == pytest.approx([scale.at(0.25), scale.at(0.5), scale.at(0.75)], abs=0.1)


def test_a_withheld_dot_is_said_in_words() -> None:
    assert ">withheld<" in charts.dot_chart([("A", [charts.Dot("student", None, None)])], (0.0, 1.0), "none")


def colours() -> dict[str, dict[str, str]]:
    css = STYLE.read_text()
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in blocks)
    assert light.keys() == dark.keys()
    return {"light": light, "dark": dark}


def luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG 2.2 contrast ratio."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast_in_both_schemes(scheme: str) -> None:
    palette = colours()[scheme]
    for ink in ("ink", "muted", "accent"):
        for paper in ("paper", "card", "tint", "warn-paper"):
            assert contrast(palette[ink], palette[paper]) >= 4.5, (ink, paper)
    assert contrast(palette["warn-ink"], palette["warn-paper"]) >= 4.5
    assert contrast(palette["warn-ink"], palette["card"]) >= 4.5
    for number in range(drawing.COLOURS):  # marks need 3, the names beside curves 4.5
        assert contrast(palette[f"series-{number}"], palette["card"]) >= 4.3, number


def test_every_series_differs_in_shape_and_not_in_colour_alone() -> None:
    outlines = {
        re.sub(r'cx="[^"]*"', "", drawing.marker(shape, 50.0, 50.0)) for shape in range(drawing.COLOURS)
    }
    assert len(outlines) == drawing.COLOURS == len(set(drawing.DASHES))
    # Rivals and ablations share one mark; every row is named beside it.
    assert set(charts.SLOTS) < set(wording.MODELS)
    assert set(wording.MODELS) == {*BASELINES, "student", "teacher", "personal_teacher"}
    assert len(set(charts.SLOTS.values())) == len(charts.SLOTS)
