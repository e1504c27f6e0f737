"""Items 27 to 29 and 31: what audits may say, and that they catch a model that remembers its patients.

Item 27 is asked against jax_privacy. It is held here against a second evaluation of the paper's formula, in
50 digits and by sums of whole numbers, because jax_privacy brings a whole framework along.
"""

from __future__ import annotations

import math
import random
import tempfile
from decimal import Decimal, localcontext
from pathlib import Path

import numpy as np

from common.privacy.accounting import epsilon
from common.privacy.auditing import multi_run_epsilon, one_run, one_run_epsilon
from common.privacy.events import Event
from common.privacy.membership import Assignment, Claim, Verdict, claim_of, judged
from simulations.privacy_exam.planted import Cohort, private_adapter, remembering_adapter
from simulations.privacy_exam.verdict import Verdict as Outcome

DIGITS = 50
CLAIMED = 1.0  # epsilon, of the planted adapter
PATIENTS = 60


def item_27(count: int, seed: int = 0) -> Outcome:
    """Against `reference_epsilon`, and against the closed form where every guess is right and delta is 0."""
    rng, worst, positive = random.Random(seed), 0.0, 0
    for _ in range(count):
        guesses = rng.randint(2, 200)
        counts = (rng.randint(guesses, 2000), guesses, rng.randint(guesses // 2, guesses))
        delta, alpha = 10.0 ** -rng.uniform(3, 8), rng.choice((0.05, 0.01, 0.05 / 3))
        ours = one_run_epsilon(counts, delta, alpha)
        worst = max(worst, abs(ours - reference_epsilon(counts, delta, alpha)))
        chance = alpha ** (1 / guesses)
        closed = max(0.0, math.log(chance / (1 - chance)))
        worst = max(worst, abs(one_run_epsilon((guesses,) * 3, 0.0, alpha) - closed))
        positive += ours > 0
    figure = f"largest difference {worst:.0e}; {positive} bounds above 0"
    passed = worst <= 1e-4 and positive > count / 3
    return Outcome("27", f"one-run bound against the formula in {DIGITS} digits, {count} settings", figure,
                   "1e-4", passed)  # fmt: skip


def reference_epsilon(counts: tuple[int, int, int], delta: float, alpha: float) -> float:
    """The largest epsilon that is rejected, to 1e-7: Steinke et al. 2023, theorem 5.2, by halving."""
    with localcontext() as context:
        context.prec = DIGITS
        if _reference_p_value(Decimal(0), counts, delta) >= Decimal(alpha):
            return 0.0
        low, high = Decimal(0), Decimal(64)
        while high - low > Decimal("1e-7"):
            middle = (low + high) / 2
            rejected = _reference_p_value(middle, counts, delta) < Decimal(alpha)
            low, high = (middle, high) if rejected else (low, middle)
        return float(low)


def _reference_p_value(value: Decimal, counts: tuple[int, int, int], delta: float) -> Decimal:
    """Numbers of outcomes times their weights e^(epsilon k), over (1 + e^epsilon)^r."""
    canaries, guesses, right = counts
    odds = value.exp()
    weights = [Decimal(math.comb(guesses, hits)) * odds**hits for hits in range(guesses + 1)]
    whole = (1 + odds) ** guesses
    reached = sum(weights[right:], Decimal(0)) / whole
    gain, added = Decimal(0), Decimal(0)
    for fewer in range(1, right + 1):
        added += weights[right - fewer] / whole
        gain = max(gain, added / fewer)
    return reached + 2 * canaries * Decimal(delta) * gain


def item_28(trials: int, seed: int = 0) -> Outcome:
    """How often a bound stays below the true epsilon: one-run and many-run on the exact Gaussian mechanism.

    Also on randomised response, where the one-run bound is tight, so that a bound that is too high shows.
    """
    rng, delta = np.random.default_rng(seed), 1e-5
    covered = {"one-run": 0, "many-run": 0, "randomised response": 0}
    for _ in range(trials):
        sigma = float(np.exp(rng.uniform(np.log(0.3), np.log(4.0))))
        truth = epsilon([Event(round(sigma, 1), 1.0, 1)], delta, interval=1e-3)
        coins = rng.random(200) < 0.5
        seen = coins + rng.normal(0, round(sigma, 1), len(coins))
        covered["one-run"] += one_run(seen.tolist(), coins.tolist(), delta).lower <= truth
        hits, spared = (int((rng.normal(0, round(sigma, 1), 200) > -0.5).sum()) for _ in range(2))
        covered["many-run"] += multi_run_epsilon(hits, spared, 200, delta) <= truth
        flat = float(rng.uniform(0.5, 3.0))
        right = int(rng.binomial(100, 1 / (1 + math.exp(-flat))))
        covered["randomised response"] += one_run_epsilon((100, 100, right), 0.0) <= flat
    least = 0.95 - 2 * math.sqrt(0.05 * 0.95 / trials)
    figure = ", ".join(f"{name} {count / trials:.3f}" for name, count in covered.items())
    passed = min(covered.values()) / trials >= least
    return Outcome("28", f"bounds below the truth, {trials} trials", figure, f"{least:.3f}", passed)


def item_29(count: int, seed: int = 0) -> Outcome:
    """Adapters that remember their patients, claimed at epsilon 1; and as many made with noise, at their own.

    Each pair has patients of its own, of whom coins leave out about half.
    """
    caught, areas, least, above = 0, [], math.inf, 0
    for number in range(count):
        with tempfile.TemporaryDirectory() as name:
            cohort = Cohort.draw(Path(name), PATIENTS, seed + number)
            planted = cohort.audited(remembering_adapter(cohort), Claim(CLAIMED))
            adapter, spent = private_adapter(cohort)
            honest = cohort.audited(adapter, claim_of(spent, 1e-5))
        caught += planted.verdict is Verdict.inconsistent
        areas.append(planted.auc.value)
        least = min(least, planted.bound.lower)
        above += honest.verdict is not Verdict.consistent
    figure = (
        f"{caught} of {count} INCONSISTENT (bound {least:.2f} or more of {planted.bound.ceiling:.2f}, AUC "
        f"{min(areas):.2f} or more); with noise {above} above epsilon {honest.claim.upper:.2f}"
    )
    limit = f"{math.ceil(0.9 * count)} of {count}; 0"
    passed = caught >= 0.9 * count and above == 0 and planted.bound.ceiling > CLAIMED
    return Outcome(
        "29", f"planted adapters claimed at {CLAIMED:g}, {PATIENTS} patients", figure, limit, passed
    )


def item_31(count: int, seed: int = 0) -> Outcome:
    """The ceiling stands in every finding, and no rate that the number of patients cannot resolve."""
    rng, right = np.random.default_rng(seed), 0
    for _ in range(count):
        coins = rng.permutation([True, False, *(rng.random(int(rng.integers(0, 250))) < 0.5)]).tolist()
        scores = [(float(score), 0.0) for score in rng.normal(coins, 1.0)]
        assignment = rng.choice(list(Assignment))
        found = judged(("made up", "0" * 64), scores, coins, assignment, Claim(2.0))
        document, text = found.to_json(), "\n".join(found.lines())
        resolved = {0.01: found.others >= 100, 0.1: found.others >= 10}
        said = all(
            (rate["value"] is not None) is rate["measurable"] is resolved[rate["fpr"]]
            for rate in document["tpr"]
        )
        ceiling = document["ceiling"] >= document["lower"] and "could not have reported more than" in text
        right += said and ceiling and text.count("not measurable") == sum(not ok for ok in resolved.values())
    return Outcome("31", "ceilings, and rates below resolution", f"{right} of {count} right", "all",
                   right == count)  # fmt: skip
