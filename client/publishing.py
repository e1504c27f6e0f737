"""Metrics that leave a private run: the teacher's mean Dice on this site's test patients, with Laplace noise.

Only the teacher's. A student is trained on this site's patients without noise, so one of them can change its
Dice on every test patient: no noise that leaves a number readable would cover that.

The noise is added to whole numbers: each patient's Dice is rounded to `TICKS` steps and the noise too, so a
sum's low bits give nobody away (Mironov 2012), and what leaves is the Laplace mechanism's answer, rounded.
What this does not give: of an ideal Laplace draw, that of 53-bit uniforms lacks the far tail, which is worth
a delta below 1e-11.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import numpy as np

from client.dp.randomness import Randomness
from common.canonical import canonical_json
from common.durable import write_atomic
from common.guard_api import Metric, SiteMetrics
from common.metrics import FloatArray
from common.plan import RunPlan, rebuild
from common.privacy.published import PublishedMetrics
from common.style import StyleSummary

_T = TypeVar("_T")

TEACHER = "teacher"
TICKS = 4096  # steps of a patient's Dice between 0 and 1
KEPT = "published.json"  # in the site's folder: what has left, and leaves again word for word
KEPT_STYLE = "published-style.json"
LOST = "measured and paid for once, and lost before it left"


def noised_dice(
    dice: Mapping[str, FloatArray], published: PublishedMetrics, source: Randomness
) -> list[Metric]:
    """The mean of each class of ``dice`` (class -> one value a patient), with noise.

    Guarantees: one patient more or less moves a sum by at most `TICKS`, whatever the values are; how many
    patients there are decides nothing else; a mean is in [0, 1].
    """
    noise = source.laplaces(len(dice)) / published.epsilon_each
    return [
        _cell(name, _mean(column, float(draw), published), published)
        for (name, column), draw in zip(dice.items(), noise, strict=True)
    ]


def _mean(column: FloatArray, noise: float, published: PublishedMetrics) -> float:
    ticks = np.rint(np.clip(np.nan_to_num(column), 0.0, 1.0) * TICKS).astype(np.int64)
    total = int(ticks.sum()) + round(noise * TICKS)
    return min(1.0, max(0.0, total / (TICKS * published.patients)))


def _cell(name: str, value: float | None, published: PublishedMetrics, reason: str = "") -> Metric:
    scale = None if value is None else published.noise_scale
    return Metric(TEACHER, "dice", name, value, None, published.patients, reason, scale)


def lost_metrics(site: str, plan: RunPlan, published: PublishedMetrics) -> SiteMetrics:
    """The answer of a site whose numbers a crash took: it says no number, and costs nothing."""
    cells = [_cell(item.name, None, published, LOST) for item in plan.data.classes]
    return SiteMetrics(site, None, cells)


def keep(folder: Path, plan: RunPlan, metrics: SiteMetrics) -> None:
    """Write ``metrics`` down before they leave, so that an order that comes twice has one answer."""
    _keep(folder / KEPT, plan, metrics)


def kept_metrics(folder: Path, plan: RunPlan) -> SiteMetrics | None:
    """What `keep` wrote for this very plan; None: nothing."""
    return _kept(folder / KEPT, plan, SiteMetrics)


def keep_style(folder: Path, plan: RunPlan, style: StyleSummary) -> None:
    """The same for the site's noised style."""
    _keep(folder / KEPT_STYLE, plan, style)


def kept_style(folder: Path, plan: RunPlan) -> StyleSummary | None:
    """What `keep_style` wrote for this very plan; None: nothing."""
    return _kept(folder / KEPT_STYLE, plan, StyleSummary)


def _keep(path: Path, plan: RunPlan, published: SiteMetrics | StyleSummary) -> None:
    write_atomic(path, canonical_json({"plan_sha256": plan.digest, "kept": asdict(published)}).encode())


def _kept(path: Path, plan: RunPlan, kind: type[_T]) -> _T | None:
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    if found["plan_sha256"] != plan.digest:
        return None
    kept: _T = rebuild(kind, found["kept"])
    return kept
