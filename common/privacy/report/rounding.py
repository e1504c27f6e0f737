"""Numbers of the page, rounded once and towards caution: bounds up, never down."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Decimal
from typing import Any

from common.pages.wording import exact


def upper(value: float, decimals: int = 3) -> float | None:
    """``value`` rounded up; None, which is NO GUARANTEE, if it is infinite."""
    if math.isinf(value):
        return None
    step = Decimal(1).scaleb(-decimals)
    return float(Decimal(repr(float(value))).quantize(step, rounding=ROUND_CEILING))


def upper_rate(value: float) -> float:
    """A share that an attacker may reach at most, rounded up to a hundredth of a percent."""
    return min(1.0, upper(value, 4) or 0.0)


def per_hundred(rate: float) -> float:
    """``rate``, which has four decimals at most, of a hundred patients."""
    return round(100 * rate, 2)


def spelled(value: Any) -> Any:
    """Plain values whose floats `common.pages.wording.exact` writes without loss: nine figures."""
    if isinstance(value, dict):
        return {str(key): spelled(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [spelled(entry) for entry in value]
    if isinstance(value, float):
        return float(exact(value))
    return value
