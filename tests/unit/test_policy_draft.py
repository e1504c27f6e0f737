"""What a drafted policy says of the size of what leaves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from client.account import privacy_plan
from client.dp.randomness import SeededRandomness
from client.policy_draft import longest_step
from common.config import load_recipe
from common.plan import RunPlan
from server.planning import build_plan

ASKED = ["teacher.adapter=decoder", "privacy.noise_multiplier=1.5", "privacy.release_metrics=false",
         "generator.scope=none", "baselines=[]"]  # fmt: skip


@pytest.fixture(scope="module")
def plan() -> RunPlan:
    return build_plan(load_recipe("smoke", ASKED), "drafted")


@pytest.mark.parametrize("numbers", [1, 64, 20_000])
def test_a_noised_step_stays_below_the_norm_that_a_draft_allows(plan: RunPlan, numbers: int) -> None:
    terms = privacy_plan(plan.privacy, 40)
    allowed, rate, source = (
        longest_step(plan, terms, numbers),
        plan.privacy.learning_rate,
        SeededRandomness(3),
    )
    worst = 0.0
    for _ in range(300):
        step = source.normals((numbers,)).mul_(terms.noise_std)
        step[0] += terms.max_grad_norm * terms.patients  # all drawn, clipped, and all in one direction
        worst = max(worst, float(step.norm()) * rate / terms.expected_batch)
    assert worst < allowed
    assert allowed < 2 * worst, "a limit that lets anything pass is none"


def test_less_noise_or_more_patients_allow_shorter_steps(plan: RunPlan) -> None:
    many, few = (longest_step(plan, privacy_plan(plan.privacy, count), 1000) for count in (400, 40))
    assert many < few
    louder = replace(plan, privacy=replace(plan.privacy, noise_multiplier=3.0))
    assert longest_step(louder, privacy_plan(louder.privacy, 40), 1000) > few
