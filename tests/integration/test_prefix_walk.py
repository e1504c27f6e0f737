"""The frozen prefix at a site, with the real guard: kept between rounds, never sent, gone at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import client.prefix_cache as prefix_cache
from client.adaptation import adapt
from client.deadline import Deadline
from client.guard import Guard
from client.rounds import round_visit
from client.site import Site
from common.adapter import Adapter
from common.backbones.base import Backbone
from common.config import save_site
from common.errors import DeadlinePassed
from common.plan import Round, RunPlan, Stage
from common.recipe import Recipe, SiteFile
from common.teacher import initial_adapter, resident_teacher
from server.planning import build_plan
from simulations.phantoms import write_site
from tests.integration.consortium import next_adapter

VIEWS = 4


@pytest.fixture(autouse=True)
def another_process() -> Iterator[None]:
    prefix_cache._held.clear()
    yield
    prefix_cache._held.clear()


@pytest.fixture
def plan(smoke_recipe: Recipe) -> RunPlan:
    teacher = replace(smoke_recipe.teacher, adapter="last3", cached_views=VIEWS, steps=3)
    return build_plan(replace(smoke_recipe, teacher=teacher, baselines=["local_teacher"]), "prefix")


@pytest.fixture
def home(tmp_path: Path, smoke_recipe: Recipe) -> Path:
    phantom = smoke_recipe.sites[0].phantom
    assert phantom is not None
    write_site(phantom, tmp_path / "east" / "data", 0, "east")
    save_site(SiteFile("east", policy=smoke_recipe.policy), tmp_path / "east" / "site.yaml")
    return tmp_path / "east"


@pytest.fixture
def guard(home: Path, plan: RunPlan) -> Guard:
    guard = Guard(Site.open(home))
    assert guard.propose(plan, order(plan, Stage.propose)).agrees
    return guard


def order(plan: RunPlan, stage: Stage, index: int = 0, deadline_s: float = 300.0) -> Round:
    return Round(plan.digest, stage, index, deadline_s, "nonce")


def start(plan: RunPlan) -> Adapter:
    return initial_adapter(plan.teacher, plan.data, 0)


def cut_of(plan: RunPlan) -> tuple[int, int]:
    depth = len(resident_teacher(plan.teacher, plan.data).network.encoder.blocks)
    assert depth > 3
    return depth - 3, depth


def test_the_second_round_runs_no_prefix_block(plan: RunPlan, home: Path, guard: Guard) -> None:
    cut, depth = cut_of(plan)
    counts, adapter = [], start(plan)
    for index in range(3):
        before = Backbone.blocks_run
        adapter = next_adapter(adapter, guard.adapt(order(plan, Stage.adapt, index), adapter))
        counts.append(Backbone.blocks_run - before)
        if index == 1:
            prefix_cache._held.clear()  # a guard that was started again reads the file
    learning = plan.teacher.steps * (depth - cut)
    assert counts == [VIEWS * cut + learning, learning, learning]
    assert len(list((home / "cache").iterdir())) == 1


def test_the_prefix_is_right_in_rounds_of_b_and_of_a(plan: RunPlan, guard: Guard, home: Path) -> None:
    """Under an alternating rule the same blocks stay frozen in every round, and only one half moves."""
    plan = replace(plan, aggregation=replace(plan.aggregation, rule="rolora"))
    teacher, site = resident_teacher(plan.teacher, plan.data), guard.site
    train = [patient for patient in site.patients(plan.data, plan.seed) if patient.labelled]
    adapter, keys = start(plan), set()
    for index, half in enumerate(["lora_B", "lora_A", "lora_B"]):
        visit = round_visit(site, plan, Stage.adapt, index)
        trained = adapt(teacher, adapter, train, plan, visit, Deadline(300.0))
        anew = adapt(teacher, adapter, train, plan, visit._replace(folder=None), Deadline(300.0))
        assert trained.adapter.digest == anew.adapter.digest
        moved = {n for n, t in trained.adapter.tensors.items() if not torch.equal(t, adapter.tensors[n])}
        assert {name for name in moved if ".lora_" in name} == {f"{x}.{half}" for x in adapter.layers()}
        assert any(name.startswith("decoder.") for name in moved)
        keys |= {file.name for file in (home / "cache").iterdir()}
        adapter = trained.adapter
    assert len(keys) == 1


def test_no_payload_and_no_receipt_holds_the_prefix(plan: RunPlan, home: Path, guard: Guard) -> None:
    update = guard.adapt(order(plan, Stage.adapt), start(plan))
    (file,) = (home / "cache").iterdir()
    whole, tensors = file.read_bytes(), load_file(file)
    needles = [tensor.flatten()[:8].numpy().tobytes() for tensor in tensors.values()]
    needles += [tensor[-1].flatten()[-8:].numpy().tobytes() for tensor in tensors.values()]
    assert all(needle in whole for needle in needles)  # the search can find
    sent = update.adapter.to_bytes()
    elsewhere = [path.read_bytes() for path in home.rglob("*") if path.is_file() and path != file]
    assert not any(needle in place for needle in needles for place in (sent, *elsewhere))

    allowed = plan.payload(Stage.adapt)
    assert allowed is not None
    assert set(update.adapter.tensors) == {tensor.name for tensor in allowed.tensors}
    receipts = [json.loads(line) for line in (home / "receipts.jsonl").read_text().splitlines()]
    assert [line["name"] for line in receipts] == ["answer", "adapt.adapter", "adapt.numbers"]
    assert "cache" not in (home / "receipts.jsonl").read_text()
    assert "prefix-" not in (home / "receipts.jsonl").read_text()


def test_the_prefix_is_deleted_at_the_end_of_the_student_stage(
    plan: RunPlan, home: Path, guard: Guard
) -> None:
    adapter = next_adapter(start(plan), guard.adapt(order(plan, Stage.adapt), start(plan)))
    assert (home / "cache").exists()
    guard.train_student(
        order(plan, Stage.student), adapter, {"east": guard.style(order(plan, Stage.style))}, None
    )
    assert (home / "baselines" / "local_teacher.safetensors").exists()  # which trained behind it too
    assert not (home / "cache").exists()
    assert prefix_cache._held == {}


def test_the_prefix_is_deleted_when_the_student_stage_fails(plan: RunPlan, home: Path, guard: Guard) -> None:
    adapter = next_adapter(start(plan), guard.adapt(order(plan, Stage.adapt), start(plan)))
    styles = {"east": guard.style(order(plan, Stage.style))}
    with pytest.raises(DeadlinePassed):
        guard.train_student(order(plan, Stage.student, deadline_s=0.0), adapter, styles, None)
    assert not (home / "cache").exists()
