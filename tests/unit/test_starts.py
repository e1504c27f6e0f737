"""What a site's students start from: by the recipe, by their kind, and learned once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import client.starts
from client.deadline import Deadline
from client.guard import Guard
from client.membership import audit_student, subjects_of
from client.patients import Patient
from client.site import Site
from client.starts import Starts
from client.students import Student, build_student, save_student
from client.variants import VARIANTS
from common.errors import ConfigError
from common.plan import RunPlan
from common.recipe import PolicyConfig, Recipe, SiteConfig, Start
from common.student_rules import student_faults
from server.planning import model_digests

FOREVER = Deadline(float("inf"))


def starts_of(plan: RunPlan, train: list[Patient], tmp_path: Path, **student: object) -> Starts:
    own = student.pop("own", None)
    plan = replace(plan, student=replace(plan.student, pretraining_steps=1, **student))
    site = Site("east", tmp_path, tmp_path / "manifest.csv", own, PolicyConfig())  # type: ignore[arg-type]
    return Starts(site, plan, train, FOREVER)


def flat(student: Student) -> torch.Tensor:
    return torch.cat([one.detach().flatten() for one in student.parameters()])


def test_a_start_is_learned_once_and_handed_out_anew(
    smoke_plan: RunPlan, patients: list[Patient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Start] = []
    real = client.starts.pretrain

    def counted(student: Student, *rest: object) -> list[float]:
        calls.append(rest[1].start)  # type: ignore[attr-defined]
        return real(student, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(client.starts, "pretrain", counted)
    starts = starts_of(smoke_plan, patients, tmp_path)
    first = starts.student(Start.mae)
    wanted = flat(first).clone()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()  # a variant trains its own copy
    assert torch.equal(flat(starts.student(Start.mae)), wanted)
    assert not torch.equal(flat(starts.student(Start.moco)), wanted)
    starts.student(Start.moco)
    starts.student(Start.random)
    assert calls == [Start.mae, Start.moco]


def test_every_start_but_the_shipped_begins_with_the_same_random_weights(
    smoke_plan: RunPlan, patients: list[Patient], tmp_path: Path
) -> None:
    starts = starts_of(smoke_plan, patients, tmp_path)
    heads = [starts.student(start).head.weight for start in (Start.random, Start.mae, Start.moco)]
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[0], heads[2])
    assert not torch.equal(heads[0], starts.student(Start.shipped).head.weight)


def test_the_recipe_decides_and_else_the_kind(
    smoke_plan: RunPlan, patients: list[Patient], tmp_path: Path
) -> None:
    def found(**student: object) -> dict[str, str]:
        starts = starts_of(smoke_plan, patients, tmp_path, **student)
        names = ("student", "local_only", "local_only_scratch", "local_only_mae", "local_only_moco")
        return {name: str(starts.resolve(VARIANTS[name].start)) for name in names}

    fixed = {"local_only_scratch": "random", "local_only_mae": "mae", "local_only_moco": "moco"}
    assert found() == {"student": "shipped", "local_only": "shipped", **fixed}
    assert found(own="vit-tiny") == {"student": "mae", "local_only": "mae", **fixed}
    assert found(start=Start.moco) == {"student": "moco", "local_only": "moco", **fixed}
    with pytest.raises(ConfigError, match="vit-tiny ships no weights"):
        found(own="vit-tiny", start=Start.shipped)


def test_a_site_without_an_image_starts_at_random(smoke_plan: RunPlan, tmp_path: Path) -> None:
    starts = starts_of(smoke_plan, [], tmp_path)
    assert torch.equal(flat(starts.student(Start.mae)), flat(starts.student(Start.random)))


def test_an_audit_compares_with_the_student_before_the_run(
    smoke_plan: RunPlan, patients: list[Patient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that was learned from the patients is a part of what is audited, not its zero."""
    asked: list[bool] = []

    def noted(name: str, data: object, pretrained: bool, seed: int) -> Student:
        asked.append(pretrained)
        return build_student(name, smoke_plan.data, pretrained, seed)

    monkeypatch.setattr("client.membership.build_student", noted)
    train = [
        replace(p, split=type(p.split).train if n % 2 else type(p.split).val) for n, p in enumerate(patients)
    ]
    monkeypatch.setattr(Site, "patients", lambda *_: train)
    site = starts_of(smoke_plan, train, tmp_path).site
    subjects = subjects_of(site, smoke_plan)
    for start in (Start.mae, Start.shipped, Start.random, None):
        about = {"run_id": smoke_plan.run_id, "model": "student", "start": start}
        student = build_student("unet-xs", smoke_plan.data, False, 5)
        save_student(student, tmp_path / "student.safetensors", "unet-xs", smoke_plan.data, about)
        audit_student(site, smoke_plan, subjects)
    assert asked == [False, True, False, True]


def test_shipped_weights_are_asked_of_kinds_that_have_them(smoke_recipe: Recipe) -> None:
    east, west = smoke_recipe.sites
    mixed = replace(
        smoke_recipe,
        student=replace(smoke_recipe.student, name="vit-tiny", start=Start.shipped),
        sites=[east, replace(west, student="vit-tiny"), SiteConfig("south", student="unet-xs")],
    )
    assert [fault.key for fault in student_faults(mixed)] == ["student.start", "sites[1].student"]
    assert all("student.start=mae, moco or random" in str(fault) for fault in student_faults(mixed))
    for start in (None, Start.mae, Start.random, Start.moco):
        assert not list(student_faults(replace(mixed, student=replace(mixed.student, start=start))))


def test_the_plan_names_the_weights_that_there_are(smoke_recipe: Recipe) -> None:
    east, west = smoke_recipe.sites
    asked = replace(smoke_recipe, sites=[replace(east, student="vit-tiny"), west])
    assert "vit-tiny" not in model_digests(asked)
    assert "unet-xs" in model_digests(asked)


def test_a_site_says_at_once_that_its_student_has_no_such_start(smoke_plan: RunPlan, tmp_path: Path) -> None:
    """Not in the last stage, after all the rounds."""
    site = starts_of(smoke_plan, [], tmp_path, own="vit-tiny").site
    Guard(site)._check_policy(smoke_plan)
    asked = replace(smoke_plan, student=replace(smoke_plan.student, start=Start.shipped))
    with pytest.raises(ConfigError, match=r"choose another student in site\.yaml"):
        Guard(site)._check_policy(asked)
