"""What a recipe may ask of students that are trained together, and what of a student travels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from client.students import STUDENTS, build_student
from common.config import load_recipe
from common.errors import ConfigError
from common.recipe import ClassConfig, DataConfig, Federation, StudentConfig, StudentScope
from common.shared_student import federated_steps, first_student, normalising, round_steps, travelling
from common.shared_student_rules import deployment_faults, shared_student_faults

CLASSES = [ClassConfig("cell", 255, "blob"), ClassConfig("vessel", 1, "vessel")]
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
FEDERATED = StudentConfig(scope=StudentScope.federated)


@pytest.mark.parametrize("name", STUDENTS)
def test_normalisations_are_known_by_their_shapes(name: str) -> None:
    student = STUDENTS[name](1)
    by_module = {
        f"{place}.{item}"
        for place, module in student.named_modules()
        if isinstance(module, NORMS)
        for item, _ in module.named_parameters(recurse=False)
    }
    assert normalising(dict(student.named_parameters())) == by_module


def test_fedbn_keeps_scales_and_shifts_at_home() -> None:
    vector, matrix = torch.zeros(3), torch.zeros(3, 3)
    weights = {
        "b.1.weight": vector, "b.1.bias": vector, "a.conv.weight": matrix, "a.conv.bias": vector,
        "c.A.weight": vector,
    }  # fmt: skip
    assert travelling(weights, Federation.fedbn) == ["a.conv.bias", "a.conv.weight", "c.A.weight"]
    assert travelling(weights, Federation.fedavg) == sorted(weights)


def test_the_rounds_start_from_the_shipped_student() -> None:
    data = DataConfig(classes=CLASSES)
    student = build_student("unet-xs", data, True, 3)
    first = first_student(StudentConfig(), data)
    assert set(first.tensors) == {name for name, _ in student.named_parameters()}
    assert all(torch.equal(first.tensors[name], tensor) for name, tensor in student.named_parameters())


@pytest.mark.parametrize(
    ("steps", "share", "rounds"), [(120, 0.67, 3), (7, 1.0, 3), (90, 0.5, 4), (5, 0.2, 1)]
)
def test_rounds_make_each_federated_step_once(steps: int, share: float, rounds: int) -> None:
    settings = replace(FEDERATED, steps=steps, federated_share=share, rounds=rounds)
    made = [step for index in range(rounds) for step in range(*round_steps(settings, index))]
    assert made == list(range(federated_steps(settings)))
    sizes = [last - first for first, last in (round_steps(settings, index) for index in range(rounds))]
    assert max(sizes) - min(sizes) <= 1


def test_a_local_student_makes_no_step_in_rounds() -> None:
    assert federated_steps(StudentConfig()) == 0


def faults_of(*settings: str, recipe: str = "smoke") -> str:
    with pytest.raises(ConfigError) as refused:
        load_recipe(recipe, list(settings))
    return "\n".join(refused.value.faults)


def test_rounds_without_a_step_are_a_fault() -> None:
    assert "student.rounds: 3 rounds share 1" in faults_of("student.scope=federated", "student.steps=2")
    assert "student.rounds: a federated baseline shares 2" in faults_of(
        "baselines=[fedavg]", "student.steps=2"
    )


def test_a_private_run_sends_no_student_and_has_no_pooled_baseline() -> None:
    told = faults_of("student.scope=federated", "baselines=[fedavg,feddf]", recipe="phantom-dp")
    assert "student.scope: a student's weights would leave without noise" in told
    assert "baselines[0]: fedavg is trained on all sites' patients without noise" in told
    assert "baselines[1]: feddf" in told


def test_what_averages_students_wants_one_kind_at_all_sites() -> None:
    recipe = load_recipe("smoke", ["baselines=[fedavg,feddf,centralised]", "student.steps=9"])
    sites = [replace(recipe.sites[0], student="another"), recipe.sites[1]]
    mixed = replace(recipe, sites=sites, student=replace(recipe.student, scope=StudentScope.federated))
    keys = [fault.key for fault in shared_student_faults(mixed)]
    assert keys == ["student.scope", "baselines[0]", "baselines[2]"]
    assert "east (another)" in str(next(iter(shared_student_faults(mixed))))


def test_a_deployment_has_no_pooled_baseline() -> None:
    recipe = load_recipe("smoke", ["baselines=[local_only,centralised]"])
    assert [fault.key for fault in deployment_faults(recipe)] == ["baselines[1]"]
    assert "only a simulation has them" in str(next(iter(deployment_faults(recipe))))
    assert not list(deployment_faults(load_recipe("smoke", ["baselines=[local_only]"])))
