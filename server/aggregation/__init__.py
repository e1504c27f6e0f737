"""Aggregation rules: one file a rule, one line here to register it."""

from __future__ import annotations

from difflib import get_close_matches

from common.errors import ConfigError
from common.recipe import AggregationConfig
from server.aggregation.base import AggregationRule, Share
from server.aggregation.exact_split import ExactSplit
from server.aggregation.fedit import FedIT

RULES: dict[str, type[AggregationRule]] = {
    "exact_split": ExactSplit,
    "fedit": FedIT,
}


def build_rule(config: AggregationConfig) -> AggregationRule:
    """The rule that ``config`` names, not yet started.

    Raises:
        ConfigError: if no rule has that name, or if a setting of it is out of its range.
    """
    if config.rule not in RULES:
        near = get_close_matches(config.rule, RULES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"aggregation.rule: no rule {config.rule!r}; {hint}known: {', '.join(RULES)}")
    return RULES[config.rule](config)


__all__ = ["RULES", "AggregationRule", "Share", "build_rule"]
