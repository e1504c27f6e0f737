"""Adapters that cannot work, alone or together, are told before a run."""

from __future__ import annotations

import pytest

from common.config import load_recipe
from common.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "key", "said"),
    [
        (["teacher.adapter=decoder", "teacher.decoder=frozen"], "teacher.adapter", "nothing is trained"),
        (["teacher.adapter=full", "teacher.rank=4"], "teacher.adapter", "it has no rank"),
        (["teacher.rank=0"], "teacher.rank", "0 is out of range; it must be at least 1"),
        (["teacher.decoder=part"], "teacher.decoder", "choose from full, lora, shallow, head, frozen"),
        (["sites.west.adapter=lit"], "sites[1].adapter", "there is no 'lit'; did you mean lite?"),
        (["sites.west.rank=0"], "sites[1].rank", "0 is out of range; it must be at least 1"),
        (["teacher.cached_views=4"], "teacher.adapter", "base trains the first blocks"),
        (
            ["sites.west.rank=65"],
            "aggregation.max_rank",
            "the highest rank that a site trains (65)",
        ),
        (["sites.west.adapter=norm"], "sites[1].adapter", "site west: norm and base train different tensors"),
        (["sites.west.adapter=fused"], "sites[1].adapter", "one fused layer, or three"),
        (["aggregation.rule=fedit", "sites.west.rank=2"], "sites[1].adapter", "one preset and rank for all"),
        (["aggregation.rule=fedit", "sites.west.adapter=lite"], "sites[1].adapter", "site west"),
        (["aggregation.rule=fedex", "sites.west.rank=2"], "sites[1].adapter", "one preset and rank for all"),
        (["aggregation.rule=lora_fair", "sites.west.rank=2"], "sites[1].adapter", "rule lora_fair takes one"),
        (
            ["aggregation.rule=flexlora", "sites.west.adapter=last3"],
            "sites[1].adapter",
            "ranks of one preset",
        ),
        (["aggregation.rule=hetlora", "sites.west.adapter=wide"], "sites[1].adapter", "ranks of one preset"),
        (["aggregation.rule=ffa"], "teacher.adapter", "base, which trains the factor A too; rule ffa"),
        (["aggregation.rule=fedsvd", "teacher.adapter=wide"], "teacher.adapter", "(preset dp)"),
        (
            ["aggregation.rule=ffa", "teacher.adapter=norm", "teacher.decoder=lora"],
            "teacher.adapter",
            "norm, which trains the factor A too",
        ),
        (
            ["aggregation.rule=fedsvd", "teacher.adapter=dp", "generator.scope=federated"],
            "generator.scope",
            "generator, which trains the factor A too",
        ),
        (["aggregation.rule=rolora", "sites.west.rank=2"], "sites[1].adapter", "one preset and rank for all"),
        (
            ["aggregation.rule=rolora", "teacher.adapter=dp"],
            "teacher.adapter",
            "keeps the factor A fixed; rule rolora trains it in turns (preset lite, base, wide",
        ),
        (
            ["aggregation.rule=dual", "sites.west.rank=65"],
            "aggregation.max_rank",
            "the highest rank that a site trains (65)",
        ),
    ],
)
def test_adapters_that_cannot_work_are_told_before_a_run(settings: list[str], key: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("smoke", settings)
    (line,) = caught.value.faults
    assert f": {key}: " in line
    assert said in line


@pytest.mark.parametrize(
    "settings",
    [
        ["sites.east.adapter=dp", "sites.west.adapter=wide", "sites.west.rank=3"],
        ["aggregation.rule=fedit", "sites.west.rank=8"],
        ["aggregation.rule=flora", "sites.east.adapter=dp", "sites.west.adapter=wide", "sites.west.rank=3"],
        ["aggregation.rule=flexlora", "sites.east.rank=2", "sites.west.rank=4"],
        ["aggregation.rule=hetlora", "sites.west.rank=16"],
        ["aggregation.rule=ffa", "teacher.adapter=dp"],
        ["aggregation.rule=fedsvd", "teacher.adapter=dp", "teacher.rank=8"],
        ["aggregation.rule=ffa", "teacher.adapter=norm"],
        ["aggregation.rule=rolora", "teacher.adapter=wide", "generator.scope=federated"],
        ["aggregation.rule=rolora", "teacher.adapter=norm"],
        ["aggregation.rule=dual", "sites.east.adapter=dp", "sites.west.adapter=wide", "sites.west.rank=3"],
        ["teacher.adapter=last3", "teacher.cached_views=4"],
        ["teacher.adapter=norm", "teacher.decoder=lora", "teacher.rank=4"],
    ],
)
def test_adapters_that_can_are_no_fault(settings: list[str]) -> None:
    load_recipe("smoke", settings)


def test_every_site_that_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("smoke", ["sites.east.adapter=norm", "sites.west.adapter=full"])
    assert ["east" in caught.value.faults[0], "west" in caught.value.faults[1]] == [True, True]
