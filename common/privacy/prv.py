"""A second opinion on epsilon from another implementation: the PRV accountant of Opacus.

Opacus loads torch, so it answers from a process of its own, and only where it is installed. Nothing is
decided by its figure: it carries an error of 0.01 in epsilon (Gopi et al. 2021, arXiv 2106.02848).
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterable

from common.privacy.events import Event, Mechanism, gathered

TIMEOUT_S = 120.0
_CHILD = """
import json, sys, warnings
warnings.simplefilter("ignore")
from opacus.accountants import PRVAccountant
asked = json.load(sys.stdin)
accountant = PRVAccountant()
accountant.history = [tuple(entry) for entry in asked["history"]]
print(json.dumps(accountant.get_epsilon(asked["delta"])))
"""


def prv_epsilon(events: Iterable[Event], delta: float) -> tuple[float | None, str]:
    """(epsilon, ""), or (None, the reason why there is none)."""
    releases = gathered(events)
    if any(e.mechanism is not Mechanism.gaussian or e.group_size > 1 or not e.noised for e in releases):
        return None, "Opacus accounts for Gaussian releases of single records only"
    if importlib.util.find_spec("opacus") is None:
        return None, "Opacus is not installed"
    asked = json.dumps({"history": [event.triple() for event in releases], "delta": delta})
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=asked, capture_output=True, text=True, timeout=TIMEOUT_S, check=True,
        )  # fmt: skip
        return float(json.loads(answer.stdout)), ""
    except (subprocess.SubprocessError, ValueError, OSError) as error:
        return None, f"Opacus gave no answer ({type(error).__name__})"
