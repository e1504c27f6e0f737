"""Which of a layer's two factors a site trains in a round, and so which of them it sends up.

One answer for everyone who needs it: the site's training, the plan's lists, egress, screening and the rule.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TypeAlias

from common.names import ALTERNATING_RULES
from common.tuning.presets import sends_a


class Half(StrEnum):
    """A factor, by the end of its tensor's name (`common.adapter`)."""

    a = "lora_A"
    b = "lora_B"


Halves: TypeAlias = frozenset[Half]
BOTH: Halves = frozenset(Half)
A_ALONE: Halves = frozenset({Half.a})
B_ALONE: Halves = frozenset({Half.b})


def turns(preset: str, rule: str) -> tuple[Halves, ...]:
    """What sites of ``preset`` train in rounds 0, 1, ... under ``rule``; after the last comes the first.

    Under an alternating rule B has the first turn: it starts at zero, and as long as it is zero the gradient
    of A is zero too.
    """
    if not sends_a(preset):
        return (B_ALONE,)
    return (B_ALONE, A_ALONE) if rule in ALTERNATING_RULES else (BOTH,)


def trained_halves(preset: str, rule: str, round_index: int) -> Halves:
    """What sites of ``preset`` train in round ``round_index`` (0-based) under ``rule``."""
    chosen = turns(preset, rule)
    return chosen[round_index % len(chosen)]


def without(halves: Halves) -> tuple[str, ...]:
    """The ends of the names of the factors that are not in ``halves``."""
    return tuple(str(half) for half in Half if half not in halves)
