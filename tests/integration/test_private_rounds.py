"""Private rounds at a site: booked before a gradient, committed as they leave, refused by policy unopened."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import client.guard
import client.rounds
from client.account import MECHANISM, Account
from client.dp.randomness import SeededRandomness
from client.egress import Egress, EgressRefusal, Noised
from client.faults import FAULT_LOG
from client.private_adaptation import learning_rate, private_step
from client.site import Site
from common.adapter import AdapterUpdate
from common.config import load_recipe, save_site
from common.errors import BudgetExceeded, PolicyRefusal
from common.metrics import METRICS
from common.plan import RunPlan, Stage, TensorSpec
from common.precision import pack
from common.privacy.bundle import read_bundle
from common.privacy.entries import EntryType
from common.privacy.journal import HEAD, LEDGER
from common.privacy.keys import public_key
from common.privacy.verify import Evidence, verify
from common.recipe import Consent, SiteFile
from common.teacher import resident_teacher
from server.planning import build_plan
from simulations.privacy_exam.hospital import (
    DECLARED,
    SETTINGS,
    Office,
    agreed,
    ask,
    entries,
    forget_images,
    make_home,
    order,
    private_plan,
    start,
)
from simulations.privacy_record import privacy_entry


@pytest.fixture(scope="module")
def plan() -> RunPlan:
    return private_plan()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_home(tmp_path)


def receipts(home: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home / "receipts.jsonl").read_text().splitlines()]


# --- what leaves, and what is booked ------------------------------------------------------------------


def test_a_private_round_is_reserved_then_committed_and_its_record_holds(home: Path, plan: RunPlan) -> None:
    guard = agreed(home, plan)
    for index in range(plan.rounds):
        update = guard.adapt(order(plan, Stage.adapt, index), start(plan))
        assert update.mechanism == MECHANISM
        assert update.weight == DECLARED
        assert all(loss != loss for loss in update.losses), "no loss leaves"
        committed = entries(home, EntryType.commit)[-1].payload[0]
        size = sum(tensor.nbytes for tensor in update.adapter.tensors.values())
        assert (committed.sha256, committed.bytes) == (update.adapter.digest, size)
    kinds = [str(entry.type) for entry in entries(home)]
    assert kinds == ["GENESIS", "AUDIT", "PLAN", "CHECKPOINT", "RESERVE", "COMMIT", "RESERVE", "COMMIT"]
    reserved = entries(home, EntryType.reserve)
    assert [entry.events for entry in reserved] == [[[1.5, 0.5, 1]]] * plan.rounds
    assert [entry.cohort.classes for entry in reserved] == [{"c0": DECLARED}] * plan.rounds
    epsilons = [line["epsilon_after"] for line in receipts(home) if line["mechanism"] == MECHANISM]
    assert epsilons == [entry.epsilon_after["1e-05"] for entry in reserved]
    assert epsilons[0] < epsilons[1]
    assert verify(read_bundle(home), Evidence()).faults == []


@pytest.mark.parametrize("own_process", [True, False])
def test_a_guard_books_whether_it_is_a_process_of_its_own(
    home: Path, plan: RunPlan, own_process: bool
) -> None:
    guard = client.guard.Guard(replace(Site.open(home), consent=Consent.policy), own_process)
    assert guard.propose(plan, order(plan, Stage.propose)).agrees
    (booked,) = entries(home, EntryType.plan)
    assert booked.detail.get("own_process", False) is own_process
    assert verify(read_bundle(home), Evidence()).faults == []


def test_what_leaves_is_minus_the_rate_times_what_the_mechanism_made(home: Path, plan: RunPlan) -> None:
    """By a seeded source: the update, unpacked, is the noised gradient that the same seed gives again."""
    from client.dp.mechanism import Execution, PrivateGradient
    from client.dp.tasks import segmentation_task

    site, account = Site.open(home), Account(Site.open(home), plan)
    account.check()
    account.begin()
    train = [p for p in site.patients(plan.data, plan.seed) if p.split == "train"]
    teacher, adapter = resident_teacher(plan.teacher, plan.data), start(plan)
    paid = account.reserve(train)
    made = private_step(teacher, adapter, train, plan, (1, paid, None), SeededRandomness(7))
    assert not made.guaranteed, "noise from a seed guarantees nothing"
    with teacher.visit(adapter, train=True) as network:
        task = segmentation_task(network, adapter, train, plan, None)
        trained = teacher.slots.trainable()
        oracle = PrivateGradient(task, trained, paid.terms, SeededRandomness(7), Execution()).step(0)
    packed = pack(made.step, plan.aggregation.wire_dtype).tensors
    assert set(packed) == {tensor.name for tensor in plan.variants[0].payload(0).tensors}
    rate = learning_rate(plan, 1)
    assert rate == pytest.approx(plan.privacy.learning_rate * 0.55)
    for name, gradient in oracle.items():
        assert torch.equal(packed[name], (-rate * gradient).to(torch.bfloat16)), name


def test_noise_from_a_seed_does_not_leave(home: Path, plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = agreed(home, plan)

    def seeded(*arguments: Any) -> Any:
        return private_step(*arguments, SeededRandomness(1))

    monkeypatch.setattr(client.rounds, "private_step", seeded)
    with pytest.raises(EgressRefusal, match="no noised step"):
        guard.adapt(order(plan, Stage.adapt), start(plan))
    assert len(entries(home, EntryType.reserve)) == 1, "and it is spent"
    assert not [line for line in receipts(home) if line["stage"] == "adapt"]


def test_an_update_without_its_reservation_stays(home: Path, plan: RunPlan) -> None:
    site = Site.open(home)
    account = Account(site, plan)
    account.check()
    step = pack(start(plan).trained(), plan.aggregation.wire_dtype)
    bare = AdapterUpdate(step, 3.0, start(plan).digest, MECHANISM)
    with pytest.raises(EgressRefusal, match="no noised step with a reservation"):
        Egress("east", home, plan, account=account).release_update(Stage.adapt, 0, bare)
    with pytest.raises(EgressRefusal, match="whose data"):
        Egress("east", home, plan, account=account).release_numbers(Stage.propose, 0, "answer", {"site": "x"})
    assert not (home / "receipts.jsonl").exists()


def test_a_tensor_that_no_step_made_stays(home: Path, plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the plan lists it: what the mechanism trained decides."""
    guard = agreed(home, plan)
    monkeypatch.setattr(client.guard, "Noised", lambda paid, names: Noised(paid, names - {min(names)}))
    with pytest.raises(PolicyRefusal, match="not made by the private mechanism") as caught:
        guard.adapt(order(plan, Stage.adapt), start(plan))
    assert caught.value.field == "payload.outbound"


class Killed(BaseException):
    """Ends a process between two lines, for all that the ledger can tell."""


def test_a_kill_between_reserve_and_commit_is_spent_and_the_run_goes_on(
    home: Path, plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    spare = replace(plan, privacy=replace(plan.privacy, spare_steps=1))
    guard = agreed(home, spare)
    with monkeypatch.context() as patch:
        patch.setattr(client.rounds, "private_step", raiser)
        with pytest.raises(Killed):
            guard.adapt(order(spare, Stage.adapt), start(spare))
    guard = agreed(home, spare)  # another process: it is asked again
    for index in range(spare.rounds):
        guard.adapt(order(spare, Stage.adapt, index), start(spare))
    assert len(entries(home, EntryType.reserve)) == spare.rounds + 1
    assert len(entries(home, EntryType.void_counted)) == 1
    assert verify(read_bundle(home), Evidence()).faults == []
    with pytest.raises(BudgetExceeded, match="are spent"):  # a further round was never paid for
        guard.adapt(order(spare, Stage.adapt, 2), start(spare))
    assert len(entries(home, EntryType.commit)) == spare.rounds


def raiser(*_: Any) -> None:
    raise Killed


def test_a_release_without_noise_ends_the_guarantee_for_good(home: Path, plan: RunPlan) -> None:
    site, account = Site.open(home), Account(Site.open(home), plan)
    account.check()
    account.export(Stage.style, site.patients(plan.data, plan.seed))
    account = Account(site, plan)
    account.check()
    account.begin()
    assert account.reserve(site.patients(plan.data, plan.seed)).epsilon is None


def test_the_report_claims_a_guarantee_only_where_nothing_else_left(home: Path, plan: RunPlan) -> None:
    """The same rounds, and in the second run a style summary beside them."""
    guard = agreed(home, plan)
    guard.adapt(order(plan, Stage.adapt), start(plan))
    alone = privacy_entry(guard.site, plan)
    assert (alone.guarantee, alone.delta, alone.unit) == (True, 1e-5, "patient")
    assert alone.epsilon == pytest.approx(entries(home)[-1].epsilon_after["1e-05"], abs=1e-5)
    assert alone.ledger_head == entries(home)[-1].hash
    assert [stage.mechanism for stage in alone.stages] == ["public", "dp_sgd", "public"]
    styled = build_plan(load_recipe("smoke", [*SETTINGS[:4], "baselines=[]"]), "styled-run")
    guard = agreed(home, styled)
    guard.style(order(styled, Stage.style))
    bare = privacy_entry(guard.site, styled)
    assert (bare.guarantee, bare.epsilon, bare.delta) == (False, None, None)
    open_stages = {stage.stage for stage in bare.stages if stage.mechanism == "none"}
    assert open_stages == {"style", "student", "evaluate"}
    assert privacy_entry(guard.site, plan).guarantee is False, "nor for what they gave before"

    assert verify(read_bundle(home), Evidence()).faults == []


# --- the officer's policy -----------------------------------------------------------------------------


def test_under_a_signed_policy_a_run_is_booked_with_it_and_verified(home: Path, plan: RunPlan) -> None:
    office = Office(home, plan)
    policy = office.sign()
    guard = agreed(home, plan)
    guard.adapt(order(plan, Stage.adapt), start(plan))
    assert {entry.policy_sha256 for entry in entries(home, EntryType.reserve)} == {policy.digest}
    assert len(entries(home, EntryType.policy)) == 1
    found = verify(read_bundle(home), Evidence(public_key(office.key)))
    assert found.faults == []
    assert found.facts["egress"]["without_mechanism"] == 0


def more_epsilon(office: Office) -> RunPlan:
    office.sign(max_epsilon_per_run=0.5)
    return office.plan


def total_spent(office: Office) -> RunPlan:
    office.sign(max_epsilon_total=0.5)
    return office.plan


def another_base(office: Office) -> RunPlan:
    policy = office.sign()
    office.sign(payload=json.loads(policy.text())["payload"] | {"base_model_sha256": ["ee" * 32]})
    return office.plan


def unknown_code(office: Office) -> RunPlan:
    office.sign()
    return replace(office.plan, code_sha256="c0" * 32)


def expired(office: Office) -> RunPlan:
    office.sign(expires=(datetime.now(UTC) - timedelta(hours=1)).isoformat())
    return office.plan


def another_officer(office: Office) -> RunPlan:
    office.sign()
    (office.home / "officer.pub").write_text(public_key(Ed25519PrivateKey.generate()))
    return office.plan


def extra_tensor(office: Office) -> RunPlan:
    office.sign()
    own = office.plan.variants[0]
    payload = own.payload(0)
    more = replace(payload, tensors=[*payload.tensors, TensorSpec("encoder.embedding", [8], "bfloat16")])
    return replace(office.plan, variants=[replace(own, payloads=[more])])


def metrics_leave(office: Office) -> RunPlan:
    office.sign()
    stages = [*office.plan.stages, Stage.evaluate]
    assert METRICS
    return replace(office.plan, stages=stages, privacy=replace(office.plan.privacy, release_metrics=True))


def rolled_back(office: Office) -> RunPlan:
    office.sign()
    lines = (office.home / LEDGER).read_bytes()
    agreed(office.home, office.plan)
    (office.home / LEDGER).write_bytes(lines)
    assert (office.home / HEAD).exists()
    return replace(office.plan, run_id="the next run")


_recording: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _recording is not None:
        _recording.append(str(arguments[0]))


sys.addaudithook(_audit)  # of the interpreter: no way of opening a file goes round it


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """The paths of all files that are opened meanwhile."""
    global _recording
    _recording = found = []
    try:
        yield found
    finally:
        _recording = None


REFUSED: list[tuple[Callable[[Office], RunPlan], str, str]] = [
    (more_epsilon, "REFUSED_POLICY", "max_epsilon_per_run"),
    (total_spent, "REFUSED_BUDGET", ""),
    (another_base, "REFUSED_POLICY", "payload.base_model_sha256"),
    (unknown_code, "REFUSED_POLICY", "code.allowed_fab_sha256"),
    (expired, "REFUSED_POLICY", "expires"),
    (another_officer, "REFUSED_POLICY", "officer"),
    (extra_tensor, "REFUSED_POLICY", "payload.outbound"),
    (metrics_leave, "REFUSED_POLICY", "stages.student"),
    (rolled_back, "REFUSED_LEDGER", ""),
]


@pytest.mark.parametrize(("wrong", "code", "field"), REFUSED, ids=[case[0].__name__ for case in REFUSED])
def test_a_plan_against_the_policy_is_refused_before_any_data_file_is_opened(
    home: Path,
    plan: RunPlan,
    monkeypatch: pytest.MonkeyPatch,
    wrong: Callable[[Office], RunPlan],
    code: str,
    field: str,
) -> None:
    asked = wrong(Office(home, plan))
    forget_images()
    monkeypatch.setattr(Site, "patients", lambda *_: pytest.fail("data were asked for"))
    with opened_files() as opened:
        answer = ask(home, asked)
    assert (answer.agrees, answer.code, answer.field) == (False, code, field)
    assert str(home / "policy.json") in opened, "the hook sees what is opened"
    assert not any((home / "data") in Path(name).parents for name in opened)
    assert f"propose refused, {code}" in (home / FAULT_LOG).read_text(), "the site's own people read why"
    if code != "REFUSED_LEDGER" and field != "officer":  # whose policy is unknown has no plan to book
        booked = entries(home, EntryType.refuse)[-1].detail
        assert (booked["code"], booked["field"]) == (code, field)


def test_a_policy_that_runs_out_between_rounds_stops_them(home: Path, plan: RunPlan) -> None:
    office = Office(home, plan)
    office.sign()
    guard = agreed(home, plan)
    guard.adapt(order(plan, Stage.adapt), start(plan))
    office.sign(expires=(datetime.now(UTC) - timedelta(minutes=1)).isoformat())
    with pytest.raises(PolicyRefusal) as caught:
        guard.adapt(order(plan, Stage.adapt, 1), start(plan))
    assert caught.value.field == "expires"
    assert len(entries(home, EntryType.reserve)) == 1


def test_a_policy_without_a_known_officer_is_refused(home: Path, plan: RunPlan) -> None:
    Office(home, plan).sign()
    save_site(SiteFile("east", patients=DECLARED), home / "site.yaml")
    answer = ask(home, plan)
    assert (answer.agrees, answer.code, answer.field) == (False, "REFUSED_POLICY", "officer")


def test_a_site_that_declares_no_patients_takes_no_part_in_a_private_run(home: Path, plan: RunPlan) -> None:
    save_site(SiteFile("east"), home / "site.yaml")
    answer = ask(home, plan)
    assert (answer.agrees, answer.code, answer.field) == (False, "REFUSED_POLICY", "patients")
