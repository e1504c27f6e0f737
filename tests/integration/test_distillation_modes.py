"""Whom a student learns from in each mode, and that every teacher is asked once and nothing is left."""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import client.transfer.labelling as labelling
import client.workshop
from client.deadline import Deadline
from client.site import Site
from client.style import summarise_style
from client.teachers import SiteTeachers
from client.transfer.kept import FOLDER
from client.transfer.making import TransferMaker
from client.transfer.painting import Painter
from client.transfer.sets import TransferSet
from client.variants import VARIANTS
from client.workshop import Workshop
from common.adapter import Adapter
from common.config import save_site
from common.plan import RunPlan
from common.recipe import Distillation, Recipe, SiteFile
from common.teacher import initial_adapter
from server.planning import build_plan
from simulations.phantoms import write_site
from tests.contract.adapter import moved

FOREVER = Deadline(1e9)


@pytest.fixture
def plan(smoke_recipe: Recipe) -> RunPlan:
    generator = replace(smoke_recipe.generator, keep_dice=0.0)
    return build_plan(replace(smoke_recipe, generator=generator, baselines=[]), "modes")


@pytest.fixture
def site(tmp_path: Path, smoke_recipe: Recipe) -> Site:
    phantom = smoke_recipe.sites[0].phantom
    assert phantom is not None
    write_site(phantom, tmp_path / "east" / "data", 0, "east")
    save_site(SiteFile("east", policy=smoke_recipe.policy), tmp_path / "east" / "site.yaml")
    return Site.open(tmp_path / "east")


@pytest.fixture
def shared(plan: RunPlan) -> Adapter:
    return moved(initial_adapter(plan.teacher, plan.data, 0), 1, scale=0.05)


def mode(plan: RunPlan, value: Distillation) -> RunPlan:
    return replace(plan, student=replace(plan.student, distillation=value))


@pytest.fixture
def learned(
    site: Site, shared: Adapter, monkeypatch: pytest.MonkeyPatch
) -> Callable[[RunPlan], list[TransferSet]]:
    """The transfer sets that the student and the plan's baselines learn from, while they are learned from."""

    def run(plan: RunPlan) -> list[TransferSet]:
        seen: list[TransferSet] = []

        def noted(*arguments: object) -> None:
            files = list((site.folder / FOLDER).glob("*"))
            assert {stat.S_IMODE(path.stat().st_mode) for path in files} <= {0o600}
            assert bool(files) == (seen != [] or plan.student.distillation != Distillation.none)
            given = arguments[2]
            assert isinstance(given, TransferSet)
            seen.append(given)

        monkeypatch.setattr(client.workshop, "distil", noted)
        patients = site.patients(plan.data, plan.seed)
        style = summarise_style([p for p in patients if p.labelled], plan.data.image_size, 2, 1, 0)
        Workshop(site, plan, shared, {"east": style}, None, patients, FOREVER).run()
        assert not (site.folder / FOLDER).exists()
        return seen

    return run


def test_each_baseline_lacks_what_its_name_says_and_no_teacher_is_asked_twice(
    plan: RunPlan, learned: Callable[[RunPlan], list[TransferSet]]
) -> None:
    before = labelling.teacher_calls
    baselines = ["no_features", "no_synthetic", "task_agnostic"]
    ours, outputs, real, agnostic = learned(replace(plan, baselines=baselines))
    images = len(ours)
    assert labelling.teacher_calls - before == labelling.MIRRORED * 2 * images  # federated, untuned
    assert ours.logits is not None
    assert ours.tokens is not None
    assert outputs.logits is not None
    assert torch.equal(outputs.logits, ours.logits)
    assert outputs.tokens is None
    assert outputs.features is None
    assert real.logits is not None
    assert torch.equal(real.logits, ours.logits[~ours.synthetic])
    assert agnostic.logits is None
    assert agnostic.tokens is not None
    assert torch.equal(agnostic.images, ours.images)
    assert not torch.equal(agnostic.tokens, ours.tokens)


def test_the_modes_of_a_recipe_put_other_teachers_in_the_federated_ones_place(
    plan: RunPlan, learned: Callable[[RunPlan], list[TransferSet]], site: Site, shared: Adapter
) -> None:
    (task,) = learned(plan)
    (none,) = learned(mode(plan, Distillation.none))
    assert none.logits is None
    assert none.tokens is None
    assert bool(none.synthetic.all())
    (agnostic,) = learned(mode(plan, Distillation.agnostic))
    assert agnostic.logits is None
    assert agnostic.tokens is not None
    (ensemble,) = learned(mode(plan, Distillation.ensemble))
    assert ensemble.tokens is None
    assert ensemble.logits is not None
    assert task.logits is not None
    patients = [p for p in site.patients(plan.data, plan.seed) if p.labelled]
    teachers = SiteTeachers(site, plan, shared, patients, FOREVER)
    with teachers.visit(teachers.local) as network:
        own = labelling.teacher_logits(network, ensemble.images, False).sigmoid()
    wanted = (own + task.logits.float().sigmoid()) / 2
    assert torch.allclose(ensemble.logits.float().sigmoid(), wanted, atol=5e-3)
    assert (own - wanted).abs().max() > 0.01


def test_a_resumed_run_asks_nobody_and_a_changed_teacher_is_asked(
    plan: RunPlan, site: Site, shared: Adapter
) -> None:
    """The process was killed, so nothing was cleared away; painted images come out the same again."""
    plan = replace(plan, student=replace(plan.student, transfer_views=2))
    patients = site.patients(plan.data, plan.seed)
    found = [patient for patient in patients if patient.labelled]
    style = summarise_style(found, plan.data.image_size, 2, 1, 0)

    def made(adapter: Adapter) -> tuple[TransferSet, int]:
        before = labelling.teacher_calls
        teachers = SiteTeachers(site, plan, adapter, found, FOREVER)
        painter = Painter(site, plan, {"east": style}, None, found, FOREVER)
        curated = TransferMaker(teachers, painter, patients).curated(VARIANTS["student"])
        assert curated is not None
        return curated.transfer, labelling.teacher_calls - before

    first, asked = made(shared)
    again, repeated = made(shared)
    assert asked == labelling.MIRRORED * len(first)
    assert repeated == 0
    for name, column in vars(first).items():
        assert torch.equal(column, vars(again)[name]), name
    assert made(moved(shared, 2, scale=0.05))[1] == asked
