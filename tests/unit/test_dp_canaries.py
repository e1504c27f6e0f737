"""Attacks on the real engine: they find what it costs at most, and much more where noise is missing."""

from __future__ import annotations

import json

import pytest
from torch import Tensor

import client.dp.mechanism as mechanism
from client.dp.canaries import check_canaries, check_worst_case
from client.dp.dress_rehearsal import rehearse
from client.dp.randomness import SeededRandomness
from common.privacy.auditing import multi_run_epsilon
from common.privacy.plan import PlanSettings, PrivacyPlan

PLAN = PrivacyPlan.make(PlanSettings(40, 0.5, 5), 2.5)


def without_noise(self: mechanism.PrivateGradient, clipped_sum: Tensor) -> Tensor:
    return clipped_sum / self.terms.expected_batch


def test_canaries_find_less_than_is_claimed() -> None:
    found = check_canaries(PLAN, SeededRandomness(0), 600)
    assert found.upper == PLAN.epsilon()
    assert 0 < found.bound.lower <= found.upper
    assert found.passed


def test_canaries_find_noise_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a claim that is below their ceiling; under a larger one the noise check has to."""
    monkeypatch.setattr(mechanism.PrivateGradient, "_noised", without_noise)
    found = check_canaries(PLAN, SeededRandomness(0), 600)
    assert found.bound.ceiling > found.upper
    assert found.bound.lower > found.upper
    assert not found.passed


def test_the_worst_case_is_told_less_often_than_is_claimed() -> None:
    found = check_worst_case(PLAN, SeededRandomness(0), 60)
    assert found.trainings == 60
    assert found.lower <= found.upper
    assert found.ceiling == multi_run_epsilon(60, 60, 60, PLAN.delta)
    assert found.passed


def test_the_worst_case_shows_missing_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    strict = PrivacyPlan.make(PlanSettings(40, 0.5, 5), 6.0)
    monkeypatch.setattr(mechanism.PrivateGradient, "_noised", without_noise)
    assert not check_worst_case(strict, SeededRandomness(0), 60).passed


@pytest.mark.parametrize(
    "settings", [PlanSettings(3, 0.5, 3), PlanSettings(1, 0.5, 1), PlanSettings(9, 1.0, 2),
                 PlanSettings(300, 0.02, 4)]
)  # fmt: skip
def test_a_brief_rehearsal_passes_with_any_plans_settings(settings: PlanSettings) -> None:
    found = rehearse(PrivacyPlan.make(settings, 1.3))
    assert found.passed, found
    assert found.noise.count == 200_000
    assert (found.canaries, found.worst_case) == (None, None)
    assert (found.sampler.asked_rate, found.sampler.patients) == (settings.sample_rate, settings.patients)


def test_ten_percent_less_noise_fails_every_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mechanism.PrivateGradient._noised
    monkeypatch.setattr(mechanism.PrivateGradient, "_noised", lambda self, total: whole(self, total) * 0.9)
    found = rehearse(PLAN)
    assert not found.passed
    assert found.attempts == 3
    assert "FAILED" in found.lines()[0]


def test_a_thorough_rehearsal_is_told_whole() -> None:
    document = json.loads(json.dumps(rehearse(PLAN, SeededRandomness(4), thorough=True).to_json()))
    assert document["passed"]
    assert document["noise"]["count"] == 1_000_000
    assert len(document["noise"]["quantiles"]) == 99
    assert max(abs(found - expected) for expected, found in document["noise"]["quantiles"]) < 0.02
    assert sum(document["sampler"]["sizes"].values()) == document["sampler"]["steps"]
    assert set(document["canaries"]) == {"canaries", "guesses", "right", "lower", "ceiling", "upper"}
    assert set(document["worst_case"]) == {"trainings", "lower", "ceiling", "upper"}
    assert set(document["clip"]) == {"outlier", "many_images", "ordinary"}
