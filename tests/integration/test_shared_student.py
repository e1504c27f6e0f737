"""A student whose weights the sites train together: through the one exit, averaged, resumed, taken home."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import client.rounds
from client.federated_student import NormKeeper, shared_student
from client.guard import Guard
from client.measuring import model_path
from client.site import Site
from client.students import Student, load_student
from common.config import load_recipe, save_run_config
from common.errors import ArtefactError, PolicyRefusal
from common.plan import Round, RunPlan, Stage
from common.recipe import Federation, StudentConfig, StudentScope
from common.shared_student import SHARED_STUDENT, first_student
from server.outcome import RunOutcome
from server.phases import Walk
from server.planning import build_plan
from server.report.schema import RunReport
from simulations.baselines import Hospital, federated_loop
from simulations.loopback import run_loopback
from simulations.simulate import prepare_sites, simulate
from tests.integration import consortium

SITES = ("east", "west")
FEDERATED = ("student.scope=federated", "student.steps=6", "run.rounds=1", "generator.scope=none")
ALLOWED = "policy.allow_student=true"
EXACT = "aggregation.wire_dtype=float32"


def weights_of(run: Path, site: str, name: str = "student") -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in _student(run, site, name).parameters()])


def _student(run: Path, site: str, name: str = "student") -> Student:
    return load_student(model_path(Site.open(run / "sites" / site), name)).module


def _plan(run: Path) -> RunPlan:
    return Site.open(run / "sites" / "east").accepted_plan(RunOutcome.load(run / "state").plan_sha256)


def prepared(folder: Path, *settings: str) -> Path:
    recipe = load_recipe("smoke", [*FEDERATED, "baselines=[]", *settings])
    folder.mkdir(exist_ok=True)
    save_run_config(recipe, folder / "config.yaml")
    prepare_sites(recipe, folder / "sites")
    return folder


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All steps in rounds, nothing rounded on the way: what FedAvg is."""
    settings = [*FEDERATED, ALLOWED, EXACT, "student.federated_share=1.0", "baselines=[fedavg,local_only]"]
    return simulate(load_recipe("smoke", settings), tmp_path_factory.mktemp("averaged") / "run", False)


@pytest.fixture(scope="module")
def combined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = [*FEDERATED, ALLOWED, "student.federated_share=0.5", "baselines=[local_only,no_synthetic]"]
    return simulate(load_recipe("smoke", settings), tmp_path_factory.mktemp("combined") / "run", False)


def test_one_round_of_the_walk_is_one_of_the_plain_loop(tmp_path: Path) -> None:
    """Up to float32: the walk sends trained minus sent, the loop averages what was trained."""
    run = prepared(tmp_path / "run", ALLOWED, EXACT, "student.federated_share=1.0", "student.rounds=1")
    run_loopback(run, run / "sites")
    hospitals = [Hospital.open(Site.open(run / "sites" / site), _plan(run)) for site in SITES]
    looped = federated_loop(hospitals, _plan(run))
    for site in SITES:
        flat = torch.cat([parameter.detach().flatten() for parameter in looped[site].parameters()])
        assert torch.allclose(weights_of(run, site), flat, atol=1e-7)


def test_three_rounds_stay_beside_the_plain_loop(averaged: Path) -> None:
    """The optimiser divides by the gradient's own size, so that a rounding grows from round to round."""
    start = first_student(_plan(averaged).student, _plan(averaged).data).tensors
    names = [name for name, _ in _student(averaged, "east").named_parameters()]
    first = torch.cat([start[name].flatten() for name in names])
    for site in SITES:
        walked, looped = weights_of(averaged, site), weights_of(averaged, site, "fedavg")
        alone = weights_of(averaged, site, "local_only")
        assert (walked - looped).norm() < 0.01 * (looped - first).norm()
        assert (walked - alone).norm() > 0.1 * (looped - first).norm()


def test_what_left_is_what_the_plan_names_and_is_on_a_receipt(averaged: Path) -> None:
    outcome, plan = RunOutcome.load(averaged / "state"), _plan(averaged)
    listed = plan.payload(Stage.shared_student)
    assert listed is not None
    student = _student(averaged, "east")
    assert {tensor.name for tensor in listed.tensors} == {name for name, _ in student.named_parameters()}
    for site in SITES:
        lines = (averaged / "sites" / site / "receipts.jsonl").read_text().splitlines()
        sent = [json.loads(line) for line in lines]
        rounds = [line["round"] for line in sent if line["name"] == "shared_student.adapter"]
        assert rounds == list(range(plan.student.rounds))
    stages = [record.stage for record in RunReport.load(averaged / "report.json").rounds]
    assert stages.count("shared_student") == plan.student.rounds
    assert outcome.student_sha256


def test_a_site_goes_on_from_the_common_student_and_local_training_does_not(
    combined: Path, averaged: Path
) -> None:
    for site in SITES:
        # Without synthetic images to leave out, the two are one.
        assert torch.equal(weights_of(combined, site), weights_of(combined, site, "no_synthetic"))
        assert torch.equal(weights_of(combined, site, "local_only"), weights_of(averaged, site, "local_only"))
    apart = (weights_of(combined, "east") - weights_of(combined, "west")).norm()
    alone = weights_of(combined, "east", "local_only") - weights_of(combined, "west", "local_only")
    assert 0 < apart < alone.norm()


def test_a_policy_that_lets_no_student_leave_refuses_the_plan(tmp_path: Path) -> None:
    run = prepared(tmp_path / "run")
    with pytest.raises(PolicyRefusal) as refused:
        run_loopback(run, run / "sites")
    assert refused.value.exit_code == 20
    assert refused.value.faults == tuple(f"{site}: REFUSED_POLICY (allow_student)" for site in SITES)
    assert not list(run.glob("sites/*/student.safetensors"))


def test_a_site_with_another_student_of_its_own_refuses_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(tmp_path / "run", ALLOWED)
    real = Site.open
    monkeypatch.setattr(Site, "open", lambda folder: replace(real(folder), student="another"))
    with pytest.raises(PolicyRefusal) as refused:
        run_loopback(run, run / "sites")
    assert refused.value.faults == tuple(f"{site}: REFUSED_POLICY (student)" for site in SITES)


def test_a_run_that_stops_between_rounds_ends_with_the_same_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = (prepared(tmp_path / name, ALLOWED) for name in ("whole", "broken"))
    monkeypatch.setattr(Walk, "student", lambda self: None)
    monkeypatch.setattr(Walk, "evaluate", lambda self: None)
    run_loopback(whole, whole / "sites")
    real = client.rounds.train_shared_student

    def stopped(site, plan, student, train, order):
        if order.index == 1 and site.name == "west":
            raise KeyboardInterrupt
        return real(site, plan, student, train, order)

    monkeypatch.setattr(client.rounds, "train_shared_student", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_loopback(broken, broken / "sites")
    monkeypatch.setattr(client.rounds, "train_shared_student", real)
    run_loopback(broken, broken / "sites")
    digests = {RunOutcome.load(run / "state").student_sha256 for run in (whole, broken)}
    assert len(digests) == 1
    assert digests != {""}


def test_a_courier_that_asks_for_a_students_weights_beside_the_plan_gets_none(tmp_path: Path) -> None:
    recipe = load_recipe("smoke")
    prepare_sites(recipe, tmp_path)
    guard, plan = Guard(Site.open(tmp_path / "east")), build_plan(recipe, "run")

    def order(stage: Stage) -> Round:
        return Round(plan.digest, stage, 0, 60.0, "nonce")

    assert guard.propose(plan, order(Stage.propose)).agrees
    receipts = (tmp_path / "east" / "receipts.jsonl").read_text()
    with pytest.raises(PolicyRefusal, match="trains no student together"):
        guard.train_shared_student(order(Stage.shared_student), first_student(plan.student, plan.data))
    assert (tmp_path / "east" / "receipts.jsonl").read_text() == receipts


class Normed(nn.Module):
    """A student's skeleton with one normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)


def fedbn_plan(plan: RunPlan) -> RunPlan:
    settings = StudentConfig(scope=StudentScope.federated, federation=Federation.fedbn)
    return replace(plan, student=settings)


def test_under_fedbn_scales_stay_at_home_and_a_round_asked_again_starts_where_it_did(
    tmp_path: Path, smoke_plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = fedbn_plan(smoke_plan)
    monkeypatch.setattr("client.federated_student.build_student", lambda *_: Normed())
    keeper, network = NormKeeper(tmp_path, plan), Normed()
    for index, scale in enumerate((2.0, 3.0)):
        nn.init.constant_(network.norm.weight, scale)
        keeper.keep(index, network)
    assert keeper.before(0) == {}
    assert keeper.before(1)["norm.weight"].tolist() == [2.0] * 4
    assert keeper.before(5)["norm.weight"].tolist() == [3.0] * 4
    sent = {"conv.weight": torch.zeros(4, 3, 1, 1), "conv.bias": torch.ones(4)}
    adapter = replace(first_student(smoke_plan.student, smoke_plan.data), tensors=sent)
    made = shared_student(adapter, plan, keeper.before(2))
    assert made.norm.weight.tolist() == [3.0] * 4
    assert made.conv.bias.tolist() == [1.0] * 4
    other = replace(plan, seed=plan.seed + 1)
    assert NormKeeper(tmp_path, other).before(2) == {}


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_what_is_no_whole_student_is_refused(change: str, smoke_plan: RunPlan) -> None:
    first = first_student(smoke_plan.student, smoke_plan.data)
    tensors = dict(first.tensors)
    if change == "missing":
        del tensors["head.bias"]
    elif change == "extra":
        tensors["head.scale"] = torch.ones(1)
    else:
        tensors["head.bias"] = torch.ones(7)
    with pytest.raises(ArtefactError, match="what was sent"):
        shared_student(replace(first, tensors=tensors), smoke_plan, {})


class TestWithFakeSites:
    """The server's side, without a network."""

    @pytest.fixture(autouse=True)
    def fakes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        consortium.fake_models.__wrapped__(monkeypatch)  # type: ignore[attr-defined]

    def recipe(self):
        settings = consortium.recipe()
        student = replace(settings.student, scope=StudentScope.federated, rounds=2, steps=9)
        return replace(settings, student=student)

    def test_a_broken_student_is_rejected_and_its_site_told(self, tmp_path: Path) -> None:
        behaviour = {"b": {"shared_student:0": "extra"}, "c": {"shared_student:1": "raise"}}
        hospitals = consortium.Consortium(tmp_path, self.recipe(), behaviour)
        outcome = hospitals.go()
        assert consortium.rejected(outcome, "shared_student", 0) == {"b": "an extra tensor"}
        assert consortium.answered(outcome, "shared_student", 1) == ["a", "b"]
        assert "shared_student:1 shared_student, round 1" in (tmp_path / "sites/b/notices.txt").read_text()

    def test_every_site_is_sent_home_with_the_mean(self, tmp_path: Path) -> None:
        outcome = consortium.Consortium(tmp_path, self.recipe()).go()
        assert {note.sha256 for note in outcome.notes.values()} == {outcome.student_sha256}

    def test_the_preset_is_no_teachers(self) -> None:
        from common.tuning.presets import PRESETS

        assert SHARED_STUDENT not in PRESETS
