"""Aggregation rules: one file a rule, one line here to register it."""

from __future__ import annotations

from difflib import get_close_matches

from common.errors import ConfigError
from common.recipe import AggregationConfig
from server.aggregation.base import AggregationRule
from server.aggregation.dual import Dual
from server.aggregation.exact_split import ExactSplit
from server.aggregation.fedex import FedEx
from server.aggregation.fedit import FedIT
from server.aggregation.fedsvd import FedSVD
from server.aggregation.ffa import FFA
from server.aggregation.flexlora import FlexLora
from server.aggregation.flora import Flora
from server.aggregation.hetlora import HetLora
from server.aggregation.lora_fair import LoraFair
from server.aggregation.momentum import Momentum
from server.aggregation.rolora import RoLora
from server.aggregation.shares import Share

RULES: dict[str, type[AggregationRule]] = {
    "exact_split": ExactSplit,
    "fedit": FedIT,
    "ffa": FFA,
    "fedsvd": FedSVD,
    "fedex": FedEx,
    "lora_fair": LoraFair,
    "flora": Flora,
    "flexlora": FlexLora,
    "hetlora": HetLora,
    "rolora": RoLora,
    "dual": Dual,
}


def build_rule(config: AggregationConfig, momentum: float = 0.0) -> AggregationRule:
    """The rule that ``config`` names, not yet started.

    Args:
        momentum: of the mean step of dense tensors, and of B under `ffa`; at least 0 and below 1.

    Raises:
        ConfigError: if no rule has that name, or if a setting of it is out of its range.
    """
    if config.rule not in RULES:
        near = get_close_matches(config.rule.lower(), RULES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"aggregation.rule: no rule {config.rule!r}; {hint}known: {', '.join(RULES)}")
    rule = RULES[config.rule](config)
    rule.momentum = Momentum(momentum)
    return rule


__all__ = ["RULES", "AggregationRule", "Share", "build_rule"]
