"""The officer's page: a document in, one HTML text out. No clock, no network, no script."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from common.pages import STYLE, wording
from common.pages.templates import template_environment
from common.privacy.report import charts

HERE = Path(__file__).parent
PRINTED_PAYLOADS = 60  # a longer full list stays folded on paper; its groups are printed
Document = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    name: str
    caption: str
    svg: Markup


_CHARTS: dict[str, tuple[str, Callable[[Document], Markup]]] = {
    "stages": ("Joint epsilon, stage upon stage, against the caps", charts.stage_bar),
    "steps": ("Epsilon by noised step: planned and booked", charts.step_lines),
    "classes": ("Patients by epsilon spent, over all projects", charts.class_bars),
    "roc": ("What an attacker can reach at most", charts.roc_curve),
    "noise": ("Noise: quantiles found minus expected", charts.noise_quantiles),
    "batches": ("Batch sizes against independent draws", charts.batch_sizes),
    "audits": ("Audits: found, could find, claimed", charts.audit_bars),
}


def render(document: Document) -> str:
    """The whole page, ending in a newline. Equal documents give equal texts."""
    drawn = {
        name: Chart(name, caption, draw(document))
        for name, (caption, draw) in _CHARTS.items()
        if document["plots"][name] is not None
    }
    style = "\n".join(path.read_text(encoding="utf-8") for path in (STYLE, HERE / "page.css"))
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            doc=document,
            charts=drawn,
            style=Markup(style),  # our own files, nothing of the document
            registry=json.dumps(document["registry"], indent=1, ensure_ascii=False),
            facts=json.dumps(document["verification"]["facts"], indent=1, ensure_ascii=False),
            listed_on_paper=document["egress"]["payloads"] <= PRINTED_PAYLOADS,
        )
    )


@cache
def _environment() -> Environment:
    environment = template_environment(HERE)
    names = ("count", "exact", "digest", "when", "listed")
    environment.filters.update({name: getattr(wording, name) for name in names})
    return environment
