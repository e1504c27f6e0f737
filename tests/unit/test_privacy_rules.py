"""A recipe that asks for privacy either runs with it or is refused, by its key and with a fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config import load_recipe
from common.errors import ConfigError
from common.plan import Stage
from common.privacy_rules import declared_patients
from common.recipe import SiteConfig
from server.planning import build_plan

PRIVATE = ["teacher.adapter=decoder", "privacy.noise_multiplier=1", "privacy.steps=4"]
HONEST = [*PRIVATE, "privacy.release_metrics=false", "generator.scope=none"]

# Overrides beside `PRIVATE`; the key that the fault names; its fix.
NOT_COVERED = [
    (["teacher.adapter=base"], "teacher.adapter", "take teacher.adapter=decoder, or dp"),
    (["sites.west.adapter=norm"], "sites[1].adapter", "take teacher.adapter=decoder, or dp"),
    (["teacher.decoder=lora"], "teacher.decoder", "take full, shallow or head"),
    (["teacher.adapter=dp"], "aggregation.rule", "take ffa"),
    (["teacher.adapter=dp", "aggregation.rule=fedsvd"], "aggregation.rule", "take ffa"),
    (["teacher.adapter=dp", "aggregation.rule=ffa", "teacher.rank=17"], "teacher.rank", "take 16 at most"),
    (["teacher.cached_views=8"], "teacher.cached_views", "leave it 0"),
    (["aggregation.rule=dual"], "aggregation.rule", "take exact_split"),
    (["generator.scope=federated"], "generator.scope", "take none"),
    (
        ["privacy.release_metrics=false"],
        "generator.scope",
        "set privacy.style_epsilon, or leave privacy.release_metrics true",
    ),
    (["privacy.release_metrics=false", "generator.scope=local"], "generator.scope", "take none"),
    (["privacy.epsilon=3"], "privacy", "give one of them"),
    (["privacy.delta=0.5"], "privacy.delta", "such as 1e-5"),
    (["baselines=[local_teacher]"], "baselines[0]", "leave it out"),
    (["privacy.momentum=1"], "privacy.momentum", "out of range"),
    (["privacy.sample_rate=0"], "privacy.sample_rate", "out of range"),
    (["privacy.epsilon=0", "privacy.noise_multiplier=null"], "privacy.epsilon", "it must be above 0"),
]


@pytest.mark.parametrize(("overrides", "key", "fix"), NOT_COVERED, ids=lambda part: str(part)[:60])
def test_what_the_noise_does_not_cover_is_a_fault_with_its_fix(
    overrides: list[str], key: str, fix: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("smoke", [*PRIVATE, *overrides])
    assert any(f"{key}: " in fault and fix in fault for fault in caught.value.faults), caught.value.faults


def test_a_site_without_phantoms_must_declare_its_patients() -> None:
    real = ["sites.west.phantom=null", "sites.west.manifest=list.csv"]
    with pytest.raises(ConfigError, match=r"sites\[1\]\.patients"):
        load_recipe("smoke", [*PRIVATE, *real])


def test_the_sites_of_a_cohort_declare_their_labelled_images(tmp_path: Path) -> None:
    (tmp_path / "DSB2018_96").mkdir()
    (tmp_path / "DSB2018_96" / "index.csv").touch()
    recipe = load_recipe("nuclei-dp", [f"data.root={tmp_path}"])
    assert declared_patients(SiteConfig("site-1"), recipe.cohort) == 130
    with pytest.raises(ConfigError, match="130 patients of a site of the cohort"):
        load_recipe("nuclei-dp", [f"data.root={tmp_path}", "privacy.delta=0.01"])


@pytest.mark.parametrize("adapter", ["decoder", "dp"])
def test_a_private_plan_has_one_round_a_step(adapter: str) -> None:
    chosen = [f"teacher.adapter={adapter}", "aggregation.rule=ffa"]
    plan = build_plan(load_recipe("smoke", [*PRIVATE, *chosen]), "run")
    assert plan.rounds == 4
    assert plan.sites == ["east", "west"]
    assert Stage.evaluate in plan.stages


def test_where_no_metric_may_leave_the_sites_are_not_asked_for_any() -> None:
    plan = build_plan(load_recipe("smoke", HONEST), "run")
    assert plan.stages == [Stage.propose, Stage.adapt, Stage.student]
    assert plan.payload(Stage.evaluate) is None


def test_without_noise_the_rounds_are_the_recipes() -> None:
    assert build_plan(load_recipe("smoke"), "run").rounds == load_recipe("smoke").run.rounds
