"""Epsilon of released events: one composition over everything, by dp-accounting.

The figure is that of privacy loss distributions (PLD), rounded pessimistically, so it is an upper bound.
Renyi accounting (RDP) is the bracket above it. The Gaussian-DP accountant is a limit, not a bound, and is
not used. Epsilons of stages are never added: their events are composed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from enum import StrEnum
from functools import lru_cache
from typing import Any

from common.errors import ConfigError
from common.privacy.events import Event, Mechanism, gathered
from common.privacy.mixtures import mixture_pld

INTERVAL = 1e-4  # of the privacy loss grid, for every figure that is printed
COARSE_INTERVAL = 1e-3  # for searches and for the ledger's gate: still an upper bound, ten times as fast
QUICK_INTERVAL = 2e-4
COARSE_FROM = 1.0  # below this epsilon the coarse grid overstates by more than 0.1 %
COARSE_COUNT = 2000  # and above this many releases

# Where dp-accounting's series converges. Leaving an order out can only raise the bound.
RDP_ORDERS = (2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0, 4.5, 5.0, 5.5, 6.0,
              *map(float, range(7, 64)), 72.0, 96.0, 128.0, 256.0, 512.0)  # fmt: skip


class Neighbouring(StrEnum):
    """What two data sets that must look alike differ by."""

    add_remove = "add_remove"
    replace_one = "replace_one"


def epsilon(
    events: Iterable[Event],
    delta: float,
    neighbouring: Neighbouring = Neighbouring.add_remove,
    interval: float = INTERVAL,
) -> float:
    """Upper bound on epsilon of all ``events`` together; infinite if one of them has no noise.

    Guarantees: never below the true epsilon; equal for the same events in any order or division.

    Raises:
        ConfigError: if ``delta`` is not between 0 and 1, or replacing is asked of events it is not known for.
    """
    check_delta(delta)
    releases = gathered(events)
    if not all(event.noised for event in releases):
        return math.inf
    return _epsilon(releases, delta, neighbouring, interval)


def quick_epsilon(events: Iterable[Event], delta: float) -> float:
    """An upper bound at most 0.5 % or 0.001 above `epsilon`, at a tenth of the time."""
    releases = gathered(events)
    if sum(event.count for event in releases) <= COARSE_COUNT:
        coarse = epsilon(releases, delta, interval=COARSE_INTERVAL)
        if coarse >= COARSE_FROM:
            return coarse
    return epsilon(releases, delta, interval=QUICK_INTERVAL)


def deltas_of(events: Iterable[Event], epsilons: Sequence[float], interval: float = INTERVAL) -> list[float]:
    """delta(epsilon), the whole curve, for ascending ``epsilons``."""
    releases = gathered(events)
    if not all(event.noised for event in releases):
        return [1.0] * len(epsilons)
    curve = _composed(releases, Neighbouring.add_remove, interval).get_delta_for_epsilon(list(epsilons))
    return [float(value) for value in curve]


def rdp_epsilon(events: Iterable[Event], delta: float) -> float | None:
    """Epsilon by Renyi accounting (Mironov 2017), or None where it is not known for these events.

    It is never below `epsilon`'s true value; in practice 10 to 25 % above.
    """
    from dp_accounting.rdp import RdpAccountant

    check_delta(delta)
    accountant = RdpAccountant(RDP_ORDERS)
    joint = _joint(gathered(events))
    if not accountant.supports(joint):
        return None
    accountant.compose(joint)
    return float(accountant.get_epsilon(delta))


def tuned_epsilon(
    tuned: Iterable[Event], mean_trials: float, delta: float, others: Iterable[Event] = (), shape: float = 1.0
) -> float:
    """Epsilon of releasing only the best of a random number of trainings, composed with ``others``; RDP.

    The number is drawn from a truncated negative binomial (``shape`` 1: geometric), Papernot and Steinke
    2022 (arXiv 2110.03620). Trials whose outcomes are all seen simply compose: put them in ``others``.

    Raises:
        ConfigError: if an event is of a kind that this is not known for.
    """
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    check_delta(delta)
    selected = dp_accounting.dp_event.RepeatAndSelectDpEvent(_joint(gathered(tuned)), mean_trials, shape)
    accountant = RdpAccountant(RDP_ORDERS)
    joint = dp_accounting.ComposedDpEvent([selected, _joint(gathered(others))])
    if not accountant.supports(joint):
        raise ConfigError("tuning is accounted for Gaussian and Laplace releases of single records only")
    accountant.compose(joint)
    return float(accountant.get_epsilon(delta))


def shuffled(event: Event) -> Event:
    """What ``event`` costs if batches come from shuffled epochs instead of independent draws.

    No amplification is claimed for shuffling (Chua et al. 2024): each patient is in one batch of every epoch
    of ceil(1 / sample_rate) steps, and that batch is charged as if everybody knew so.
    """
    per_epoch = math.ceil(round(1 / event.sample_rate, 9))
    return Event(event.noise_multiplier, 1.0, math.ceil(event.count / per_epoch), group_size=event.group_size)


def image_level(event: Event, images_per_patient: int) -> Event:
    """What ``event`` costs a patient if every image is drawn and clipped for itself."""
    return event.of_group(images_per_patient)


def check_delta(delta: float, patients: int | None = None) -> None:
    """Raises ``ConfigError`` unless 0 < delta < 1, and below 1 / patients where the number is known."""
    if not 0 < delta < 1:
        raise ConfigError(f"delta {delta} must be above 0 and below 1, for instance 1e-5")
    if patients is not None and delta * patients >= 1:
        raise ConfigError(
            f"delta {delta:g} is not below 1 / patients = {1 / patients:g}: it would allow to publish one "
            f"patient outright. Use {1e-5 if patients < 1e5 else 0.1 / patients:g}"
        )


@lru_cache(maxsize=1024)
def _epsilon(events: tuple[Event, ...], delta: float, neighbouring: Neighbouring, interval: float) -> float:
    """Of `gathered` events: a ledger asks for the same figure at each of its entries."""
    return float(_composed(events, neighbouring, interval).get_epsilon_for_delta(delta))


@lru_cache(maxsize=64)
def _composed(events: tuple[Event, ...], neighbouring: Neighbouring, interval: float) -> Any:
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    replacing = neighbouring is Neighbouring.replace_one
    relation = NeighboringRelation.REPLACE_ONE if replacing else NeighboringRelation.ADD_OR_REMOVE_ONE
    total = privacy_loss_distribution.identity(value_discretization_interval=interval)
    for event in events:
        total = total.compose(_distribution(event, relation, interval))
    return total


def _distribution(event: Event, relation: Any, interval: float) -> Any:
    """The privacy loss distribution of all releases of ``event``.

    The figure's grid is dp-accounting's own; on other grids, and for groups, `mixtures` makes the same.
    """
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    sigma, group = event.noise_multiplier, event.group_size
    single_record = event.mechanism is Mechanism.gaussian and group == 1
    if relation is NeighboringRelation.REPLACE_ONE and not single_record:
        raise ConfigError("replace_one is known for Gaussian releases of single records only")
    if event.mechanism is Mechanism.laplace:
        single = privacy_loss_distribution.from_laplace_mechanism(
            sigma / group, value_discretization_interval=interval
        )
        return single.self_compose(event.count)
    quick = interval != INTERVAL and relation is NeighboringRelation.ADD_OR_REMOVE_ONE
    if event.sample_rate < 1 and (group > 1 or quick):
        return mixture_pld(sigma, event.sample_rate, group, interval).self_compose(event.count)
    repeats = event.count
    if event.sample_rate == 1:  # Gaussians of everybody: n of them are one with sigma / sqrt(n)
        sigma, repeats = sigma / math.sqrt(repeats), 1
    single = privacy_loss_distribution.from_gaussian_mechanism(
        sigma / group,
        value_discretization_interval=interval,
        sampling_prob=event.sample_rate,
        neighboring_relation=relation,
    )
    return single.self_compose(repeats)


def _joint(events: tuple[Event, ...]) -> Any:
    import dp_accounting

    return dp_accounting.ComposedDpEvent([event.dp_event() for event in events])
