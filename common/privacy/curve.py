"""The attacker's curve as one SVG picture: what the run allows, what (epsilon, delta) would, guessing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from common.privacy.accounting import epsilon
from common.privacy.attacker import crude_rate, true_positive_rates
from common.privacy.events import Event
from common.privacy.plan import PrivacyPlan

RATES = tuple(10 ** (-3 + 3 * index / 60) for index in range(61))  # false-positive rates, 0.001 to 1
_WIDTH, _HEIGHT, _LEFT, _TOP, _SIDE = 560, 420, 62, 46, 340
_Line = tuple[str, str, str, Sequence[float]]


def curve_svg(plan: PrivacyPlan, beside: Sequence[Event] = ()) -> str:
    """A whole SVG document; equal plans give equal text. False positives on a logarithmic axis.

    Args:
        beside: what else the run releases of these patients.
    """
    run, delta = [plan.event(), *beside], plan.delta
    figure = epsilon(run, delta)
    lines: list[_Line] = [
        ("this run", "#1b6ca8", "none", true_positive_rates(run, RATES)),
        ("(epsilon, delta) alone", "#a85a1b", "7 3", [crude_rate(figure, delta, rate) for rate in RATES]),
        ("guessing", "#666666", "2 3", RATES),
    ]
    title = (
        f"epsilon {figure:.2f} at delta {delta:g}, one patient added or removed, sigma "
        f"{plan.noise_multiplier:g}, {plan.steps} steps"
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
            f'font-family="sans-serif" font-size="12" aria-label="{title}">',
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
            _text(_LEFT, 20, "Most that any attacker can achieve", "14"),
            _text(_LEFT, 37, title, "11"),
            *_axes(),
            *(_curve(*line, place) for place, line in enumerate(lines)),
            "</svg>\n",
        ]
    )


def _across(rate: float) -> float:
    return _LEFT + _SIDE * (math.log10(rate) + 3) / 3


def _up(rate: float) -> float:
    return _TOP + _SIDE * (1 - rate)


def _axes() -> list[str]:
    marks = []
    for rate in (0.001, 0.01, 0.1, 1.0):
        marks.append(_rule(_across(rate), _up(0), _across(rate), _up(1)))
        marks.append(_text(_across(rate) - 12, _up(0) + 16, f"{rate:g}"))
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        marks.append(_rule(_across(0.001), _up(share), _across(1.0), _up(share)))
        marks.append(_text(_LEFT - 34, _up(share) + 4, f"{share:g}"))
    marks.append(_text(_LEFT, _up(0) + 32, "patients wrongly named (share of those who did not take part)"))
    marks.append(
        f'<text x="14" y="{_up(0):.1f}" transform="rotate(-90 14 {_up(0):.1f})">patients found (share)</text>'
    )
    return marks


def _curve(name: str, colour: str, dashes: str, values: Sequence[float], place: int) -> str:
    points = " ".join(f"{_across(x):.1f},{_up(y):.1f}" for x, y in zip(RATES, values, strict=True))
    y, x = _TOP + 14 + 18 * place, _LEFT + _SIDE + 8
    return (
        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2" '
        f'stroke-dasharray="{dashes}"/>\n<line x1="{x}" x2="{x + 18}" y1="{y - 4}" y2="{y - 4}" '
        f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"/>\n' + _text(x + 22, y, name)
    )


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#dddddd"/>'


def _text(x: float, y: float, text: str, size: str = "12") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}">{text}</text>'
