"""What a recipe may ask of its robust estimator, the faults of one that cannot be, and which one serves."""

from __future__ import annotations

import pytest

from common.config import load_recipe
from common.errors import ConfigError
from common.recipe import AggregationConfig
from server.robust import ESTIMATORS, WEAKER, choose_estimator


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["aggregation.robust=medain"], ["aggregation.robust", "did you mean median"]),
        (["aggregation.byzantine=0"], ["aggregation.byzantine", "at least 1"]),
        (
            ["aggregation.robust=median", "aggregation.rule=fedit"],
            ["aggregation.robust", "A and B", "norm_bound"],
        ),
        (["aggregation.robust=trimmed_mean", "aggregation.rule=hetlora"], ["trimmed_mean", "exact_split"]),
    ],
)
def test_a_robust_setting_that_cannot_be_is_named_with_its_fix(changes: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("demo", changes)
    (fault,) = caught.value.faults
    assert all(word in fault for word in words)


@pytest.mark.parametrize(
    "changes",
    [
        ["aggregation.robust=median"],
        ["aggregation.robust=trimmed_mean", "aggregation.rule=flora", "aggregation.byzantine=2"],
        ["aggregation.robust=median", "aggregation.rule=ffa", "teacher.adapter=dp"],
        ["aggregation.robust=multi_krum", "aggregation.rule=fedit"],
        ["aggregation.robust=norm_bound", "aggregation.rule=hetlora"],
        ["aggregation.robust=auto", "aggregation.rule=fedex"],
    ],
)
def test_what_goes_together_is_taken(changes: list[str]) -> None:
    assert load_recipe("demo", changes).aggregation.robust in changes[0]


def test_by_default_nothing_is_robust() -> None:
    assert (load_recipe("demo").aggregation.robust, load_recipe("demo").aggregation.byzantine) == ("none", 1)


@pytest.mark.parametrize(
    ("robust", "rule", "sites", "byzantine", "chosen"),
    [
        ("multi_krum", "exact_split", 5, 1, "multi_krum"),
        ("multi_krum", "exact_split", 4, 1, "trimmed_mean"),
        ("multi_krum", "exact_split", 2, 1, "norm_bound"),
        ("multi_krum", "fedit", 4, 1, "norm_bound"),
        ("multi_krum", "exact_split", 6, 2, "trimmed_mean"),
        ("trimmed_mean", "exact_split", 3, 1, "trimmed_mean"),
        ("trimmed_mean", "exact_split", 4, 2, "norm_bound"),
        ("median", "flora", 2, 1, "norm_bound"),
        ("norm_bound", "hetlora", 1, 1, "norm_bound"),
        ("none", "exact_split", 2, 5, "none"),
    ],
)
def test_too_few_sites_take_the_next_weaker(
    robust: str, rule: str, sites: int, byzantine: int, chosen: str
) -> None:
    choice = choose_estimator(AggregationConfig(rule=rule, robust=robust, byzantine=byzantine), sites)
    assert choice.estimator.name == chosen
    assert bool(choice.why) == (chosen != robust)
    assert choice.estimator.least_sites() <= sites


@pytest.mark.parametrize(
    ("sites", "rule", "byzantine", "chosen", "cut"),
    [
        (1, "exact_split", 1, "norm_bound", None), (2, "exact_split", 1, "norm_bound", None),
        (4, "exact_split", 1, "norm_bound", None), (5, "exact_split", 1, "trimmed_mean", 1),
        (8, "exact_split", 1, "trimmed_mean", 1), (9, "exact_split", 1, "trimmed_mean", 1),
        (20, "exact_split", 1, "trimmed_mean", 4), (20, "ffa", 6, "trimmed_mean", 6),
        (5, "exact_split", 3, "norm_bound", None), (20, "fedit", 1, "norm_bound", None),
    ],
)  # fmt: skip
def test_auto_goes_by_the_number_of_sites(
    sites: int, rule: str, byzantine: int, chosen: str, cut: int | None
) -> None:
    choice = choose_estimator(AggregationConfig(rule=rule, robust="auto", byzantine=byzantine), sites)
    assert choice.estimator.name == chosen
    assert choice.why
    if cut is not None:
        assert choice.estimator.byzantine == cut


def test_an_unknown_estimator_is_named() -> None:
    with pytest.raises(ConfigError, match=r"did you mean .*median"):
        choose_estimator(AggregationConfig(robust="medan"), 5)


def test_the_weaker_ones_end_at_one_that_any_site_can_have() -> None:
    assert set(WEAKER) | {"none", "norm_bound"} == set(ESTIMATORS)
    assert ESTIMATORS["norm_bound"](1).least_sites() == 1
