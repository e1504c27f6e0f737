"""A wait with an owner: the site's own clock for one order."""

from __future__ import annotations

import time
from collections.abc import Callable

from common.errors import DeadlinePassed


class Deadline:
    """Raises ``DeadlinePassed`` from ``check`` once ``seconds`` have passed; training checks each step."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock, self._start = seconds, clock, clock()

    def check(self, doing: str) -> None:
        if self._clock() - self._start > self._seconds:
            raise DeadlinePassed(f"the site's {self._seconds:.0f} s for this order passed while {doing}")
