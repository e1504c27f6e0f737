"""The ledger: the exam's items 4, 18 to 20, 22 and 23 with few repetitions, and what else it promises."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from common.errors import ArtefactError, BudgetExceeded, DataError, PolicyRefusal
from common.privacy.accounting import epsilon
from common.privacy.budget import Caps
from common.privacy.entries import Context, EntryType, LedgerBroken, Payload
from common.privacy.events import Event, Mechanism
from common.privacy.journal import HEAD, LEDGER
from common.privacy.keys import NEXT_KEY, SIGNING_KEY, create_key
from common.privacy.ledger import Ledger
from common.privacy.members import MEMBERS
from simulations.privacy_exam import ledger as exam

CAPS = Caps(1e-5)
RUN = Context("run", "1" * 64, "2" * 64, "3" * 64)
STEP = [Event(4.0, 1.0, 1)]
PATIENTS = [f"patient-{number}" for number in range(12)]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.create(tmp_path / "site", "harbour", CAPS)


def at(*days: float) -> list[datetime]:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    return [start + timedelta(days=day) for day in days]


def test_restarts_change_no_epsilon() -> None:
    verdict = exam.item_4(2)
    assert verdict.passed, verdict


def test_a_cut_or_restored_ledger_is_refused_by_its_head_or_a_witness() -> None:
    verdict = exam.item_18(2)
    assert verdict.passed, verdict


def test_what_was_computed_is_recorded_wherever_the_site_is_killed() -> None:
    verdict = exam.item_19(8)
    assert verdict.passed, verdict


def test_two_runs_cannot_both_have_the_last_of_the_budget() -> None:
    verdict = exam.item_20(3)
    assert verdict.passed, verdict


def test_a_run_stops_at_the_last_affordable_round() -> None:
    verdict = exam.item_22(1.0)
    assert verdict.passed, verdict


def test_patients_of_two_projects_are_charged_jointly_and_others_are_not() -> None:
    verdict = exam.item_23()
    assert verdict.passed, verdict


def test_each_line_is_an_entry_as_contracted(ledger: Ledger) -> None:
    seq = ledger.reserve(RUN, "adapt", PATIENTS, STEP)
    ledger.commit(seq, [Payload("adapter", "a" * 64, 100)], STEP)
    lines = [json.loads(line) for line in (ledger.folder / LEDGER).read_text().splitlines()]
    wanted = {
        "seq", "prev", "ts", "type", "run_id", "plan_sha256", "policy_sha256", "code_sha256", "cohort",
        "events", "stage", "payload", "epsilon_after", "hash", "sig", "detail",
    }  # fmt: skip
    assert [line["type"] for line in lines] == ["GENESIS", "RESERVE", "COMMIT"]
    assert all(set(line) == wanted for line in lines)
    assert lines[1]["events"] == [[4.0, 1.0, 1]]
    assert lines[2]["prev"] == lines[1]["hash"]
    assert lines[2]["payload"] == [{"name": "adapter", "sha256": "a" * 64, "bytes": 100}]
    assert set(lines[1]["epsilon_after"]) == {"1e-05", "0.001"}
    assert lines[1]["epsilon_after"]["1e-05"] == pytest.approx(epsilon(STEP, 1e-5), rel=1e-3)


def test_no_patient_id_stands_in_any_file(ledger: Ledger) -> None:
    ledger.reserve(RUN, "adapt", PATIENTS, STEP)
    for path in ledger.folder.iterdir():
        assert b"patient-" not in path.read_bytes(), path
    assert ledger.entries[1].cohort.classes == {"c0": 12}


def test_an_abort_stays_spent(ledger: Ledger) -> None:
    seq = ledger.reserve(RUN, "adapt", PATIENTS, STEP)
    before = ledger.epsilon(1e-5)
    assert ledger.open_reservations() == [seq]
    ledger.void(seq, "deadline")
    assert ledger.open_reservations() == []
    assert ledger.epsilon(1e-5) == before > 0
    with pytest.raises(ArtefactError, match="no open reservation"):
        ledger.commit(seq, [], STEP)


def test_more_than_was_reserved_cannot_be_committed(ledger: Ledger) -> None:
    seq = ledger.reserve(RUN, "adapt", PATIENTS, STEP)
    for executed in ([Event(4.0, 1.0, 2)], [Event(3.0, 1.0, 1)]):
        with pytest.raises(ArtefactError, match="more steps"):
            ledger.commit(seq, [], executed)
    ledger.commit(seq, [], [])


def test_a_refusal_is_on_record_and_spends_nothing(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path, "harbour", Caps(1e-5, per_run=2.0))
    ledger.reserve(RUN, "adapt", PATIENTS, STEP)
    with pytest.raises(BudgetExceeded, match="max_epsilon_per_run") as caught:
        ledger.reserve(RUN, "adapt", PATIENTS, STEP * 8)
    assert caught.value.exit_code == 21
    assert "12" not in str(caught.value), "no count of patients"
    assert ledger.entries[-1].type is EntryType.refuse
    booked = ledger.entries[-1].detail
    assert (booked["code"], booked["field"]) == ("REFUSED_BUDGET", "max_epsilon_per_run")
    assert ledger.entries[-1].epsilon_after == ledger.entries[-2].epsilon_after
    ledger.reserve(Context("another run"), "adapt", PATIENTS, STEP)


def test_the_yearly_cap_forgets_after_a_year_and_the_total_never(tmp_path: Path) -> None:
    cap = epsilon(STEP * 2, 1e-5) * 1.01
    now = at(0)
    ledger = Ledger.create(tmp_path, "harbour", Caps(1e-5, per_year=cap), clock=lambda: now[-1])
    for name in "ab":
        ledger.reserve(Context(name), "adapt", PATIENTS, STEP)
    with pytest.raises(BudgetExceeded, match="per_year"):
        ledger.reserve(Context("c"), "adapt", PATIENTS, STEP)
    now += at(366)
    ledger.reserve(Context("d"), "adapt", PATIENTS, STEP)
    assert ledger.epsilon(1e-5) == pytest.approx(epsilon(STEP * 3, 1e-5), rel=1e-3)


def test_a_clock_that_runs_backwards_is_refused(tmp_path: Path) -> None:
    now = at(10, 9)
    Ledger.create(tmp_path, "harbour", CAPS, clock=lambda: now[0])
    ledger = Ledger.open(tmp_path, CAPS, clock=lambda: now[1])
    with pytest.raises(PolicyRefusal) as caught:
        ledger.reserve(RUN, "adapt", PATIENTS, STEP)
    assert caught.value.field == "clock"


def test_an_unprotected_release_removes_the_guarantee_for_good(ledger: Ledger) -> None:
    ledger.declare_unprotected(Context("before"), "export", PATIENTS[:3])
    assert ledger.entries[-1].epsilon_after == {"1e-05": None, "0.001": None}
    with pytest.raises(BudgetExceeded):
        Ledger.open(ledger.folder, Caps(1e-5, total=1e6)).reserve(RUN, "adapt", PATIENTS, STEP)
    Ledger.open(ledger.folder, Caps(1e-5, total=8.0)).reserve(RUN, "adapt", PATIENTS[3:], STEP)


def test_published_numbers_are_charged_as_laplace(ledger: Ledger) -> None:
    metric = [Event(10.0, 1.0, 1, Mechanism.laplace)]
    ledger.charge_metric(RUN, "evaluate", PATIENTS, metric)
    assert ledger.epsilon(1e-5) == pytest.approx(0.1, abs=1e-3)
    assert Ledger.open(ledger.folder, CAPS).entries[-1].spent() == metric


def test_published_numbers_are_committed_without_a_step_each_time_that_they_leave(ledger: Ledger) -> None:
    number = ledger.charge_metric(RUN, "evaluate", PATIENTS, [Event(10.0, 1.0, 1, Mechanism.laplace)])
    with pytest.raises(ArtefactError, match="more steps ran"):
        ledger.commit(number, [], STEP)
    for digest in ("ab" * 32, "cd" * 32):
        ledger.commit(number, [Payload("metrics", digest, 9)], [])
    assert ledger.epsilon(1e-5) == pytest.approx(0.1, abs=1e-3)


def test_a_rolled_key_signs_on_and_a_stranger_does_not(ledger: Ledger) -> None:
    before = (ledger.folder / SIGNING_KEY).read_bytes()
    ledger.roll_key()
    ledger.reserve(RUN, "adapt", PATIENTS, STEP)
    assert len(Ledger.open(ledger.folder, CAPS).entries) == 3
    (ledger.folder / SIGNING_KEY).write_bytes(before)
    with pytest.raises(LedgerBroken, match="not the key"):
        Ledger.open(ledger.folder, CAPS)


def test_a_crash_in_the_middle_of_a_key_roll_is_made_good(ledger: Ledger) -> None:
    old = (ledger.folder / SIGNING_KEY).read_bytes()
    ledger.roll_key()
    (ledger.folder / SIGNING_KEY).replace(ledger.folder / NEXT_KEY)  # as if the last step had not happened
    (ledger.folder / SIGNING_KEY).write_bytes(old)
    Ledger.open(ledger.folder, CAPS).reserve(RUN, "adapt", PATIENTS, STEP)


def test_two_open_ledgers_see_each_others_entries(ledger: Ledger) -> None:
    other = Ledger.open(ledger.folder, CAPS)
    other.reserve(RUN, "adapt", PATIENTS, STEP)
    other.roll_key()
    seq = ledger.reserve(RUN, "adapt", PATIENTS[:5], STEP)
    assert seq == 3
    assert ledger.entries[-1].cohort.parents == {"c1": ["c0"]}


def test_a_torn_last_line_of_a_crash_is_cut_off(ledger: Ledger) -> None:
    ledger.reserve(RUN, "adapt", PATIENTS, STEP)
    with (ledger.folder / LEDGER).open("ab") as file:
        file.write(b'{"code_sha256":"')
    assert len(Ledger.open(ledger.folder, CAPS).entries) == 2


def test_an_entry_that_the_head_does_not_name_yet_counts(ledger: Ledger) -> None:
    head = (ledger.folder / HEAD).read_bytes()
    ledger.reserve(RUN, "adapt", PATIENTS, STEP)
    (ledger.folder / HEAD).write_bytes(head)
    assert Ledger.open(ledger.folder, CAPS).epsilon(1e-5) > 0
    assert (ledger.folder / HEAD).read_bytes() != head


@pytest.mark.parametrize("file", [LEDGER, HEAD, MEMBERS])
def test_a_changed_byte_in_any_file_is_found(ledger: Ledger, file: str) -> None:
    ledger.reserve(RUN, "adapt", PATIENTS, STEP)
    path = ledger.folder / file
    whole = path.read_bytes()
    start = 1 if file == MEMBERS else 0  # the empty line before a member line means nothing
    for place in range(start, len(whole) - start, max(1, len(whole) // 60)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(LedgerBroken):
            Ledger.open(ledger.folder, CAPS)


def test_a_missing_file_is_told_apart(ledger: Ledger, tmp_path: Path) -> None:
    ledger.reserve(RUN, "adapt", PATIENTS, STEP)
    with pytest.raises(ArtefactError, match="no ledger"):
        Ledger.open(tmp_path, CAPS)
    with pytest.raises(ArtefactError, match="never started again"):
        Ledger.create(ledger.folder, "harbour", CAPS)
    (ledger.folder / HEAD).unlink()
    with pytest.raises(LedgerBroken, match="missing"):
        Ledger.open(ledger.folder, CAPS)


def test_keys_are_their_owners_alone_and_never_replaced(ledger: Ledger) -> None:
    for name in ("ledger.key", "patients.key"):
        assert (ledger.folder / name).stat().st_mode & 0o077 == 0
    with pytest.raises(ArtefactError, match="never replaced"):
        create_key(ledger.folder / SIGNING_KEY)


def test_merging_needs_two_different_patients_of_whom_one_is_known(ledger: Ledger) -> None:
    ledger.reserve(RUN, "adapt", PATIENTS[:3], STEP)
    with pytest.raises(DataError, match="neither"):
        ledger.merge("unknown", "stranger")
    with pytest.raises(DataError, match="already"):
        ledger.merge(PATIENTS[0], PATIENTS[0])
    ledger.merge("new id", PATIENTS[0])
    ledger.reserve(RUN, "adapt", ["new id"], STEP)
    assert ledger.epsilon(1e-5) == pytest.approx(epsilon(STEP * 2, 1e-5), rel=1e-3)


def test_every_entry_has_random_bits_so_that_its_hash_tells_nothing(ledger: Ledger) -> None:
    for _ in range(3):
        ledger.record(EntryType.checkpoint, Context(), {})
    nonces = [entry.detail["nonce"] for entry in ledger.entries]
    assert len(set(nonces)) == len(nonces)
    assert {len(bytes.fromhex(nonce)) for nonce in nonces} == {16}
