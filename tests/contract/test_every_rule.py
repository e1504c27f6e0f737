"""The registry of rules: each is tested, each takes what its name says, and a new one is little work."""

from __future__ import annotations

from importlib import import_module
from typing import ClassVar

import pytest
from torch import Tensor

import tests.contract.test_aggregation
import tests.contract.test_factor_rules
import tests.contract.test_mixed_rank_rules  # noqa: F401 - their classes are counted
from common.errors import ConfigError
from common.names import (
    AGGREGATION_RULES,
    ALTERNATING_RULES,
    FIXED_A_RULES,
    MIXED_PRESET_RULES,
    MIXED_RANK_RULES,
    PERSONAL_RULES,
    SPLIT_RULES,
)
from common.recipe import AggregationConfig
from common.tuning.presets import mix_faults
from server.aggregation import RULES, Share, build_rule
from server.aggregation.exact_split import ExactSplit
from server.aggregation.factor_mean import FactorMeanRule, Means
from server.aggregation.fedsvd import turned
from tests.contract.aggregation_rule import AggregationRuleContract
from tests.contract.dense_algebra import LAYERS, initial_adapter

# ---- a new rule: one file, one line, one subclass -------------------------------------------------


class TurnedFedIT(FactorMeanRule):
    """What server/aggregation/turned.py would hold: fedit's product, with the rows of A orthonormal."""

    name: ClassVar[str] = "turned"

    def _next_factors(self, layer: str, means: Means) -> tuple[Tensor, Tensor]:
        return turned(means.a, means.b)


class TestANewRule(AggregationRuleContract):
    rule: ClassVar[str] = "turned"
    ranks: ClassVar[dict[str, int]] = {"a": 4, "b": 4, "c": 4, "d": 4}

    @pytest.fixture(autouse=True)
    def _registered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(RULES, "turned", TurnedFedIT)


# ---- the registered ones --------------------------------------------------------------------------


def test_every_registered_rule_has_a_contract_class() -> None:
    tested = set()
    classes = [AggregationRuleContract]
    while classes:
        each = classes.pop()
        classes += each.__subclasses__()
        tested.add(each.rule)
    assert tested - {"", TurnedFedIT.name} == set(RULES)


def test_a_rules_name_is_the_one_it_is_registered_by() -> None:
    assert {name: rule.name for name, rule in RULES.items()} == {name: name for name in RULES}


def test_what_rules_take_is_said_of_rules_that_exist() -> None:
    assert set(MIXED_PRESET_RULES) <= set(MIXED_RANK_RULES) <= set(AGGREGATION_RULES)
    assert set(FIXED_A_RULES) <= set(AGGREGATION_RULES)
    assert set(ALTERNATING_RULES) <= set(AGGREGATION_RULES) - set(FIXED_A_RULES)
    assert set(PERSONAL_RULES) <= set(AGGREGATION_RULES)
    assert set(SPLIT_RULES) == {name for name, rule in RULES.items() if issubclass(rule, ExactSplit)}


EVERY = tuple(sorted(LAYERS))
MIXTURES = {
    "ranks": ({"a": ("base", 8), "b": ("base", 4)}, EVERY),
    "presets": ({"a": ("base", 8), "b": ("last3", 8)}, EVERY[:1]),
}


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("rule", AGGREGATION_RULES)
def test_a_recipe_and_the_rule_itself_refuse_the_same_mixtures(rule: str, mixture: str) -> None:
    chosen, layers = MIXTURES[mixture]
    trains_a = rule not in FIXED_A_RULES
    shares = {
        "a": Share(*chosen["a"], EVERY, trains_a),
        "b": Share(*chosen["b"], layers, trains_a),
    }
    served = rule in (MIXED_RANK_RULES if mixture == "ranks" else MIXED_PRESET_RULES)
    assert (not mix_faults(chosen["a"], chosen, rule)) == served
    if served:
        build_rule(AggregationConfig(rule)).start(initial_adapter(8), shares)
        return
    with pytest.raises(ConfigError, match=rule) as caught:
        build_rule(AggregationConfig(rule)).start(initial_adapter(8), shares)
    assert [fault.split()[1] for fault in caught.value.faults] == ["'b'"]


@pytest.mark.parametrize("rule", AGGREGATION_RULES)
def test_a_rule_says_its_equation_source_cost_and_noise(rule: str) -> None:
    """Whoever chooses between rules reads one docstring each."""
    text = import_module(RULES[rule].__module__).__doc__ or ""
    missing = [word for word in ("sum", "xact", "Floats of a layer:", "oise", "preset") if word not in text]
    assert not missing
