"""Which robust estimators an aggregation rule can serve."""

from __future__ import annotations

from collections.abc import Iterator

from common.names import CHANGE_VOTE_RULES, FACTOR_VOTE_RULES, VOTING_ESTIMATORS
from common.recipe import AggregationConfig
from common.schema_check import Fault

VOTE_RULES = (*CHANGE_VOTE_RULES, *FACTOR_VOTE_RULES)


def vote_fault(rule: str) -> str:
    """Why sites cannot vote on what ``rule`` averages; empty: they can."""
    if rule in VOTE_RULES:
        return ""
    return (
        f"rule {rule} averages the factors A and B, and a vote on each apart is no vote on their product; "
        f"rules to vote with: {', '.join(VOTE_RULES)}"
    )


def robust_faults(aggregation: AggregationConfig) -> Iterator[Fault]:
    """An estimator that votes on each coordinate, with a rule that has nothing to vote on."""
    if aggregation.robust in VOTING_ESTIMATORS and (what := vote_fault(aggregation.rule)):
        fix = "take one of those rules, or norm_bound, multi_krum or auto"
        yield Fault("aggregation.robust", f"{aggregation.robust}: {what}", fix)
