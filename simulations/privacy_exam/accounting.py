"""Items 1 to 9: epsilon against other accountants, composition, groups, sampling, tuning, the attacker."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import dp_accounting
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from common.errors import ConfigError
from common.privacy.accounting import (
    RDP_ORDERS,
    Neighbouring,
    epsilon,
    image_level,
    quick_epsilon,
    rdp_epsilon,
    tuned_epsilon,
)
from common.privacy.attacker import curve_rates, gaussian_rate, true_positive_rates
from common.privacy.events import Event, Mechanism
from common.privacy.mixtures import mixture_pld
from common.privacy.plan import PlanSettings, PrivacyPlan, Sampling, Unit
from common.privacy.prv import prv_epsilons
from common.privacy.sampling import detected_sampling
from simulations.privacy_exam.verdict import Verdict

EXAMPLE = Event(1.0, 0.08, 130)  # N=100, batches of 8, ten epochs


def random_settings(count: int, seed: int = 0) -> list[tuple[Event, float]]:
    """(event, delta) spread over what sites use, and beyond."""
    rng = random.Random(seed)
    return [
        (
            Event(
                round(math.exp(rng.uniform(math.log(0.7), math.log(6))), 3),
                round(math.exp(rng.uniform(math.log(0.005), math.log(0.4))), 4),
                rng.randint(5, 600),
            ),
            10.0 ** -rng.uniform(3, 7),
        )
        for _ in range(count)
    ]


def reference(events: list[Event], delta: float, interval: float = 1e-4) -> float:
    """dp-accounting's own accountant on its own events, composed one after the other."""
    accountant = PLDAccountant(value_discretization_interval=interval)
    for event in events:
        accountant.compose(event.dp_event())
    return float(accountant.get_epsilon(delta))


def item_1(count: int) -> Verdict:
    """Ours, in one piece and cut in two, and the ledger's quick bound, against the library's accountant."""
    worst, below, quick_worst = 0.0, 0, 0.0
    for event, delta in random_settings(count):
        known = reference([event], delta)
        first = event.count // 2
        parts = [replace(event, count=first), replace(event, count=event.count - first)]
        ours, quick = epsilon(parts, delta), quick_epsilon([event], delta)
        worst = max(worst, abs(ours / known - 1))
        quick_worst = max(quick_worst, (quick - ours) / max(ours, 0.2))
        below += (ours < known * (1 - 1e-9)) + (quick < ours * (1 - 1e-9))
    figure = f"largest difference {worst:.1e}, quick bound at most {quick_worst:.1e} above; {below} below"
    passed = worst <= 0.01 and quick_worst <= 5e-3 and not below
    return Verdict(
        "1", f"epsilon against dp-accounting's PLD, {count} settings", figure, "1 %, never below", passed
    )


def item_2(count: int) -> Verdict:
    distance, lower = 0.0, 0
    settings = random_settings(count, seed=1)
    others, reason = prv_epsilons([([event], delta) for event, delta in settings], timeout_s=3600)
    if reason:
        return Verdict("2", "PRV and RDP", reason, "an answer", False)
    for (event, delta), other in zip(settings, others, strict=True):
        ours = epsilon([event], delta)
        distance = max(distance, abs(other - ours) / max(0.015 * ours, 0.011))
        rdp = rdp_epsilon([event], delta)
        lower += rdp is None or rdp < ours
    figure = f"{distance:.2f} of the allowed distance; RDP below PLD in {lower} of {count}"
    limit = "max(1.5 %, 0.011); 0"
    return Verdict(
        "2", f"Opacus PRV, and RDP above PLD, {count} settings", figure, limit, distance <= 1 and not lower
    )


def item_3() -> Verdict:
    stages = [
        Event(1.5, 0.08, 130),
        Event(1.5, 0.08, 60),
        Event(2.0, 0.1, 100),
        Event(10.0, 1.0, 1, Mechanism.laplace),
    ]
    known, ours = reference(stages, 1e-3), epsilon(stages, 1e-3)
    turned = max(abs(epsilon(stages[shift:] + stages[:shift], 1e-3) / ours - 1) for shift in range(1, 4))
    added = sum(epsilon([stage], 1e-3) for stage in stages)
    figure = (
        f"{abs(ours / known - 1):.1e}; permuted {turned:.1e} (joint {ours:.3f}, sum of epsilons {added:.3f})"
    )
    passed = abs(ours / known - 1) <= 1e-3 and turned <= 1e-6 and ours < added
    return Verdict("3", "joint epsilon of four stages", figure, "1e-3; 1e-6", passed)


def item_5(largest: int, interval: float) -> Verdict:
    """Our own mixture against the library's, which is slow on a fine grid; alone, against its Gaussian."""
    worst = 0.0
    for size in (1, *range(2, largest + 1)):
        group = image_level(replace(EXAMPLE, noise_multiplier=4.0, count=20), size)
        known = reference([group], 1e-3, interval)
        ours = mixture_pld(4.0, group.sample_rate, size, interval).self_compose(group.count)
        worst = max(worst, abs(ours.get_epsilon_for_delta(1e-3) / known - 1))
        worst = max(worst, abs(epsilon([group], 1e-3, interval=interval) / known - 1))
    try:
        PrivacyPlan.make(PlanSettings(100, 0.08, 130, max_images_per_patient=5, unit=Unit.image), 1.0)
        refused = False
    except ConfigError:
        refused = True
    figure = f"{worst:.1e}; image-level plan {'refused' if refused else 'ACCEPTED'}"
    return Verdict(
        "5", f"groups of 1 to {largest} records", figure, "1 %; refused", worst <= 0.01 and refused
    )


def item_6() -> Verdict:
    rng = random.Random(3)
    drawn = [sum(rng.random() < 0.08 for _ in range(100)) for _ in range(130)]
    epochs = [size for _ in range(10) for size in (*[8] * 12, 4)]
    found = detected_sampling(epochs, 100, 0.08), detected_sampling(drawn, 100, 0.08)
    settings = PlanSettings(100, 0.08, 130, delta=1e-3, sampling=found[0])
    charged = PrivacyPlan.make(settings, 1.0).epsilon()
    figure = (
        f"found {found[0]} and {found[1]}; epsilon {charged:.2f} instead of {epsilon([EXAMPLE], 1e-3):.2f}"
    )
    passed = found == (Sampling.shuffled, Sampling.poisson) and charged >= 14.0
    return Verdict("6", "shuffled loader detected and charged, N=100", figure, "at least 14.0", passed)


def item_7() -> Verdict:
    deltas = (1e-3, 1e-4, 1e-5)
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_ONE)
    accountant.compose(EXAMPLE.dp_event())
    ours = [epsilon([EXAMPLE], delta, Neighbouring.replace_one) for delta in deltas]
    worst = max(abs(mine - accountant.get_epsilon(delta)) for mine, delta in zip(ours, deltas, strict=True))
    refused = 0
    for delta in (0.01, 0.02, 0.5):
        try:
            PrivacyPlan.make(PlanSettings(100, 0.08, 130, delta=delta), 1.0)
        except ConfigError:
            refused += 1
    values = ", ".join(f"{value:.2f}" for value in ours)
    figure = f"{values} at 1e-3, 1e-4, 1e-5, off by {worst:.0e}; {refused} of 3 refused"
    return Verdict(
        "7", "replace-one at three deltas; delta >= 1/N", figure, "exact; 3", worst <= 1e-9 and refused == 3
    )


def item_8() -> Verdict:
    tuned, worst, values = Event(1.5, 0.08, 130), 0.0, []
    for mean in (5.0, 10.0):
        accountant = RdpAccountant(RDP_ORDERS)
        accountant.compose(dp_accounting.dp_event.RepeatAndSelectDpEvent(tuned.dp_event(), mean, 1.0))
        ours, known = tuned_epsilon([tuned], mean, 1e-3), float(accountant.get_epsilon(1e-3))
        worst = max(worst, abs(ours / known - 1))
        values.append(ours)
    once, all_seen = rdp_epsilon([tuned], 1e-3), rdp_epsilon([replace(tuned, count=1300)], 1e-3)
    figure = (
        f"{worst:.0e} (one {once:.2f}, mean 5 {values[0]:.2f}, 10 {values[1]:.2f}, ten seen {all_seen:.2f})"
    )
    return Verdict("8", "best of a random number of trainings", figure, "1 %", worst <= 0.01)


def item_9() -> Verdict:
    """The general curve, on Gaussians for which the exact one is known."""
    rates = (1e-4, 1e-3, 0.01, 0.05, 0.1, 0.3, 0.5, 0.9)
    above = below = 0.0
    for sigma in (0.3, 0.5, 1.0, 2.0, 5.0, 10.0):
        general = curve_rates([Event(sigma, 1.0, 1)], rates)
        exact = true_positive_rates([Event(sigma, 1.0, 1)], rates)
        closed = [gaussian_rate(1 / sigma, rate) for rate in rates]
        above = max(above, *(mine - known for mine, known in zip(general, closed, strict=True)))
        below = max(below, *(known - mine for mine, known in zip(general, closed, strict=True)))
        above = max(above, *(abs(mine - known) for mine, known in zip(exact, closed, strict=True)))
    figure = f"at most {above:.1e} above, {max(below, 0.0):.0e} below"
    return Verdict(
        "9",
        "attacker's curve on Gaussians, closed form",
        figure,
        "1e-3, never below",
        above <= 1e-3 and below <= 1e-10,
    )
