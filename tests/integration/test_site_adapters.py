"""Sites that say their own adapter and rank, over the real apps; only the guard is a fake."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.consortium import (
    SITES,
    Consortium,
    answered,
    fake_models,
    recipe,
    rejected,
)

__all__ = ["fake_models"]  # a fixture of every test here


def test_a_site_that_trains_what_the_plan_does_not_list_takes_no_part(tmp_path: Path) -> None:
    outcome = Consortium(tmp_path, recipe(), {"b": {"propose:0": "another rank"}}).go()
    assert outcome.sites == ["a", "c"]
    assert set(rejected(outcome, "propose").values()) == {"an adapter that the plan does not list"}
    assert {(one.preset, one.rank) for one in outcome.adapters.values()} == {("base", 2)}


def test_a_site_that_says_another_rank_at_a_resume_is_turned_away(tmp_path: Path) -> None:
    settings = recipe()
    first, *others = settings.sites
    settings = replace(settings, sites=[replace(first, rank=3), *others])  # so that the plan lists both
    consortium = Consortium(
        tmp_path, settings, {"b": {"adapt:1": "interrupt"}, "a": {"propose:0": "another rank"}}
    )
    with pytest.raises(KeyboardInterrupt):
        consortium.go()
    consortium.behave("b", {"propose:0": "another rank"})
    outcome = consortium.go()
    assert answered(outcome, "adapt", 0) == list(SITES)
    assert answered(outcome, "adapt", 1) == ["a", "c"]
    assert [(one.preset, one.rank) for _, one in sorted(outcome.adapters.items())] == [
        ("base", 3), ("base", 2), ("base", 2),
    ]  # fmt: skip
    refusals = [event for event in consortium.events() if event["event"] == "refused"]
    assert [event["reason"] for event in refusals] == [
        "another adapter or rank than it agreed to when the run began"
    ]
