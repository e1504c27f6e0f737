"""A job in words: everything that leaves, everything that is new, and what it costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from client import job_words
from client.account import privacy_plan
from client.site import Site
from common.config import load_recipe, save_site
from common.plan import RunPlan, Stage
from common.privacy.accounting import quick_epsilon
from common.privacy.budget import Caps
from common.privacy.ledger import Ledger
from common.recipe import SiteFile
from server.planning import build_plan

PRIVATE = ["teacher.adapter=decoder", "privacy.noise_multiplier=1.5", "privacy.release_metrics=false",
           "generator.scope=none", "baselines=[]", "data.min_patients=2"]  # fmt: skip


@pytest.fixture
def site(tmp_path: Path) -> Site:
    save_site(SiteFile("east"), tmp_path / "site.yaml")
    return Site.open(tmp_path)


@pytest.fixture(scope="module")
def private_plan() -> RunPlan:
    return build_plan(load_recipe("smoke", PRIVATE), "private")


def keys(old: RunPlan, new: RunPlan) -> list[str]:
    return [key for key, _, _ in job_words.changed(old, new)]


def test_every_change_of_a_plan_is_named_by_its_field(smoke_plan: RunPlan) -> None:
    old = smoke_plan
    assert job_words.changed(old, old) == []
    assert keys(old, replace(old, rounds=3)) == ["rounds"]
    assert keys(old, replace(old, teacher=replace(old.teacher, steps=9))) == ["teacher.steps"]
    assert keys(old, replace(old, models={**old.models, "unet-xs": "ab"})) == ["models.unet-xs"]
    metrics = next(spec for spec in old.payloads if spec.stage is Stage.evaluate)
    others = [spec for spec in old.payloads if spec is not metrics]
    wider = replace(metrics, numbers=[*metrics.numbers, "patients"], max_bytes=7)
    found = job_words.changed(old, replace(old, payloads=[*others, wider]))
    assert [key for key, _, _ in found] == ["payloads.evaluate.numbers", "payloads.evaluate.max_bytes"]
    assert job_words.change_line(*found[0]) == 'payloads.evaluate.numbers: +"patients"'
    assert job_words.change_line(*found[1]) == f"payloads.evaluate.max_bytes: {metrics.max_bytes} -> 7"


def test_a_tensor_more_is_named_with_its_shape(smoke_plan: RunPlan) -> None:
    (variant,) = smoke_plan.variants
    (spec,) = variant.payloads
    extra = replace(spec.tensors[0], name="all.of.it", shape=[7, 9], dtype="float32")
    wider = replace(variant, payloads=[replace(spec, tensors=[*spec.tensors, extra])])
    (found,) = job_words.changed(smoke_plan, replace(smoke_plan, variants=[wider]))
    line = job_words.change_line(*found)
    assert line == 'variants.base of rank 8.adapt.tensors.all.of.it: nothing -> "float32 [7, 9]"'


def test_all_that_may_leave_is_listed_with_its_rounds_and_bytes(site: Site, smoke_plan: RunPlan) -> None:
    found = {one.stage: one for one in job_words.leaving(site, smoke_plan)}
    assert set(found) == {str(stage) for stage in smoke_plan.stages}
    (spec,) = smoke_plan.variants[0].payloads
    teacher = found["adapt"]
    assert (teacher.rounds, teacher.bytes, teacher.tensors) == (2, spec.max_bytes, len(spec.tensors))
    assert teacher.values > 1000
    assert found["evaluate"].rounds == 1
    assert {number for one in found.values() for number in one.numbers} >= {"weight", "metrics.counts.train"}


def test_a_plan_without_noise_is_called_one_without_guarantee(site: Site, smoke_plan: RunPlan) -> None:
    text = "\n".join(job_words.lines(site, smoke_plan))
    assert "NO GUARANTEE" in text
    assert "not sealed" in text
    assert smoke_plan.models["ward-sam-tiny"][:16] in text
    sealed = replace(smoke_plan, coordinator_key="ab" * 32, expires="2026-12-01", bundle_sha256="cd" * 32)
    text = "\n".join(job_words.lines(site, sealed))
    for words in ("only the coordinator can read", "last day: 2026-12-01", "cd" * 8):
        assert words in text


def test_the_cost_is_what_the_ledger_would_book(tmp_path: Path, private_plan: RunPlan) -> None:
    save_site(SiteFile("east", patients=40), tmp_path / "site.yaml")
    Ledger.create(tmp_path, "east", Caps(private_plan.privacy.delta))
    before = (tmp_path / "ledger.jsonl").read_bytes()
    found = job_words.cost(Site.open(tmp_path), private_plan)
    terms = privacy_plan(private_plan.privacy, 40)
    assert found["refused"] == ""
    assert found["epsilon"] == pytest.approx(terms.epsilon())
    after = quick_epsilon([terms.event()], private_plan.privacy.delta)
    assert found["epsilon_after"] == pytest.approx(after)
    assert (tmp_path / "ledger.jsonl").read_bytes() == before  # looking costs nothing
    text = "\n".join(job_words.lines(Site.open(tmp_path), private_plan))
    assert f"epsilon {terms.epsilon():.3g} at delta 1e-05 for this run" in text


def test_what_the_site_would_refuse_anyway_is_said_before_anybody_approves_it(
    site: Site, private_plan: RunPlan
) -> None:
    assert "write patients into site.yaml" in job_words.cost(site, private_plan)["refused"]
    assert any("would refuse it" in line for line in job_words.lines(site, private_plan))
