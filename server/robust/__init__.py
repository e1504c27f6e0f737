"""Robust estimators: one file each, one line here to register it, and how one is chosen."""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import ConfigError
from common.names import VOTING_ESTIMATORS
from common.recipe import AggregationConfig
from common.robust_rules import robust_faults, vote_fault
from common.schema_check import choose_from
from server.robust.base import BOUND, Estimate, RobustEstimator
from server.robust.multi_krum import MultiKrum
from server.robust.norm_bound import NormBound
from server.robust.voting import CoordinateMedian, TrimmedMean
from server.robust.weighted_mean import WeightedMean

ESTIMATORS: dict[str, type[RobustEstimator]] = {
    "none": WeightedMean,
    "norm_bound": NormBound,
    "median": CoordinateMedian,
    "trimmed_mean": TrimmedMean,
    "multi_krum": MultiKrum,
}
AUTO = "auto"
WEAKER = {"multi_krum": "trimmed_mean", "trimmed_mean": "norm_bound", "median": "norm_bound"}

# Where sites can vote, auto has them vote from this many on: of three or four values the middle is one or
# two sites' alone, and hospitals differ too much for that.
SITES_TO_VOTE = 5
# In larger rounds a fifth is cut at each end. Not multi_krum, which would leave f sites out of every round,
# attacked or not: where hospitals differ, always the same small or unusual one.
SHARE_CUT = 5


@dataclass(frozen=True)
class Choice:
    """``why``: in words for the event log, where it is not simply the one that was asked for."""

    estimator: RobustEstimator
    why: str = ""


def choose_estimator(config: AggregationConfig, sites: int) -> Choice:
    """What ``config`` asks for, or the next weaker one where ``sites`` are too few for it.

    Raises:
        ConfigError: if there is no such estimator, or if the rule cannot serve it.
    """
    if config.robust not in (*ESTIMATORS, AUTO):
        fix = choose_from(config.robust, (*ESTIMATORS, AUTO))
        raise ConfigError(f"aggregation.robust: there is no {config.robust!r}; {fix}")
    if faults := [f"{fault.what}; {fault.fix}" for fault in robust_faults(config)]:
        raise ConfigError("aggregation.robust does not go with the rule", faults)
    if config.robust == AUTO:
        return _automatic(config, sites)
    return _fitting(config.robust, config, sites)


def _automatic(config: AggregationConfig, sites: int) -> Choice:
    if fault := vote_fault(config.rule):
        return Choice(NormBound(config.byzantine), fault)
    if sites < SITES_TO_VOTE:
        return Choice(NormBound(config.byzantine), f"{sites} sites are too few for a vote")
    cut = max(config.byzantine, sites // SHARE_CUT)
    voting = TrimmedMean(cut)
    if voting.least_sites() > sites:
        return Choice(
            NormBound(config.byzantine), f"{sites} sites are too few to bear {config.byzantine} bad"
        )
    return Choice(voting, f"{sites} sites vote, {cut} cut at each end")


def _fitting(name: str, config: AggregationConfig, sites: int) -> Choice:
    """The first of ``name`` and those weaker that ``sites`` suffice for and that the rule serves."""
    asked, why = ESTIMATORS[name](config.byzantine), ""
    chosen = asked
    while sites < chosen.least_sites() or (chosen.name in VOTING_ESTIMATORS and vote_fault(config.rule)):
        chosen = ESTIMATORS[WEAKER[chosen.name]](config.byzantine)
        least = asked.least_sites()
        why = f"{asked.name} needs {least} sites to bear {config.byzantine} bad ones, and {sites} are there"
    return Choice(chosen, why)


__all__ = ["AUTO", "BOUND", "ESTIMATORS", "Choice", "Estimate", "RobustEstimator", "choose_estimator"]
