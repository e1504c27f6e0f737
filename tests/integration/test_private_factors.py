"""Private rounds with factors: A is public, named by the plan, listed by the policy, and never another."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import client.site as site_module
from client.guard import Guard
from client.site import Site
from common.adapter import Adapter
from common.config import load_recipe
from common.errors import PolicyRefusal
from common.plan import RunPlan, Stage, TensorSpec, Variant
from common.precision import pack_down
from common.privacy.bundle import read_bundle
from common.privacy.entries import EntryType
from common.privacy.verify import Evidence, verify
from common.teacher import initial_adapter, private_initial_adapter
from server.planning import build_plan, first_adapters
from tests.integration.test_private_rounds import Office, agreed, entries, home, opened_files, order

__all__ = ["home"]  # the fixture of the neighbour: a site that declares three patients and has a ledger

SETTINGS = [
    "teacher.adapter=dp", "teacher.decoder=head", "aggregation.rule=ffa", "privacy.noise_multiplier=1.5",
    "privacy.steps=2", "privacy.release_metrics=false", "generator.scope=none", "baselines=[]",
]  # fmt: skip
FIELD = "payload.a_matrix_sha256"


@pytest.fixture(scope="module")
def plan() -> RunPlan:
    return build_plan(load_recipe("smoke", SETTINGS), "private-run")


def start(plan: RunPlan) -> Adapter:
    """What the first round sends, as it travels."""
    first = private_initial_adapter(plan.teacher, plan.data, plan.seed)
    return pack_down(first, plan.aggregation.wire_dtype)


def allow(office: Office, *a_sha256: str) -> None:
    """Sign a policy that allows the plan, as far as its A is among ``a_sha256``."""
    payload = json.loads(office.sign().text())["payload"]
    office.sign(payload=payload | {"a_matrix_sha256": list(a_sha256)})


def with_variant(plan: RunPlan, change: Callable[[Variant], Variant]) -> RunPlan:
    return replace(plan, variants=[change(plan.variants[0])])


def test_the_plan_names_the_a_that_the_first_round_sends(plan: RunPlan) -> None:
    recipe = load_recipe("smoke", SETTINGS)
    (first,) = first_adapters(recipe).teachers
    assert plan.variants[0].a_sha256 == first.a_sha256 != ""
    other = replace(recipe, run=replace(recipe.run, seed=9))
    assert build_plan(other, "x").variants[0].a_sha256 == first.a_sha256, "no seed decides it"
    finer = replace(recipe, aggregation=replace(recipe.aggregation, wire_dtype="float32"))
    assert build_plan(finer, "x").variants[0].a_sha256 == first.a_sha256, "nor the wire"
    open_run = load_recipe("smoke", ["teacher.adapter=dp", "aggregation.rule=ffa"])
    assert build_plan(open_run, "x").variants[0].a_sha256 == ""


def test_private_rounds_of_b_alone_are_booked_and_verified(home: Path, plan: RunPlan) -> None:
    office = Office(home, plan)
    allow(office, plan.variants[0].a_sha256)
    guard = agreed(home, plan)
    for index in range(plan.rounds):
        update = guard.adapt(order(plan, Stage.adapt, index), start(plan))
        sent = set(update.adapter.tensors)
        assert any(name.endswith(".lora_B") for name in sent)
        assert not any(name.endswith(".lora_A") for name in sent)
    assert [entry.events for entry in entries(home, EntryType.reserve)] == [[[1.5, 0.5, 1]]] * plan.rounds
    assert verify(read_bundle(home), Evidence()).faults == []


def unlisted(office: Office) -> RunPlan:
    allow(office)
    return office.plan


def another_listed(office: Office) -> RunPlan:
    allow(office, "0a" * 32)
    return office.plan


def unnamed(office: Office) -> RunPlan:
    allow(office, office.plan.variants[0].a_sha256)
    return with_variant(office.plan, lambda own: replace(own, a_sha256=""))


def both_trained(office: Office) -> RunPlan:
    """A plan that no recipe makes: a server may send what it likes."""
    allow(office, office.plan.variants[0].a_sha256)
    own = office.plan.variants[0].payload(0)
    b = next(tensor for tensor in own.tensors if tensor.name.endswith(".lora_B"))
    a = TensorSpec(b.name.removesuffix("B") + "A", [4, b.shape[0]], b.dtype)
    return with_variant(
        office.plan, lambda one: replace(one, payloads=[replace(own, tensors=[*own.tensors, a])])
    )


REFUSED = {
    unlisted: FIELD,
    another_listed: FIELD,
    unnamed: FIELD,
    both_trained: "payload.outbound",  # the policy lists no A; without a policy see below
}


@pytest.mark.parametrize("wrong", REFUSED, ids=lambda wrong: str(wrong.__name__))
def test_another_a_is_refused_before_any_data_file_is_opened(
    home: Path, plan: RunPlan, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Office], RunPlan]
) -> None:
    asked = wrong(Office(home, plan))
    site_module._patients.cache_clear()
    monkeypatch.setattr(Site, "patients", lambda *_: pytest.fail("data were asked for"))
    with opened_files() as opened:
        answer = Guard(Site.open(home)).propose(asked, order(asked, Stage.propose))
    assert (answer.agrees, answer.code, answer.field) == (False, "REFUSED_POLICY", REFUSED[wrong])
    assert str(home / "policy.json") in opened, "the hook sees what is opened"
    assert not any((home / "data") in Path(name).parents for name in opened)


@pytest.mark.parametrize("wrong", [unnamed, both_trained], ids=lambda wrong: str(wrong.__name__))
def test_a_site_without_a_policy_refuses_an_a_that_is_trained_or_unnamed(
    home: Path, plan: RunPlan, wrong: Callable[[Office], RunPlan]
) -> None:
    site = (home / "site.yaml").read_bytes()
    asked = wrong(Office(home, plan))
    (home / "site.yaml").write_bytes(site)
    for name in ("policy.json", "policy.json.sig"):
        (home / name).unlink()
    answer = Guard(Site.open(home)).propose(asked, order(asked, Stage.propose))
    assert (answer.agrees, answer.code, answer.field) == (False, "REFUSED_POLICY", FIELD)


def random_a(plan: RunPlan, sent: Adapter) -> Adapter:
    return pack_down(initial_adapter(plan.teacher, plan.data, 3), plan.aggregation.wire_dtype)


def one_bit(plan: RunPlan, sent: Adapter) -> Adapter:
    name = next(name for name in sent.tensors if name.endswith(".lora_A"))
    changed = sent.tensors[name].clone()
    changed.view(torch.int16)[0, 0] ^= 1
    return replace(sent, tensors={**sent.tensors, name: changed})


@pytest.mark.parametrize("swap", [random_a, one_bit])
def test_the_server_cannot_swap_a_in_the_middle_of_a_run(
    home: Path, plan: RunPlan, monkeypatch: pytest.MonkeyPatch, swap: Callable[[RunPlan, Adapter], Adapter]
) -> None:
    """Refused and booked, with nothing reserved and no data opened; the right A may go on."""
    guard = agreed(home, plan)
    guard.adapt(order(plan, Stage.adapt), start(plan))
    with monkeypatch.context() as patch:
        patch.setattr(Site, "patients", lambda *_: pytest.fail("data were asked for"))
        with pytest.raises(PolicyRefusal) as caught:
            guard.adapt(order(plan, Stage.adapt, 1), swap(plan, start(plan)))
    assert caught.value.field == FIELD
    assert len(entries(home, EntryType.reserve)) == 1
    (refused,) = entries(home, EntryType.refuse)
    assert (refused.detail["code"], refused.detail["field"]) == ("REFUSED_POLICY", FIELD)
    guard.adapt(order(plan, Stage.adapt, 1), start(plan))
    assert verify(read_bundle(home), Evidence()).faults == []
    assert len(entries(home, EntryType.commit)) == 2
