"""What a privacy officer asks before a run: how much noise, what it costs, who is helped by a change.

Every alternative that people ask about is computed beside the plan: replace-one, shuffled batches, images
instead of patients. The bands are a convention (NIST SP 800-226 has none in law), and said as such.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from common.errors import ConfigError
from common.plan import Stage
from common.privacy.accounting import (
    COARSE_INTERVAL,
    Neighbouring,
    check_delta,
    epsilon,
    image_level,
    quick_epsilon,
    rdp_epsilon,
    shuffled,
)
from common.privacy.attacker import FALSE_POSITIVE_RATES, true_positive_rates
from common.privacy.events import Event
from common.privacy.plan import PlanSettings, PrivacyPlan, calibrate, one_release
from common.privacy.prv import prv_epsilon

BANDS = (
    (1.0, "strong"),
    (3.0, "good"),
    (8.0, "moderate: an audit is required"),
    (10.0, "weak: wants a written reason"),
)
BEYOND = "not a meaningful bound on membership; reconstruction argument only"
NOISE_TABLE = (0.6, 0.8, 1.0, 1.5, 2.0, 3.0)
ROUNDS_TABLE = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the rounds asked for
# Patients a site, of three sites, below which DP kept less than 70 % of the gain, on phantoms only.
ENOUGH_PATIENTS = ((8.0, 400), (3.0, 800), (1.0, 1600))
MOST_LOCAL_STEPS = 2  # in a round: on phantoms more of them cost more Dice than the noise did
MAX_TABLE_EPSILON = 100.0


@dataclass(frozen=True)
class Question:
    """A run as it is asked about. ``cap``: most that a patient may have spent after it, history included.

    ``style_epsilon``: of a style summary that leaves with noise once a run, by itself; None: none does.
    """

    patients: int
    batch: int
    rounds: int
    steps_per_round: int
    delta: float = 1e-5
    cap: float = 8.0
    history: tuple[Event, ...] = ()
    images_per_patient: int = 5
    style_epsilon: float | None = None

    def settings(self) -> PlanSettings:
        return PlanSettings(
            self.patients,
            self.batch / self.patients,
            self.rounds * self.steps_per_round,
            self.delta,
            max_images_per_patient=self.images_per_patient,
        )

    @cached_property
    def beside(self) -> tuple[Event, ...]:
        """What else the run releases of the patients who train. Raises ``ConfigError``."""
        if self.style_epsilon is None:
            return ()
        return (one_release(str(Stage.style), self.style_epsilon, self.settings()).event(),)

    @property
    def before(self) -> tuple[Event, ...]:
        """All that is spent beside the noised steps."""
        return (*self.history, *self.beside)

    def faults(self) -> list[str]:
        checks = [
            (self.patients >= 1, "--patients: at least 1"),
            (1 <= self.batch <= max(1, self.patients), "--batch: from 1 to the number of patients"),
            (self.rounds >= 1, "--rounds: at least 1"),
            (self.steps_per_round >= 1, "--epochs or --steps: at least 1"),
        ]
        return [text for holds, text in checks if not holds]


def steps_of(patients: int, batch: int, epochs: int) -> int:
    """Steps of ``epochs`` passes over the patients."""
    return epochs * math.ceil(patients / max(1, batch))


def settle(question: Question, noise_multiplier: float | None, target_epsilon: float | None) -> PrivacyPlan:
    """The plan asked about, from its noise or from the epsilon of the run itself.

    Raises ``ConfigError`` with every fault.
    """
    faults = question.faults()
    if faults:
        raise ConfigError("this is no run that can be planned", faults)
    check_delta(question.delta, question.patients)
    if noise_multiplier is not None:
        return PrivacyPlan.make(question.settings(), noise_multiplier)
    if target_epsilon is None:
        raise ConfigError("give --noise-multiplier or --epsilon")
    return calibrate(question.settings(), target_epsilon, question.beside)


def plan_document(question: Question, plan: PrivacyPlan, with_prv: bool = True) -> dict[str, Any]:
    """The plan with everything beside it, as the contract names it. None: no guarantee, or not known.

    Every figure but ``epsilon_total_after``, which has the history too, is of the whole run.
    """
    run, delta, images = [plan.event(), *question.beside], plan.delta, plan.max_images_per_patient
    by_image = [image_level(event, images) for event in run]
    total = epsilon([*run, *question.history], delta)
    rates = true_positive_rates(run)
    styles = [{"epsilon": question.style_epsilon, "noise_multiplier": e.noise_multiplier} for e in run[1:]]
    return {
        "noise_multiplier": plan.noise_multiplier,
        "sample_rate": plan.sample_rate,
        "steps": plan.steps,
        "delta": delta,
        "epsilon": {
            "pld": _shown(epsilon(run, delta)),
            "prv": _shown(prv_epsilon(run, delta)[0] if with_prv else None),
            "rdp": _shown(rdp_epsilon(run, delta)),
        },
        "epsilon_replace_one": _shown(epsilon(run, delta, Neighbouring.replace_one)),
        "epsilon_if_shuffled": _shown(epsilon(map(shuffled, run), delta)),
        "epsilon_if_image_level": _shown(epsilon(by_image, delta, interval=COARSE_INTERVAL)),
        "attacker": {
            f"{rate:g}": round(found, 6) for rate, found in zip(FALSE_POSITIVE_RATES, rates, strict=True)
        },
        "noise_per_coordinate": round(plan.noise_per_coordinate, 6),
        "epsilon_total_after": _shown(total),
        "cheapest_change": cheapest_change(question, plan, total),
        "verdict": verdict(question, total),
        **({"style": styles[0]} if styles else {}),
    }


def verdict(question: Question, total: float) -> str:
    """OK, OVER (the cap is passed), or INFEASIBLE (the history alone passes it)."""
    if total <= question.cap:
        return "OK"
    spent = epsilon(question.history, question.delta) if question.history else 0.0
    return "INFEASIBLE" if spent >= question.cap else "OVER"


def band(epsilon_value: float) -> str:
    """How such an epsilon is commonly called."""
    return next((name for limit, name in BANDS if epsilon_value <= limit), BEYOND)


def cheapest_change(question: Question, plan: PrivacyPlan, total: float) -> str:
    """The smaller factor, on the noise or on the rounds, that reaches the cap or the next better band."""
    history = list(question.before)
    goal = question.cap if total > question.cap else next((b for b, _ in reversed(BANDS) if b < total), None)
    if goal is None:
        return "none needed"
    try:
        noisier = calibrate(plan.settings, goal, history)
    except ConfigError:
        return f"none: earlier releases about these patients leave nothing below {goal:g}"
    rounds = _most_rounds(question, plan, goal)
    more_noise = noisier.noise_multiplier / plan.noise_multiplier
    if rounds == 0 or more_noise <= question.rounds / rounds:
        after = noisier.epsilon(history)
        return f"sigma {plan.noise_multiplier:g}->{noisier.noise_multiplier:g}: {total:.1f} -> {after:.1f}"
    after = quick_epsilon([plan.event(rounds * question.steps_per_round), *history], plan.delta)
    return f"R {question.rounds}->{rounds}: {total:.1f} -> {after:.1f}"


def noise_table(question: Question) -> list[list[Any]]:
    """Rows of (sigma, rounds, epsilon of the run, total after, attacker at 1 %, noise / clip, verdict)."""
    found = []
    rounds = sorted({max(1, round(question.rounds * share)) for share in ROUNDS_TABLE})
    for sigma in NOISE_TABLE:
        for count in rounds:
            event = Event(sigma, question.batch / question.patients, count * question.steps_per_round)
            rdp = rdp_epsilon([event], question.delta)
            if rdp is not None and rdp > MAX_TABLE_EPSILON:
                found.append([sigma, count, math.inf, math.inf, 1.0, sigma / question.batch, "OVER"])
                continue
            run = quick_epsilon([event, *question.beside], question.delta)
            total = quick_epsilon([event, *question.before], question.delta)
            rate = true_positive_rates([event, *question.beside], (0.01,))[0]
            outcome = verdict(question, total)
            found.append([sigma, count, run, total, rate, sigma / question.batch, outcome])
    return found


def warnings(question: Question, plan: PrivacyPlan) -> list[str]:
    """What the officer should know before the run, in sentences."""
    found = []
    needed = next(
        (patients for limit, patients in reversed(ENOUGH_PATIENTS) if plan.epsilon(question.beside) <= limit),
        None,
    )
    if needed is not None and plan.patients < needed:
        found.append(
            f"On phantoms, runs of this epsilon with fewer than {needed} patients a site (of three) kept "
            "less than 70 % of what training without noise gains. For real images it is unknown: rehearse."
        )
    if question.steps_per_round > MOST_LOCAL_STEPS:
        found.append(
            f"{question.steps_per_round} noised steps a round: on phantoms more than {MOST_LOCAL_STEPS} "
            "local steps cost more Dice than the noise did. Epsilon counts steps, not rounds: take one step "
            "a round (--steps 1) and as many more rounds; wardround's own private runs do."
        )
    if question.delta > 0.1 / question.patients:
        found.append(f"delta is above a tenth of 1 / patients: {0.1 / question.patients:.0e} is customary.")
    return found


def _most_rounds(question: Question, plan: PrivacyPlan, goal: float) -> int:
    """Most whole rounds whose total stays at ``goal``; 0 if not even one does."""
    low, high = 0, question.rounds
    while high - low > 1:
        middle = (low + high) // 2
        event = plan.event(middle * question.steps_per_round)
        spent = quick_epsilon([event, *question.before], plan.delta)
        low, high = (middle, high) if spent <= goal else (low, middle)
    return low


def _shown(value: float | None) -> float | None:
    return None if value is None or math.isinf(value) else round(value, 6)
