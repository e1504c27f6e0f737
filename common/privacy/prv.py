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
for history, delta in json.load(sys.stdin):
    accountant = PRVAccountant()
    accountant.history = [tuple(entry) for entry in history]
    print(json.dumps(accountant.get_epsilon(delta)))
"""


def prv_epsilon(events: Iterable[Event], delta: float) -> tuple[float | None, str]:
    """(epsilon, ""), or (None, the reason why there is none)."""
    found, reason = prv_epsilons([(events, delta)])
    return (found[0] if found else None), reason


def prv_epsilons(
    asked: Iterable[tuple[Iterable[Event], float]], timeout_s: float = TIMEOUT_S
) -> tuple[list[float], str]:
    """Of several (events, delta), by one process: (an epsilon each, ""), or (none, the reason)."""
    settings = [(gathered(events), delta) for events, delta in asked]
    every = [event for releases, _ in settings for event in releases]
    if any(e.mechanism is not Mechanism.gaussian or e.group_size > 1 or not e.noised for e in every):
        return [], "Opacus accounts for Gaussian releases of single records only"
    if importlib.util.find_spec("opacus") is None:
        return [], "Opacus is not installed"
    written = json.dumps([([event.triple() for event in releases], delta) for releases, delta in settings])
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=written, capture_output=True, text=True, timeout=timeout_s, check=True,
        )  # fmt: skip
        return [float(json.loads(line)) for line in answer.stdout.splitlines()], ""
    except (subprocess.SubprocessError, ValueError, OSError) as error:
        return [], f"Opacus gave no answer ({type(error).__name__})"
