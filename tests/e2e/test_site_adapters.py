"""A run whose sites each train their own preset and rank: one teacher all the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import common.teacher
from client.site import Site
from common.adapter import Adapter
from common.plan import RunPlan, Stage
from common.recipe import AggregationConfig
from common.teacher import teacher_for
from server.aggregation import AggregationRule, build_rule
from tests.e2e import walks

MIXED = ["sites.east.rank=2", "sites.west.adapter=lite", "baselines=[local_teacher]"]
TRAINS = {"east": ("base", 2), "west": ("lite", 4)}


@dataclass(frozen=True)
class MixedRun:
    """``teachers``: how many networks the run built."""

    run: Path
    teachers: int


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> MixedRun:
    run = tmp_path_factory.mktemp("mixed") / "run"
    common.teacher._resident.cache_clear()
    before = common.teacher.teachers_built
    result = walks.invoke("simulate", "smoke", "--out", run, *MIXED)
    assert result.exit_code == 0, result.stderr
    return MixedRun(run, common.teacher.teachers_built - before)


def plan_of(run: Path) -> RunPlan:
    state = walks.state_of(run)
    assert state is not None
    return state.plan


def rule_of(run: Path) -> AggregationRule:
    """The rule as the run left it."""
    state = walks.state_of(run)
    assert state is not None
    rule = build_rule(AggregationConfig())
    rule.restore(state.rule_state(Stage.adapt))
    return rule


def test_every_sites_teacher_is_the_same_function(mixed: MixedRun) -> None:
    """No logit differs by more than 1e-5 of the largest, though no two sites hold the same factors."""
    plan, rule = plan_of(mixed.run), rule_of(mixed.run)
    image = torch.rand((4, 3, 64, 64), generator=torch.Generator().manual_seed(0))

    def logits(adapter: Adapter) -> Tensor:
        with teacher_for(adapter, plan).visit(adapter) as network, torch.inference_mode():
            found: Tensor = network(image).logits
        return found

    whole = Adapter.load(mixed.run / "teacher/adapter.safetensors")
    reference = logits(whole)
    start = common.teacher.initial_adapter(plan.teacher, plan.data, plan.seed)
    assert float((logits(start) - reference).abs().max()) > 1e-3, "the run changed the teacher"
    for site, (preset, rank) in TRAINS.items():
        adapter = rule.adapter_for(site)
        assert (adapter.preset, adapter.rank) == (preset, rank)
        assert adapter.folded_layers()
        assert float((logits(adapter) - reference).abs().max()) <= 1e-5 * float(reference.abs().max())


def test_a_network_is_built_once_a_variant(mixed: MixedRun) -> None:
    variants = {(one.preset, one.rank) for one in plan_of(mixed.run).variants}
    assert variants == {("base", 8), *TRAINS.values()}
    assert mixed.teachers == len(variants)


def test_each_site_sends_its_own_variant_to_the_byte(mixed: MixedRun) -> None:
    plan = plan_of(mixed.run)
    for site, (preset, rank) in TRAINS.items():
        variant = plan.variant(preset, rank)
        assert variant is not None
        sizes = [torch.Size(tensor.shape).numel() * 2 for tensor in variant.payload(0).tensors]
        sent = [line for line in walks.receipts_of(mixed.run, site) if line["name"] == "adapt.adapter"]
        assert [line["bytes"] for line in sent] == [sum(sizes)] * plan.rounds
        assert Site.open(mixed.run / "sites" / site).variant(plan) == variant


def test_a_site_adapter_of_another_preset_is_refused_in_the_report(mixed: MixedRun) -> None:
    path = mixed.run / "sites/west/baselines/local_teacher.safetensors"
    good = path.read_bytes()
    replace(Adapter.load(path), preset="base").save(path)
    result = walks.invoke("simulate", "smoke", "--out", mixed.run, "--resume", *MIXED)
    path.write_bytes(good)
    assert result.exit_code == 12
    assert "it is of preset base, this network's is lite" in result.stderr


def test_a_mixture_that_has_no_mean_exits_with_10(tmp_path: Path) -> None:
    result = walks.invoke("simulate", "smoke", "--out", tmp_path / "run", "aggregation.rule=fedit", *MIXED)
    assert result.exit_code == 10
    assert "site east" in result.stderr
    assert "site west" in result.stderr
    assert not (tmp_path / "run").exists()
