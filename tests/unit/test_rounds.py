"""How a round ends that too few sites answered."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from common.errors import BudgetExceeded, DeadlinePassed, FederationError, PolicyRefusal, WardroundError
from common.plan import Stage
from common.recipe import Recipe
from server.collect import Collection, Errand
from server.report.schema import Rejection
from server.rounds import FinishedRound, Rounds


def finished(reasons: list[str], late: int = 0) -> FinishedRound:
    collection = Collection(
        rejected=[Rejection(f"site-{n}", why) for n, why in enumerate(reasons)], late=late
    )
    errand = cast(Errand, SimpleNamespace(stage=Stage.adapt, index=0))
    return FinishedRound(errand, collection, 0.1)


@pytest.mark.parametrize(
    ("reasons", "late", "kind", "exit_code"),
    [
        (["REFUSED_BUDGET", "REFUSED_BUDGET"], 0, BudgetExceeded, 21),
        (["REFUSED_BUDGET", "REFUSED_LOCAL"], 0, FederationError, 30),
        (["REFUSED_LOCAL", "REFUSED_LOCAL"], 0, FederationError, 30),
        (["REFUSED_CONSENT (stopped)", "PENDING (approval)"], 0, PolicyRefusal, 20),
        (["REFUSED_CONSENT (stopped)", "SITE_FAILED"], 0, FederationError, 30),
        ([], 0, FederationError, 30),
        (["DEADLINE", "DEADLINE"], 2, DeadlinePassed, 31),
    ],
)
def test_a_round_that_failed_says_why_by_its_exit_code(
    reasons: list[str], late: int, kind: type[WardroundError], exit_code: int
) -> None:
    events = SimpleNamespace(write=lambda *_, **__: None)
    rounds = Rounds(cast(Any, SimpleNamespace(events=events, live=None)), Recipe(), cast(Any, None))
    with pytest.raises(kind) as caught:
        rounds.require(finished(reasons, late), 0)
    assert caught.value.exit_code == exit_code
