"""The guard: its site's word beats the server's, and nothing leaves without a receipt."""

from __future__ import annotations

import builtins
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import client.site as site_module
from client.egress import EgressRefusal
from client.guard import Guard
from client.site import Site
from common.adapter import AdapterUpdate
from common.config import save_site
from common.errors import ArtefactError, ConfigError, DataError, PolicyRefusal
from common.plan import Round, RunPlan, Stage
from common.recipe import Recipe, SiteFile
from common.teacher import initial_adapter
from server.planning import build_plan
from simulations.phantoms import write_site


@pytest.fixture
def home(tmp_path: Path, smoke_recipe: Recipe) -> Path:
    phantom = smoke_recipe.sites[0].phantom
    assert phantom is not None
    write_site(phantom, tmp_path / "east" / "data", 0, "east")
    save_site(SiteFile("east", policy=smoke_recipe.policy), tmp_path / "east" / "site.yaml")
    return tmp_path / "east"


def guard_of(home: Path, **policy: object) -> Guard:
    site = Site.open(home)
    return Guard(replace(site, policy=replace(site.policy, **policy)))  # type: ignore[arg-type]


def order(plan: RunPlan, stage: Stage) -> Round:
    return Round(plan.digest, stage, 0, 60.0, "nonce")


def receipts(home: Path) -> list[dict[str, object]]:
    path = home / "receipts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_site_agrees_and_its_answer_is_on_a_receipt(home: Path, smoke_plan: RunPlan) -> None:
    answer = guard_of(home).propose(smoke_plan, order(smoke_plan, Stage.propose))
    assert (answer.site, answer.agrees, answer.plan_sha256) == ("east", True, smoke_plan.digest)
    assert (answer.preset, answer.rank) == ("base", 8)
    assert [line["name"] for line in receipts(home)] == ["answer"]


def test_what_the_coordinator_says_of_the_last_answer_is_kept_for_the_sites_people(
    home: Path, smoke_plan: RunPlan
) -> None:
    guard = guard_of(home)
    guard.propose(smoke_plan, order(smoke_plan, Stage.propose))
    notice = "adapt, round 1: a wrong shape\n{"
    guard.style(replace(order(smoke_plan, Stage.style), notice=notice))
    guard.style(order(smoke_plan, Stage.style))
    (line,) = (home / "notices.jsonl").read_text().splitlines()
    assert json.loads(line)["notice"] == notice


@pytest.mark.parametrize(
    ("policy", "field"),
    [({"allow_style": False}, "allow_style"), ({"max_payload_mb": 0.01}, "max_payload_mb")],
)
def test_the_policy_is_checked_before_any_data_file_is_opened(
    home: Path, smoke_plan: RunPlan, policy: dict[str, object], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = guard_of(home, **policy)
    site_module._patients.cache_clear()
    opened: list[str] = []
    real_open = builtins.open
    monkeypatch.setattr(builtins, "open", lambda *a, **k: opened.append(str(a[0])) or real_open(*a, **k))
    answer = guard.propose(smoke_plan, order(smoke_plan, Stage.propose))
    assert (answer.agrees, answer.code, answer.field) == (False, "REFUSED_POLICY", field)
    assert not any("data" in Path(name).parts for name in opened)


def test_an_order_for_a_plan_never_agreed_to_is_refused(home: Path, smoke_plan: RunPlan) -> None:
    guard = guard_of(home)
    start = initial_adapter(smoke_plan.teacher, smoke_plan.data, 0)
    with pytest.raises(PolicyRefusal, match="never agreed"):
        guard.adapt(order(smoke_plan, Stage.adapt), start)
    guard.propose(smoke_plan, order(smoke_plan, Stage.propose))
    other = replace(smoke_plan, rounds=smoke_plan.rounds + 1)
    with pytest.raises(PolicyRefusal):
        guard.adapt(order(other, Stage.adapt), start)


@pytest.mark.parametrize("said", [{"adapter": "lite"}, {"rank": 2}, {"adapter": "wide", "rank": 4}])
def test_a_site_refuses_a_plan_that_does_not_list_what_it_trains(
    home: Path, smoke_plan: RunPlan, said: dict[str, Any]
) -> None:
    guard = Guard(replace(Site.open(home), **said))
    answer = guard.propose(smoke_plan, order(smoke_plan, Stage.propose))
    assert (answer.agrees, answer.code, answer.field) == (False, "REFUSED_POLICY", "adapter")
    assert (answer.preset, answer.rank) == ("", 0)


def test_a_site_trains_and_sends_its_own_variant_and_no_other(home: Path, smoke_recipe: Recipe) -> None:
    """The site's file says what it trains; an adapter of another preset or rank is refused unopened."""
    east = replace(smoke_recipe.sites[0], adapter="dp", rank=2)
    plan = build_plan(replace(smoke_recipe, sites=[east, smoke_recipe.sites[1]]), "mixed")
    save_site(SiteFile("east", adapter="dp", rank=2, policy=smoke_recipe.policy), home / "site.yaml")
    guard = Guard(Site.open(home))
    answer = guard.propose(plan, order(plan, Stage.propose))
    assert (answer.agrees, answer.preset, answer.rank) == (True, "dp", 2)
    start = initial_adapter(guard.site.teacher(plan), plan.data, 0)
    update = guard.adapt(order(plan, Stage.adapt), start)
    listed = plan.variant("dp", 2)
    assert listed is not None
    assert set(update.adapter.tensors) == {tensor.name for tensor in listed.payload(0).tensors}
    assert not any(name.endswith("lora_A") for name in update.adapter.tensors)
    before = receipts(home)
    for other in (initial_adapter(plan.teacher, plan.data, 0), replace(start, rank=3)):
        with pytest.raises(ArtefactError, match="another one"):
            guard.adapt(order(plan, Stage.adapt), other)
    assert receipts(home) == before


def test_under_an_alternating_rule_a_round_sends_its_half_alone(home: Path, smoke_recipe: Recipe) -> None:
    """By name and by byte: B in round 0, A in round 1; the other half never leaves in that round."""
    rule = replace(smoke_recipe.aggregation, rule="rolora")
    plan = build_plan(replace(smoke_recipe, aggregation=rule), "turns")
    guard = guard_of(home)
    guard.propose(plan, order(plan, Stage.propose))
    start = initial_adapter(plan.teacher, plan.data, 0)
    dense = {name for name in start.tensors if ".lora_" not in name}
    for index, half in enumerate(["lora_B", "lora_A"]):
        update = guard.adapt(replace(order(plan, Stage.adapt), index=index), start)
        sent = dense | {f"{layer}.{half}" for layer in start.layers()}
        assert set(update.adapter.tensors) == sent
        receipt = next(line for line in reversed(receipts(home)) if line["name"] == "adapt.adapter")
        assert receipt["bytes"] == sum(tensor.nbytes for tensor in update.adapter.tensors.values())


def test_a_changed_base_model_is_refused(home: Path, smoke_plan: RunPlan) -> None:
    plan = replace(smoke_plan, models={**smoke_plan.models, "ward-sam-tiny": "0" * 64})
    with pytest.raises(ArtefactError, match="install the same release"):
        guard_of(home).propose(plan, order(plan, Stage.propose))


def test_an_update_leaves_with_its_receipts_and_a_capped_weight(home: Path, smoke_plan: RunPlan) -> None:
    guard = guard_of(home, max_weight=2)
    guard.propose(smoke_plan, order(smoke_plan, Stage.propose))
    start = initial_adapter(smoke_plan.teacher, smoke_plan.data, 0)
    update = guard.adapt(order(smoke_plan, Stage.adapt), start)
    assert isinstance(update, AdapterUpdate)
    assert update.weight == 2  # three labelled training patients, capped
    assert update.started_from == start.digest
    assert [line["name"] for line in receipts(home)] == ["answer", "adapt.adapter", "adapt.numbers"]
    assert receipts(home)[1]["sha256"] == update.adapter.digest


def test_what_the_plan_does_not_list_does_not_leave(home: Path, smoke_plan: RunPlan) -> None:
    """Had the plan no style stage, the site would release no style."""
    plan = replace(smoke_plan, payloads=[p for p in smoke_plan.payloads if p.stage != Stage.style])
    guard = guard_of(home)
    guard.propose(plan, order(plan, Stage.propose))
    with pytest.raises(EgressRefusal):
        guard.style(order(plan, Stage.style))
    assert [line["name"] for line in receipts(home)] == ["answer"]


def test_a_style_of_too_few_patients_does_not_leave(home: Path, smoke_plan: RunPlan) -> None:
    guard = guard_of(home, min_group_patients=4)
    guard.propose(smoke_plan, order(smoke_plan, Stage.propose))
    with pytest.raises(DataError, match="min_group_patients"):
        guard.style(order(smoke_plan, Stage.style))
    assert "style" not in [line["name"] for line in receipts(home)]


def test_too_few_labelled_patients_are_a_data_error(home: Path, smoke_plan: RunPlan) -> None:
    plan = replace(smoke_plan, data=replace(smoke_plan.data, min_patients=50))
    with pytest.raises(DataError, match="labelled training patients"):
        guard_of(home).propose(plan, order(plan, Stage.propose))


def test_a_site_file_with_faults_is_refused_with_all_of_them(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("nmae: x\npolicy: {min_cell_patients: lots}\n")
    with pytest.raises(ConfigError) as caught:
        Site.open(tmp_path)
    assert len(caught.value.faults) >= 2
