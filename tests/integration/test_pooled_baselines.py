"""Baselines that need all sites' images: trained after the walk, tested like the others, only simulated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from client.deadline import Deadline
from client.distillation import distil
from client.federated_student import read_weights, train_round
from client.measuring import model_path
from client.site import Site
from client.students import load_student
from common.canonical import sha256_of_file
from common.config import load_recipe
from common.plan import RunPlan
from common.probability import probabilities
from common.recipe import Federation, StudentScope
from server.outcome import RunOutcome
from server.report.schema import BenefitCell, RunReport
from simulations.baselines import Hospital, centralised, feddf, federated, train_pooled
from simulations.simulate import simulate
from simulations.values import SiteValues

NAMES = ["fedavg", "fedprox", "fedbn", "centralised", "feddf"]
SITES = ("east", "west")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = [
        f"baselines=[local_only,{','.join(NAMES)}]", "run.rounds=1", "generator.scope=none",
        "student.steps=4", "student.proximal=50",
    ]  # fmt: skip
    return simulate(load_recipe("smoke", settings), tmp_path_factory.mktemp("pooled") / "run", resume=False)


@pytest.fixture(scope="module")
def plan(run: Path) -> RunPlan:
    outcome = RunOutcome.load(run / "state")
    return Site.open(run / "sites" / "east").accepted_plan(outcome.plan_sha256)


@pytest.fixture(scope="module")
def hospitals(run: Path, plan: RunPlan) -> list[Hospital]:
    return [Hospital.open(Site.open(run / "sites" / name), plan) for name in SITES]


def weights_of(run: Path, site: str, name: str) -> torch.Tensor:
    student = load_student(model_path(Site.open(run / "sites" / site), name)).module
    return torch.cat([parameter.detach().flatten() for parameter in student.parameters()])


def test_a_federated_student_is_one_for_all_and_none_of_the_others(run: Path) -> None:
    for name in ("fedavg", "fedprox", "fedbn", "centralised"):
        assert torch.equal(weights_of(run, "east", name), weights_of(run, "west", name))
    assert not torch.equal(weights_of(run, "east", "feddf"), weights_of(run, "west", "feddf"))
    different = ["student", "local_only", "fedavg", "fedprox", "centralised", "feddf"]
    digests = {sha256_of_file(model_path(Site.open(run / "sites" / "east"), name)) for name in different}
    assert len(digests) == len(different)


def test_fedbn_is_fedavg_for_a_student_whose_normalisations_have_no_parameters(run: Path) -> None:
    assert torch.equal(weights_of(run, "east", "fedbn"), weights_of(run, "east", "fedavg"))


def test_a_strong_pull_keeps_fedprox_nearer_to_the_start(run: Path, hospitals: list[Hospital]) -> None:
    start = torch.cat([parameter.detach().flatten() for parameter in hospitals[0].start().parameters()])
    free, held = ((weights_of(run, "east", name) - start).norm() for name in ("fedavg", "fedprox"))
    assert 0 < held < 0.95 * free


def test_a_federation_of_one_site_in_one_round_is_training_alone(hospitals: list[Hospital]) -> None:
    """The oracle of the loop: the same batches and course as a student that nobody averages."""
    hospital = hospitals[0]
    plan = replace(hospital.plan, student=replace(hospital.plan.student, rounds=1))
    made = federated(Federation.fedavg, [hospital], plan)["east"]
    alone = hospital.start()
    whole = replace(plan.student, scope=StudentScope.federated, federated_share=1.0)
    seed = hospital.site.draw_seed(plan, "shared_student", 0)
    train_round(alone, hospital.labelled, replace(plan, student=whole), (0, seed), Deadline(60))
    names = [name for name, _ in alone.named_parameters()]
    for name, tensor in read_weights(made, names).items():
        assert torch.equal(tensor, read_weights(alone, names)[name])


def test_sites_weigh_as_many_patients_as_they_have(hospitals: list[Hospital]) -> None:
    one, two = hospitals
    plan = replace(one.plan, student=replace(one.plan.student, rounds=1))
    few = replace(two, train=two.train[:1])
    both = federated(Federation.fedavg, [one, few], plan)["east"]
    alone = [federated(Federation.fedavg, [hospital], plan)[hospital.name] for hospital in (one, few)]
    weights = [hospital.weight for hospital in (one, few)]
    assert weights == [len(one.labelled), 1.0]
    for mean, first, second in zip(*(m.parameters() for m in (both, *alone)), strict=True):
        expected = (weights[0] * first + weights[1] * second) / sum(weights)
        assert torch.allclose(mean, expected, atol=1e-6)


def test_centralised_learns_from_every_sites_patients(
    hospitals: list[Hospital], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr("simulations.baselines.distil", lambda _, patients, *rest: seen.extend(patients))
    centralised(hospitals, hospitals[0].plan)
    assert len(seen) == sum(len(hospital.labelled) for hospital in hospitals)


def test_the_ensemble_asks_every_sites_own_teacher(
    hospitals: list[Hospital], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def kept(student, patients, transfer, plan, seed, deadline):
        given.append(transfer)
        return distil(student, patients, transfer, plan, seed, deadline)

    monkeypatch.setattr("simulations.baselines.distil", kept)
    feddf(hospitals, hospitals[0].plan)
    said = []
    for hospital in hospitals:
        with hospital.teachers.visit(hospital.local_teacher) as network, torch.inference_mode():
            views = [(), (3,)]
            parts = [network(given[0].images.flip(v)).logits.flip(v).sigmoid() for v in views]
            said.append(torch.stack(parts).mean(0))
    assert not torch.allclose(said[0], said[1], atol=1e-3)
    mean = (said[0] + said[1]) / 2
    assert torch.allclose(probabilities(given[0].logits.float(), False), mean, atol=2e-3)


def test_every_pooled_model_is_in_the_benefit_as_the_others_are(run: Path) -> None:
    report = RunReport.load(run / "report.json")

    def keys(model: str) -> set[tuple[str, str, str, str]]:
        return {(c.site, c.tested_on, c.metric, c.class_name) for c in report.benefit if c.model == model}

    for name in NAMES:
        assert keys(name) == keys("local_only")
    page = (run / "report.html").read_text()
    assert "FedAvg student (simulated)" in page
    assert "Centralised student (simulated)" in page


def test_the_kept_values_are_those_behind_the_benefit(run: Path) -> None:
    report = RunReport.load(run / "report.json")
    kept = {name: SiteValues.load(run / "sites" / name) for name in SITES}
    checked = 0
    for cell in report.benefit:
        where = SITES if cell.tested_on == "all" else [cell.site]
        values = [
            value
            for tested in where
            for one in kept[tested].columns
            if _is(one, cell)
            for value in one.values
            if value is not None
        ]
        if cell.value is not None:
            assert np.mean(values) == pytest.approx(cell.value, abs=1e-9)
            checked += 1
    assert checked > 40


def _is(column, cell: BenefitCell) -> bool:
    mine = (column.model, column.trained_at, column.metric, column.class_name)
    return mine == (cell.model, cell.site, cell.metric, cell.class_name)


def test_the_sites_know_nothing_of_a_pooled_baseline(plan: RunPlan) -> None:
    assert plan.baselines == ["local_only"]


def test_what_is_there_is_not_trained_again(
    run: Path, plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    makers = {name: lambda *_, name=name: made.append(name) or {} for name in NAMES}
    monkeypatch.setattr("simulations.baselines.MAKERS", makers)
    sites = [Site.open(run / "sites" / name) for name in SITES]
    train_pooled(NAMES, sites, plan)
    assert made == []
