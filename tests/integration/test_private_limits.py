"""What a private run may publish, send and be sent, by the officer's policy; and that counts stay secret."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

import client.measuring as measuring
import client.site as site_module
from client.egress import EgressRefusal
from client.faults import border_answer
from client.guard import Guard
from client.publishing import KEPT, LOST
from client.site import Site
from common.adapter import Adapter
from common.canonical import canonical_json
from common.config import load_recipe, save_site
from common.errors import DataError, PolicyRefusal
from common.guard_api import SiteMetrics
from common.plan import Round, RunPlan, Stage
from common.privacy.accounting import epsilon
from common.privacy.budget import Caps
from common.privacy.bundle import read_bundle
from common.privacy.entries import EntryType
from common.privacy.events import Event, Mechanism
from common.privacy.keys import public_key
from common.privacy.ledger import Ledger
from common.privacy.verify import Evidence, verify
from common.recipe import SiteFile
from server.planning import build_plan
from simulations.phantoms import write_site
from simulations.privacy_record import privacy_entry
from tests.integration import test_private_rounds as rounds
from tests.integration.test_private_rounds import (
    Office,
    agreed,
    entries,
    opened_files,
    order,
    receipts,
    start,
)
from wardround import main

PRIVATE = ("teacher.adapter=decoder", "privacy.noise_multiplier=1.5", "privacy.steps=2", "baselines=[]",
           "privacy.sample_rate=0.5", "generator.scope=none", "student.steps=1")  # fmt: skip
EACH = 0.25  # epsilon of a published number
TESTED = 200  # patients, as the site declares: 3 train and 3 test
SILENT = ("privacy.release_metrics=false",)
NOISED = (f"privacy.metric_epsilon={EACH}",)


def planned(*overrides: str) -> RunPlan:
    return build_plan(load_recipe("smoke", [*PRIVATE, *overrides]), "limits")


@pytest.fixture(scope="module")
def silent() -> RunPlan:
    return planned(*SILENT)


@pytest.fixture(scope="module")
def noised() -> RunPlan:
    return planned(*NOISED)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return site_folder(tmp_path / "east")


def site_folder(home: Path, **said: Any) -> Path:
    """A site of three patients who train and three who test, and what it says of itself."""
    recipe = load_recipe("smoke", [*PRIVATE, *SILENT])
    phantom = recipe.sites[0].phantom
    assert phantom is not None
    write_site(phantom, home / "data", 0, "east")
    save_site(declared(**said), home / "site.yaml")
    Ledger.create(home, "east", Caps(1e-5))
    return home


def declared(**said: Any) -> SiteFile:
    usual = {"patients": rounds.DECLARED, "test_patients": TESTED, "policy": load_recipe("smoke").policy}
    return SiteFile("east", **(usual | said))


def answered(answer: Any) -> dict[str, Any]:
    """What a site says, but for the head of its ledger, whose keys and times are its own."""
    return {name: value for name, value in asdict(answer).items() if name != "ledger_head"}


def publish(guard: Guard, plan: RunPlan) -> SiteMetrics:
    return guard.evaluate(order(plan, Stage.evaluate), start(plan))


# --- numbers with noise -------------------------------------------------------------------------------


def test_numbers_are_booked_before_they_are_measured_and_leave_with_noise(
    home: Path, noised: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = agreed(home, noised)
    for index in range(noised.rounds):
        guard.adapt(order(noised, Stage.adapt, index), start(noised))
    booked: list[int] = []
    real = measuring.noised_metrics

    def measured(*arguments: Any) -> Any:
        booked.append(len(entries(home, EntryType.metric)))
        return real(*arguments)

    monkeypatch.setattr(measuring, "noised_metrics", measured)
    answer = publish(guard, noised)
    assert booked == [1]
    assert answer.counts is None, "how many patients there are is not told"
    [cell] = answer.metrics
    assert (cell.model, cell.metric, cell.patients, cell.ci95) == ("teacher", "dice", TESTED, None)
    assert cell.noise_scale == pytest.approx(1 / (EACH * TESTED))
    [entry] = entries(home, EntryType.metric)
    assert entry.events == [[1 / EACH, 1.0, 1]]
    assert list(entry.cohort.classes.values()) == [3], "the patients of the test split, and nobody else"
    line = receipts(home)[-1]
    assert (line["name"], line["mechanism"]) == ("metrics", "laplace")
    assert line["epsilon_after"] == entry.epsilon_after["1e-05"]
    found = verify(read_bundle(home), Evidence())
    assert found.faults == []
    assert found.facts["published"] == {"limits": 1}


def test_the_reports_epsilon_is_that_of_the_patients_who_were_charged_most(
    home: Path, noised: RunPlan
) -> None:
    """Who tests was charged for the numbers, who trains for the steps: nobody for both."""
    guard = agreed(home, noised)
    guard.adapt(order(noised, Stage.adapt), start(noised))
    publish(guard, noised)
    entry = privacy_entry(guard.site, noised)
    assert entry.guarantee
    steps, numbers = Event(1.5, 0.5, 1), Event(1 / EACH, 1.0, 1, Mechanism.laplace)
    assert entry.epsilon == pytest.approx(max(epsilon([steps], 1e-5), epsilon([numbers], 1e-5)), abs=2e-6)
    stage = next(stage for stage in entry.stages if stage.stage == "evaluate")
    assert (stage.mechanism, stage.noise_multiplier, stage.sample_rate, stage.steps) == (
        "laplace", 1 / EACH, 1.0, 1,
    )  # fmt: skip
    assert stage.epsilon == pytest.approx(epsilon([numbers], 1e-5), abs=2e-6)
    student = next(stage for stage in entry.stages if stage.stage == "student")
    assert student.mechanism == "public"


def test_numbers_asked_for_twice_are_the_same_numbers(home: Path, noised: RunPlan) -> None:
    first = publish(agreed(home, noised), noised).metrics
    assert publish(agreed(home, noised), noised).metrics == first
    assert len(entries(home, EntryType.metric)) == 1
    assert verify(read_bundle(home), Evidence()).faults == []


def test_numbers_that_a_crash_took_are_not_measured_again(
    home: Path, noised: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = agreed(home, noised)
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "noised_metrics", rounds.raiser)
        with pytest.raises(rounds.Killed):
            publish(guard, noised)
    [cell] = publish(agreed(home, noised), noised).metrics
    assert (cell.value, cell.reason) == (None, LOST)
    assert len(entries(home, EntryType.metric)) == 1
    assert not (home / KEPT).exists()
    assert verify(read_bundle(home), Evidence()).faults == []


def test_what_nobody_paid_for_does_not_leave_beside_it(
    home: Path, noised: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard, real = agreed(home, noised), measuring.noised_metrics

    def generous(*arguments: Any) -> Any:
        [cell] = real(*arguments)
        return [cell, replace(cell, class_name="another", noise_scale=None, ci95=(0.0, 1.0))]

    monkeypatch.setattr(measuring, "noised_metrics", generous)
    with pytest.raises(EgressRefusal) as caught:
        publish(guard, noised)
    assert len(caught.value.faults) == 3, caught.value.faults
    assert receipts(home)[-1]["name"] == "answer"


# --- what the policy says to a plan ---------------------------------------------------------------------


def with_metrics(office: Office, cap: float = 50.0, **changes: Any) -> None:
    """A policy that allows exactly the numbers of the plan, but for ``changes``."""
    save_site(declared(officer_key="officer.pub"), office.home / "site.yaml")
    stages = json.loads(office.sign().text())["stages"] | {"evaluate": "dp_required"}
    rules = {"per_site": True, "min_patients": TESTED, "epsilon_each": EACH, "allowed": ["mean_dice"]}
    office.sign(stages=stages, metrics=rules | changes, max_epsilon_per_run=cap)


def test_a_policy_that_allows_the_numbers_lets_them_leave(home: Path, noised: RunPlan) -> None:
    office = Office(home, noised)
    with_metrics(office)
    publish(agreed(home, noised), noised)
    assert verify(read_bundle(home), Evidence(public_key(office.key))).faults == []


def other_numbers(office: Office) -> RunPlan:
    with_metrics(office, allowed=["hd95"])
    return office.plan


def not_of_one_site(office: Office) -> RunPlan:
    with_metrics(office, per_site=False)
    return office.plan


def dearer_numbers(office: Office) -> RunPlan:
    with_metrics(office, epsilon_each=EACH * 0.9)
    return office.plan


def fewer_patients(office: Office) -> RunPlan:
    with_metrics(office, min_patients=TESTED + 1)
    return office.plan


def numbers_without_noise(office: Office) -> RunPlan:
    with_metrics(office, allowed=["dice", "hd95", "nsd"])
    return replace(office.plan, privacy=replace(office.plan.privacy, metric_epsilon=None))


def numbers_over_the_cap(office: Office) -> RunPlan:
    with_metrics(office, cap=4.0, epsilon_each=5.0)
    return replace(office.plan, privacy=replace(office.plan.privacy, metric_epsilon=5.0))


def no_test_patients(office: Office) -> RunPlan:
    with_metrics(office)
    save_site(declared(officer_key="officer.pub", test_patients=None), office.home / "site.yaml")
    return office.plan


def a_small_cell(office: Office) -> RunPlan:
    with_metrics(office)
    strict = replace(load_recipe("smoke").policy, min_cell_patients=TESTED + 1)
    save_site(declared(officer_key="officer.pub", policy=strict), office.home / "site.yaml")
    return office.plan


def too_few_declared(office: Office) -> RunPlan:
    with_metrics(office)
    save_site(declared(officer_key="officer.pub", patients=1), office.home / "site.yaml")
    return office.plan


REFUSED: list[tuple[Callable[[Office], RunPlan], str]] = [
    (other_numbers, "metrics.allowed"),
    (not_of_one_site, "metrics.per_site"),
    (dearer_numbers, "metrics.epsilon_each"),
    (fewer_patients, "metrics.min_patients"),
    (numbers_without_noise, "stages.student"),
    (numbers_over_the_cap, "max_epsilon_per_run"),
    (no_test_patients, "test_patients"),
    (a_small_cell, "min_cell_patients"),
    (too_few_declared, "patients"),
]


@pytest.mark.parametrize(("wrong", "field"), REFUSED, ids=[case[0].__name__ for case in REFUSED])
def test_numbers_against_the_policy_are_refused_before_any_data_file_is_opened(
    home: Path,
    noised: RunPlan,
    monkeypatch: pytest.MonkeyPatch,
    wrong: Callable[[Office], RunPlan],
    field: str,
) -> None:
    asked = wrong(Office(home, noised))
    site_module._patients.cache_clear()
    monkeypatch.setattr(Site, "patients", lambda *_: pytest.fail("data were asked for"))
    with opened_files() as opened:
        answer = Guard(Site.open(home)).propose(asked, order(asked, Stage.propose))
    assert (answer.agrees, answer.code, answer.field) == (False, "REFUSED_POLICY", field)
    assert not any((home / "data") in Path(name).parents for name in opened)


# --- tensors that come and go ---------------------------------------------------------------------------


def extra(sent: Adapter) -> dict[str, torch.Tensor]:
    return {"encoder.patch.weight": torch.zeros(2, dtype=torch.bfloat16)}


def other_dtype(sent: Adapter) -> dict[str, torch.Tensor]:
    return {"decoder.head.bias": sent.tensors["decoder.head.bias"].double()}


def too_large(sent: Adapter) -> dict[str, torch.Tensor]:
    return {"decoder.head.weight": torch.zeros(3 << 20)}


def too_long(sent: Adapter) -> dict[str, torch.Tensor]:
    return {"decoder.head.bias": torch.full((1,), 1001.0)}


def not_a_number(sent: Adapter) -> dict[str, torch.Tensor]:
    return {"decoder.head.bias": torch.full((1,), float("nan"))}


CHANGES = [extra, other_dtype, too_large, too_long, not_a_number]
SENT = [*((Stage.adapt, change) for change in CHANGES), (Stage.student, extra), (Stage.evaluate, extra)]


@pytest.mark.parametrize(("stage", "change"), SENT, ids=[f"{stage}-{one.__name__}" for stage, one in SENT])
def test_a_tensor_that_the_policy_does_not_list_is_refused_before_any_data_file_is_opened(
    home: Path,
    silent: RunPlan,
    monkeypatch: pytest.MonkeyPatch,
    stage: Stage,
    change: Callable[[Adapter], dict[str, torch.Tensor]],
) -> None:
    Office(home, silent).sign()
    guard, sent = agreed(home, silent), start(silent)
    sent = replace(sent, tensors={**sent.tensors, **change(sent)})
    monkeypatch.setattr(Site, "patients", lambda *_: pytest.fail("data were asked for"))
    verbs: dict[Stage, Callable[[Round], object]] = {
        Stage.adapt: lambda told: guard.adapt(told, sent),
        Stage.student: lambda told: guard.train_student(told, sent, {}, None),
        Stage.evaluate: lambda told: guard.evaluate(told, sent),
    }
    with opened_files() as opened, pytest.raises(PolicyRefusal) as caught:
        verbs[stage](order(silent, stage))
    assert caught.value.field == "payload.inbound"
    assert len(caught.value.faults) == 1
    assert not any((home / "data") in Path(name).parents for name in opened)
    assert entries(home, EntryType.reserve) == []


def test_a_step_longer_than_the_policy_allows_stays_and_is_spent(home: Path, silent: RunPlan) -> None:
    office = Office(home, silent)
    payload = json.loads(office.sign().text())["payload"]
    payload["outbound"] = [rule | {"max_l2": 0.5} for rule in payload["outbound"]]
    office.sign(payload=payload)
    guard = agreed(home, silent)
    with pytest.raises(EgressRefusal, match="no rule of the policy lists it") as caught:
        guard.adapt(order(silent, Stage.adapt), start(silent))
    assert border_answer(caught.value) == ("REFUSED_LOCAL", "")
    assert len(entries(home, EntryType.reserve)) == 1
    assert not [line for line in receipts(home) if line["stage"] == "adapt"]


def test_a_policy_made_by_the_command_serves_a_private_run(
    home: Path, silent: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draft, opened up where a run needs it; its payload rules are left as they are."""
    monkeypatch.chdir(home)
    save_site(declared(patients=40, officer_key="officer.key.pub"), home / "site.yaml")

    def command(text: str) -> None:
        done = CliRunner().invoke(main, ["privacy", *text.split()])
        assert done.exit_code == 0, done.output

    command("key officer.key")
    command("policy new east --officer Ruiz --officer-key officer.key.pub --out draft.yaml")
    draft = yaml.safe_load(Path("draft.yaml").read_text())
    draft["stages"] |= {"adapt": "dp_required", "student": "local_only"}
    draft["payload"]["base_model_sha256"] = list(silent.models.values())
    draft["federation"] |= {"min_sites": 2, "allowed_sites": silent.sites, "max_rounds": 2,
                            "require_secure_aggregation": False}  # fmt: skip
    draft["code"]["allowed_fab_sha256"] = [silent.code_sha256]
    Path("draft.yaml").write_text(yaml.safe_dump(draft))
    command("policy sign draft.yaml --key officer.key --out .")
    guard, sent = agreed(home, silent), start(silent)
    for index in range(silent.rounds):
        sent = guard_step(guard, silent, index, sent)
    guard.train_student(order(silent, Stage.student), sent, {}, None)


def guard_step(guard: Guard, plan: RunPlan, index: int, sent: Adapter) -> Adapter:
    from tests.integration.consortium import next_adapter

    return next_adapter(sent, guard.adapt(order(plan, Stage.adapt, index), sent))


# --- how many patients there are ------------------------------------------------------------------------


def leave_only(home: Path, train: int) -> None:
    """The site's manifest with so many patients of the training split, and all others."""
    path = home / "data" / "manifest.csv"
    header, *rows = list(csv.reader(path.read_text().splitlines()))
    split, patient = header.index("split"), header.index("patient")
    kept = sorted({row[patient] for row in rows if row[split] == "train"})[:train]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [header, *(row for row in rows if row[split] != "train" or row[patient] in kept)]
        )
    site_module._patients.cache_clear()


def test_a_site_with_fewer_patients_than_the_plan_wants_goes_on_and_answers_the_same(
    tmp_path: Path, noised: RunPlan
) -> None:
    """The number that the plan wants is held against the declared one; who is there is nobody's business."""
    few, whole = site_folder(tmp_path / "few" / "east"), site_folder(tmp_path / "whole" / "east")
    leave_only(few, 0)
    assert noised.data.min_patients == 2
    said = []
    for home in (few, whole):
        guard, sent = agreed(home, noised), start(noised)
        update = guard.adapt(order(noised, Stage.adapt), sent)
        note = guard.train_student(order(noised, Stage.student), sent, {}, None)
        told = publish(guard, noised).metrics[0]
        shapes = {name: list(tensor.shape) for name, tensor in update.adapter.tensors.items()}
        note = replace(note, latency_ms=0, teacher_latency_ms=0)
        said.append([shapes, update.weight, update.mechanism, answered(note), replace(told, value=None)])
        assert len(entries(home, EntryType.reserve)) == 1
        assert verify(read_bundle(home), Evidence()).faults == []
    assert said[0] == said[1]


def spent_out(office: Office) -> RunPlan:
    office.sign(max_epsilon_total=0.5)
    return office.plan


@pytest.mark.parametrize("wrong", [spent_out, numbers_without_noise, fewer_patients, too_few_declared, None])
def test_the_answers_of_two_neighbouring_data_sets_are_byte_identical(
    tmp_path: Path, noised: RunPlan, wrong: Callable[[Office], RunPlan] | None
) -> None:
    """Two patients who train, which is the plan's least, or one: agreed or refused, nobody can tell."""
    said = []
    for train in (2, 1):
        home = site_folder(tmp_path / str(train) / "east")
        leave_only(home, train)
        asked = noised if wrong is None else wrong(Office(home, noised))
        answer = Guard(Site.open(home)).propose(asked, order(asked, Stage.propose))
        assert answer.agrees is (wrong is None)
        said.append(canonical_json(answered(answer)))
    assert said[0] == said[1]


def test_who_trains_and_who_tests_is_not_dealt_in_a_private_run(home: Path, silent: RunPlan) -> None:
    """A patient more would make others change sides, and so change more than one patient's part."""
    path = home / "data" / "manifest.csv"
    rows = list(csv.reader(path.read_text().splitlines()))
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(row[:-1] for row in rows)
    assert rows[0][-1] == "split"
    with pytest.raises(DataError, match="wants a split column"):
        Guard(Site.open(home)).propose(silent, order(silent, Stage.propose))
