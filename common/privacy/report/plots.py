"""Axes of the page's charts: their ticks stand in the document too, as every other number on the page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from common.pages.drawing import ticks

RATES = [0.001, 0.01, 0.1, 1.0]
SHARES = [0.0, 0.25, 0.5, 0.75, 1.0]
Document = dict[str, Any]


def plots_of(document: Document) -> Document:
    """Ticks by chart; a chart without data is None."""
    budget, rehearsal = document["budget"], document["rehearsal"]["figures"]
    drawn = document["guarantee"] and budget["most_used_patients"] > 0
    return {
        "stages": _axis([*_ends(budget), *_caps(document["policy"])]) if drawn else None,
        "steps": _steps(budget["by_step"]) if drawn else None,
        "classes": _axis([row["patients"] for row in budget["classes"]], whole=True) if drawn else None,
        "roc": {"x": RATES, "y": SHARES} if document["meaning"]["roc"] else None,
        "noise": _noise(rehearsal["quantiles"]) if rehearsal else None,
        "batches": _batches(rehearsal["batches"]) if rehearsal else None,
        "audits": _audited([audit for audit in document["artefacts"] if audit["bounded"]]),
    }


def _ends(budget: Document) -> list[float]:
    return [row["joint"] for row in budget["stages"] if row["joint"] is not None]


def _caps(policy: Document | None) -> list[float]:
    return [] if policy is None else [policy["max_epsilon_total"], policy["max_epsilon_per_run"]]


def _axis(values: Iterable[float], whole: bool = False) -> list[float]:
    """Ticks from 0 to at least the largest value."""
    top = max([*values, 0.0]) or 1.0
    found = ticks(0.0, top)
    step = found[1] - found[0] if len(found) > 1 else top
    while found[-1] < top:
        found.append(round(found[-1] + step, 12))
    return [tick for tick in found if tick == int(tick)] if whole else found


def _steps(by_step: Document) -> Document:
    points = [*by_step["planned"], *by_step["booked"]]
    return {
        "x": _axis([x for x, _ in points], whole=True),
        "y": _axis([y for _, y in points]),
    }


def _noise(quantiles: list[list[float]]) -> Document:
    reach = max(max(abs(found), half) for _, found, half in quantiles)
    up = ticks(0.0, reach * 1.05, 3)
    return {
        "x": [-3, -2, -1, 0, 1, 2, 3],
        "y": [*(-tick for tick in reversed(up[1:])), *up],
        "reach": round(reach * 1.05, 9),
    }


def _batches(batches: list[list[float]]) -> Document:
    sizes = [row[0] for row in batches]
    return {
        "x": [tick for tick in ticks(sizes[0], sizes[-1], 6) if tick == int(tick)],
        "y": _axis([value for row in batches for value in row[1:]]),
    }


def _audited(audits: list[Document]) -> list[float] | None:
    bounds = [v for audit in audits for key in ("lower", "ceiling", "upper") if (v := audit[key]) is not None]
    return _axis(bounds) if audits else None
