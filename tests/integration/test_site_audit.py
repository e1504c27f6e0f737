"""A site shows before its first reservation that its build is right, and audits itself after a run."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from torch import Tensor

import client.account
import client.audit
import client.site as site_module
from client.dp import canaries, dress_rehearsal
from client.dp.mechanism import PrivateGradient
from client.guard import Guard
from client.holdout import HOLDOUT, leave_out, read_coins, with_holdout
from client.membership import Views, subjects_of
from client.patients import Patient, Split
from client.site import Site
from common.adapter import Adapter
from common.canonical import sha256_of_file
from common.config import load_recipe, save_site
from common.errors import ArtefactError, DataError, PolicyRefusal
from common.plan import Round, RunPlan, Stage
from common.precision import unpack
from common.privacy.accounting import epsilon
from common.privacy.budget import Caps
from common.privacy.bundle import read_bundle
from common.privacy.entries import Entry, EntryType
from common.privacy.events import Event
from common.privacy.ledger import Ledger
from common.privacy.membership import Assignment, Claim, Membership, Verdict, judged
from common.privacy.verify import Evidence, verify
from common.recipe import Holdout, SiteFile
from common.teacher import initial_adapter
from server.planning import build_plan
from simulations.phantoms import write_site
from simulations.privacy_exam import audit as exam
from wardround import main

SETTINGS = [
    "teacher.adapter=decoder", "privacy.noise_multiplier=1.5", "privacy.steps=2", "data.image_size=32",
    "privacy.release_metrics=false", "generator.scope=none", "baselines=[]",
]  # fmt: skip
PATIENTS = 12
UNREHEARSED = "no rehearsal passed before the first reservation"


@pytest.fixture(scope="module")
def plan() -> RunPlan:
    return build_plan(load_recipe("smoke", SETTINGS), "audited-run")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``run/sites/east``, whose coins put every other patient into training."""
    flips = itertools.cycle([1, 0])
    monkeypatch.setattr("client.holdout.secrets.randbits", lambda _: next(flips))
    phantom = load_recipe("smoke", SETTINGS).sites[0].phantom
    assert phantom is not None
    small = replace(phantom, train_patients=PATIENTS, images_per_patient=1, image_size=32)
    folder = tmp_path / "run" / "sites" / "east"
    write_site(small, folder / "data", 0, "east")
    save_site(SiteFile("east", patients=PATIENTS // 2, holdout=Holdout.coin), folder / "site.yaml")
    Ledger.create(folder, "east", Caps(1e-5))
    site_module._patients.cache_clear()
    return folder


@pytest.fixture
def small_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dress_rehearsal, "THOROUGH_NOISE", 50_000)
    monkeypatch.setattr(dress_rehearsal, "CANARIES", 100)
    monkeypatch.setattr(canaries, "STEPS_A_WORLD", 60)


def order(plan: RunPlan, stage: Stage, index: int = 0) -> Round:
    return Round(plan.digest, stage, index, 60.0, "nonce")


def agreed(home: Path, plan: RunPlan) -> Guard:
    guard = Guard(Site.open(home))
    answer = guard.propose(plan, order(plan, Stage.propose))
    assert (answer.agrees, answer.code) == (True, "")
    return guard


def start(plan: RunPlan) -> Adapter:
    return initial_adapter(plan.teacher, plan.data, 0)


def entries(home: Path, kind: EntryType | None = None) -> list[Entry]:
    found = Ledger.open(home, Caps(1e-5)).entries
    return found if kind is None else [entry for entry in found if entry.type is kind]


def finished(home: Path, plan: RunPlan) -> Path:
    """A run of all rounds with this one site; returns the run's folder."""
    guard, adapter = agreed(home, plan), start(plan)
    for index in range(plan.rounds):
        update = guard.adapt(order(plan, Stage.adapt, index), adapter)
        adapter = replace(adapter, tensors=adapter.advanced(unpack(update.adapter)).tensors)
    run = home.parent.parent
    (run / "teacher").mkdir(exist_ok=True)
    adapter.save(run / "teacher" / "adapter.safetensors")
    (run / "teacher" / "card.json").write_text(json.dumps({"run_id": plan.run_id}))
    return run


def audit(home: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["privacy", "audit", str(home), *options])


# --- before the first reservation ---------------------------------------------------------------------


def test_a_rehearsal_is_booked_before_the_first_reservation(home: Path, plan: RunPlan) -> None:
    guard = agreed(home, plan)
    guard.adapt(order(plan, Stage.adapt), start(plan))
    kinds = [str(entry.type) for entry in entries(home)]
    assert kinds == ["GENESIS", "AUDIT", "PLAN", "CHECKPOINT", "RESERVE", "COMMIT"]
    detail = entries(home, EntryType.audit)[0].detail
    assert (detail["kind"], detail["passed"]) == ("rehearsal", True)
    assert detail["sha256"] == sha256_of_file(home / detail["file"])
    kept = json.loads((home / "audits" / "rehearsal.json").read_text())
    assert kept["plan"]["noise_multiplier"] == plan.privacy.noise_multiplier
    assert kept["code_sha256"] == detail["code_sha256"]
    found = verify(read_bundle(home), Evidence())
    assert found.faults == []
    assert UNREHEARSED not in found.cautions


def test_the_same_code_is_not_rehearsed_again_and_other_code_is(
    home: Path, plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    agreed(home, plan)
    agreed(home, replace(plan, run_id="the next run"))
    assert len(entries(home, EntryType.audit)) == 1
    monkeypatch.setattr(client.account, "installed_code", lambda: "c0" * 32)
    agreed(home, replace(plan, run_id="after an update"))
    assert len(entries(home, EntryType.audit)) == 2


def with_less_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = PrivateGradient._noised

    def short(self: PrivateGradient, clipped_sum: Tensor) -> Tensor:
        return whole(self, clipped_sum) * 0.9

    monkeypatch.setattr(PrivateGradient, "_noised", short)


def test_a_build_with_ten_percent_less_noise_is_refused_before_data_are_opened(
    home: Path, plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_less_noise(monkeypatch)
    monkeypatch.setattr(Site, "patients", lambda *_: pytest.fail("data were asked for"))
    answer = Guard(Site.open(home)).propose(plan, order(plan, Stage.propose))
    assert (answer.agrees, answer.code, answer.field) == (False, "REFUSED_POLICY", "audit")
    assert [str(entry.type) for entry in entries(home)] == ["GENESIS", "AUDIT", "REFUSE", "CHECKPOINT"]
    assert entries(home, EntryType.audit)[0].detail["passed"] is False
    assert json.loads((home / "audits" / "rehearsal.json").read_text())["noise"]["std"] < 0.95


def test_a_build_that_was_replaced_between_rounds_is_rehearsed_before_the_next_reservation(
    home: Path, plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = agreed(home, plan)
    with_less_noise(monkeypatch)
    monkeypatch.setattr(client.account, "installed_code", lambda: "c0" * 32)
    with pytest.raises(PolicyRefusal) as caught:
        guard.adapt(order(plan, Stage.adapt), start(plan))
    assert caught.value.field == "audit"
    assert entries(home, EntryType.reserve) == []


def test_a_run_without_noise_is_not_rehearsed(home: Path) -> None:
    bare = build_plan(load_recipe("smoke", ["data.image_size=32"]), "bare")
    agreed(home, bare)
    assert entries(home, EntryType.audit) == []


# --- who is left out ----------------------------------------------------------------------------------


def test_a_coin_is_thrown_once_for_each_labelled_training_patient(
    tmp_path: Path, patients: list[Patient]
) -> None:
    bare = replace(patients[0], id="bare", samples=(replace(patients[0].samples[0], mask=None),))
    tested = replace(patients[1], id="tested", split=Split.test)
    everyone = [*(replace(patients[0], id=f"p{number}") for number in range(400)), bare, tested]
    first = leave_out(tmp_path, everyone)
    assert [patient.id for patient in first] == [patient.id for patient in everyone]
    moved = {patient.id for patient in first if patient.split is Split.val}
    assert 140 < len(moved) < 260  # six standard deviations
    coins = read_coins(tmp_path)
    assert moved == {patient for patient, inside in coins.items() if not inside}
    assert set(coins) == {f"p{number}" for number in range(400)}
    more = leave_out(tmp_path, [*everyone, replace(patients[0], id="new")])
    assert [patient.split for patient in more[:-1]] == [patient.split for patient in first]
    assert read_coins(tmp_path) | coins == read_coins(tmp_path)
    (tmp_path / HOLDOUT).write_text('{"p0": 1}')
    with pytest.raises(ArtefactError, match="damaged"):
        leave_out(tmp_path, everyone)


def test_a_simulated_site_declares_half_of_its_patients_where_coins_leave_out() -> None:
    said = SiteFile("east", patients=7)
    assert with_holdout(said, Holdout.none) == said
    assert with_holdout(said, Holdout.coin) == replace(said, patients=3, holdout=Holdout.coin)
    assert with_holdout(replace(said, patients=None), Holdout.coin).patients is None


def test_who_is_left_out_is_in_no_reservation(home: Path, plan: RunPlan) -> None:
    guard = agreed(home, plan)
    guard.adapt(order(plan, Stage.adapt), start(plan))
    assert entries(home, EntryType.reserve)[0].cohort.classes == {"c0": PATIENTS // 2}
    subjects = subjects_of(guard.site, plan)
    assert subjects.assignment is Assignment.by_coin
    assert sum(subjects.inside) == PATIENTS // 2 == len(subjects.patients) - sum(subjects.inside)
    train = {p.id for p in guard.site.patients(plan.data, plan.seed) if p.split is Split.train}
    pairs = zip(subjects.patients, subjects.inside, strict=True)
    assert train == {patient.id for patient, inside in pairs if inside}


def test_without_coins_the_split_decides_and_nobody_left_out_is_refused(
    home: Path, plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site.open(home)
    subjects = subjects_of(replace(site, holdout=Holdout.none), plan)
    assert subjects.assignment is Assignment.by_split
    assert sum(subjects.inside) == PATIENTS
    monkeypatch.setattr("client.holdout.secrets.randbits", lambda _: 1)
    with pytest.raises(DataError, match="and others"):
        subjects_of(site, plan)


# --- after a run --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_audit")
def test_an_audit_is_written_booked_and_verified(home: Path, plan: RunPlan) -> None:
    finished(home, plan)
    result = audit(home)
    assert result.exit_code == 0, result.output
    for words in ("REHEARSAL  passed", "by fair coin: 6 in", "eps >=", "could not have reported more than",
                  "not audited: the student", "booked in the ledger"):  # fmt: skip
        assert words in result.stdout
    kept = json.loads((home / "audits" / "artefact-adapter.json").read_text())
    claimed = epsilon([Event(1.5, 0.5, 2)], 1e-5)
    assert 0 <= kept["upper"] - claimed <= 1e-6
    assert (kept["verdict"], kept["assignment"], kept["members"]) == ("CONSISTENT", "coin", 6)
    assert kept["lower"] <= kept["ceiling"]
    details = [entry.detail for entry in entries(home, EntryType.audit)]
    assert [detail["kind"] for detail in details] == ["rehearsal", "rehearsal", "artefact"]
    assert details[-1]["sha256"] == sha256_of_file(home / "audits" / "artefact-adapter.json")
    assert (details[-1]["upper"], details[-1]["ceiling"]) == (kept["upper"], kept["ceiling"])
    assert verify(read_bundle(home), Evidence()).faults == []
    document = json.loads(audit(home, "--json").stdout)
    assert document["booked"]
    assert document["artefacts"] == [kept]


def leaking(*_: Any) -> Membership:
    coins = [True, False] * 200
    scores = [(float(coin), 0.0) for coin in coins]
    return judged(("adapter", "ab" * 32), scores, coins, Assignment.by_coin, Claim(1.0))


@pytest.mark.usefixtures("small_audit")
def test_a_contradiction_exits_with_22_and_the_record_no_longer_holds(
    home: Path, plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(home, plan)
    monkeypatch.setattr(client.audit, "audit_adapter", leaking)
    result = audit(home)
    assert result.exit_code == 22
    assert "epsilon is at least" in result.stderr
    found = verify(read_bundle(home), Evidence())
    assert any("an audit found more than the claimed epsilon" in fault for fault in found.faults)


@pytest.mark.usefixtures("small_audit")
def test_nothing_is_claimed_after_a_release_without_noise(home: Path, plan: RunPlan) -> None:
    run = finished(home, plan)
    ledger = Ledger.open(home, Caps(1e-5))
    ledger.declare_unprotected(client.audit.Context(), "style", ["p000"])
    found = client.audit.audit_site(Site.open(home), run)
    assert found.artefacts[0].verdict is Verdict.no_claim
    assert client.audit.keep(Site.open(home), found)
    assert verify(read_bundle(home), Evidence()).faults == []


def test_what_is_not_there_or_of_another_run_is_refused(home: Path, plan: RunPlan) -> None:
    assert audit(home).exit_code == 12  # no run yet
    run = finished(home, plan)
    (run / "teacher" / "card.json").write_text('{"run_id": "another"}')
    assert "is of run another" in audit(home).stderr
    assert audit(home, "--run", str(home)).exit_code == 12


def test_scores_are_of_the_crops_that_a_private_run_trains_on(home: Path, plan: RunPlan) -> None:
    from client.dp.tasks import segmentation_task
    from common.teacher import resident_teacher

    members = [p for p in Site.open(home).patients(plan.data, plan.seed) if p.split is Split.train]
    with resident_teacher(plan.teacher, plan.data).visit(start(plan)) as network:
        task = segmentation_task(network, start(plan), members, plan, None)
        views = Views.of(members, plan)
        wanted = task._crops
        found = views.losses(lambda images: network(images).logits)
    assert (views.images == wanted.images).all()
    assert (views.masks == wanted.masks).all()
    assert len(found) == len(members)


@pytest.fixture
def quick_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulations.privacy_exam.planted.NOISED_STEPS", 6)
    monkeypatch.setattr("simulations.privacy_exam.planted.STEPS", 60)


@pytest.mark.usefixtures("quick_training")
def test_a_model_that_remembers_its_patients_contradicts_a_claim_and_a_private_one_does_not() -> None:
    verdict = exam.item_29(1)
    assert verdict.passed, verdict
