"""Numbers, times and lists as every page of ours writes them. Nothing here computes a result."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal

from markupsafe import Markup, escape

THIN = "\u202f"  # narrow no-break space, between groups of digits and before a unit


def count(value: int) -> str:
    return f"{value:,}".replace(",", THIN)


def size(value: float) -> str:
    """Bytes in decimal units, three figures."""
    amount, units = float(value), ["B", "kB", "MB", "GB", "TB"]
    while amount >= 999.5 and len(units) > 1:
        amount /= 1000
        units.pop(0)
    decimals = 0 if units[0] == "B" else max(0, 2 - int(math.log10(max(amount, 1))))
    return f"{amount:.{decimals}f}{THIN}{units[0]}"


def small(value: float) -> str:
    """Two figures, for residuals, noise multipliers and the like: 0.021, 3e-7."""
    return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")


def exact(value: float) -> str:
    """As many digits as the number has, up to nine: settings that must not be rounded away."""
    return f"{value:.9g}".replace("e-0", "e-").replace("e+0", "e")


def epsilon(value: float) -> str:
    """Three decimals, rounded up: a page never states less than was spent."""
    return str(Decimal(repr(float(value))).quantize(Decimal("0.001"), rounding=ROUND_CEILING))


def digest(value: str) -> Markup:
    """The first twelve characters, the whole on hover."""
    if not value:
        return Markup("<span class='muted'>not recorded</span>")
    return Markup("<code class='digest' title='{}'>{}</code>").format(value, value[:12])


def when(value: str) -> str:
    """ISO 8601 as ``20 Nov 2026, 09:30 UTC``; any other text as it stands."""
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        return value
    if moment.tzinfo is None:
        return value
    return f"{moment.astimezone(UTC):%d %b %Y, %H:%M} UTC".lstrip("0")


def listed(items: list[str] | list[Markup]) -> Markup:
    """``a, b and c``, escaped."""
    texts = [escape(item) for item in items]
    if len(texts) < 2:
        return Markup("").join(texts)
    return Markup(", ").join(texts[:-1]) + Markup(" and ") + texts[-1]


def plural(number: int, noun: str) -> str:
    return f"{count(number)} {noun}" + ("" if number == 1 else "s")
