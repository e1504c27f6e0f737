"""Attacks on this build's own mechanism with the best view that anybody can have, on made-up patients.

A canary's gradient is as long as the clip lets it be and points where no other does, and the attacker sees
every noised gradient. What is found is a lower bound on what the build really costs. These tests do not find
all that `client.dp.rehearsal.check_noise` finds: noise that is missing altogether shows as a bound of a few
units, which a claim of more does not contradict.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from client.dp.mechanism import Execution, PrivateGradient
from client.dp.randomness import Randomness
from client.dp.rehearsal import MadeUpTask, RehearsalTerms
from common.privacy.auditing import ALPHA, OneRun, multi_run_epsilon, one_run
from common.privacy.plan import PrivacyPlan

CANARY_SHARES = (1.0, 0.5, 0.2, 0.1, 0.05)  # of the canaries, guessed on: the noise hides most of them
PHYSICAL_BATCH = 64
STEPS_A_WORLD = 10_000  # of all trainings with the one canary together, and as many without
FEWEST, MOST = 16, 256  # trainings of one kind


@dataclass(frozen=True)
class CanaryCheck:
    """``bound``: what the guesses on the canaries of one training say; ``upper``: the plan's epsilon."""

    bound: OneRun
    upper: float

    @property
    def passed(self) -> bool:
        return self.bound.lower <= self.upper


def check_canaries(plan: PrivacyPlan, source: Randomness, canaries: int) -> CanaryCheck:
    """One training of all steps of ``plan`` with canaries in directions of their own, each in by a fair coin.

    Steinke et al. 2023, in the white-box variant with orthogonal gradients. A canary's score is the
    likelihood ratio of its coordinate in every step.
    """
    inside = source.uniforms(canaries) < 0.5
    table = torch.eye(canaries)[torch.from_numpy(inside)] * plan.max_grad_norm
    task = MadeUpTask(table, [[row] for row in range(len(table))], scale=1.0)
    execution = Execution(max(PHYSICAL_BATCH, plan.max_images_per_patient))
    mechanism = PrivateGradient(task, task.trained, plan, source, execution)
    scores = np.zeros(canaries)
    for index in range(plan.steps):
        scores += _evidence(mechanism.step(index)["weight"].flatten(), plan)
    bound = one_run(scores.tolist(), inside.tolist(), plan.delta, ALPHA, CANARY_SHARES)
    return CanaryCheck(bound, plan.epsilon())


@dataclass(frozen=True)
class WorstCase:
    """What whole trainings with and without one canary say.

    Attributes:
        trainings: of each kind.
        lower: bound on epsilon, at 95 % confidence; ``ceiling``: had every training been told right.
        upper: the plan's epsilon.
    """

    trainings: int
    lower: float
    ceiling: float
    upper: float

    @property
    def passed(self) -> bool:
        return self.lower <= self.upper


def check_worst_case(plan: PrivacyPlan, source: Randomness, trainings: int | None = None) -> WorstCase:
    """Train a model of one weight again and again, with a canary and with nobody, and tell which was which.

    Args:
        trainings: of each kind; None: as many as `STEPS_A_WORLD` lets there be.
    """
    count = trainings or max(FEWEST, min(MOST, STEPS_A_WORLD // plan.steps))
    found = sum(score > 0 for score in _trainings(plan, source, count, present=True))
    cleared = sum(score <= 0 for score in _trainings(plan, source, count, present=False))
    lower = multi_run_epsilon(found, cleared, count, plan.delta)
    return WorstCase(count, lower, multi_run_epsilon(count, count, count, plan.delta), plan.epsilon())


def _trainings(plan: PrivacyPlan, source: Randomness, count: int, present: bool) -> list[float]:
    """The evidence for the canary after each training. Weights decide nothing here: the loss is linear."""
    terms = RehearsalTerms(
        noise_std=plan.noise_std,
        max_grad_norm=plan.max_grad_norm,
        steps=count * plan.steps,
        sample_rate=plan.sample_rate,
        max_images_per_patient=plan.max_images_per_patient,
        expected_batch=plan.expected_batch,
    )
    task = MadeUpTask(torch.full((1, 1), plan.max_grad_norm), [[0]] if present else [], scale=1.0)
    execution = Execution(max(1, plan.max_images_per_patient))
    mechanism = PrivateGradient(task, task.trained, terms, source, execution)
    seen = torch.cat([mechanism.step(index)["weight"].flatten() for index in range(terms.steps)])
    totals: list[float] = _evidence(seen, plan).reshape(count, plan.steps).sum(1).tolist()
    return totals


def _evidence(noised: torch.Tensor, plan: PrivacyPlan) -> np.ndarray:
    """log(1 - q + q exp((2 z - 1) / (2 sigma^2))): how much likelier z is with the canary than without.

    Args:
        noised: mean gradients, each along a canary's direction; z is the sum in clips.
    """
    clips = noised.double().numpy() * (plan.expected_batch / plan.max_grad_norm)
    shifted = (2 * clips - 1) / (2 * plan.noise_multiplier**2)
    if plan.sample_rate == 1:
        return np.asarray(shifted)
    return np.asarray(np.logaddexp(np.log1p(-plan.sample_rate), np.log(plan.sample_rate) + shifted))
