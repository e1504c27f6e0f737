"""The verifier: a whole record holds, and each way in which one can be wrong is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.canonical import canonical_json
from common.errors import ArtefactError
from common.privacy.bundle import CHECKPOINT, FILES, read_bundle, write_bundle
from common.privacy.entries import Context, Entry, EntryType, Payload, sealed
from common.privacy.journal import HEAD, LEDGER, read_lines
from common.privacy.keys import public_key, read_private_key
from common.privacy.ledger import RECEIPTS, Ledger
from common.privacy.members import MEMBERS
from common.privacy.plan import PrivacyPlan
from common.privacy.policy import POLICY, sign_policy
from common.privacy.receipts import ReceiptLine
from common.privacy.verify import Evidence, verify
from simulations.privacy_exam import record as exam
from simulations.privacy_exam.site import PATIENTS, PLAN, make_site, policy_for

OFFICER = Ed25519PrivateKey.generate()
EVIDENCE = Evidence(public_key(OFFICER))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exam") / "site"
    make_site(folder, OFFICER)
    return folder


@pytest.fixture
def files(site: Path) -> dict[str, bytes]:
    return read_bundle(site)


def entries_of(files: dict[str, bytes]) -> list[Entry]:
    return read_lines(files[LEDGER])


def lied(site: Path, files: dict[str, bytes], change: Callable[[list[Entry]], None]) -> dict[str, bytes]:
    """The ledger as its own key holder could forge it: entries changed, then chained and signed again."""
    signer = read_private_key(site / "ledger.key")
    entries = entries_of(files)
    change(entries)
    chained: list[Entry] = []
    for seq, entry in enumerate(entries):
        prev = chained[-1].hash if chained else "0" * 64
        chained.append(sealed(replace(entry, seq=seq, prev=prev, hash="", sig=""), signer))
    head = canonical_json({"seq": len(chained) - 1, "hash": chained[-1].hash})
    text = "".join(entry.line() + "\n" for entry in chained)
    kept = {name: data for name, data in files.items() if name != CHECKPOINT}
    return kept | {LEDGER: text.encode(), HEAD: head.encode()}


def first(entries: list[Entry], kind: EntryType) -> int:
    return next(index for index, entry in enumerate(entries) if entry.type is kind)


def test_a_flipped_bit_is_found_wherever_it_is() -> None:
    verdict = exam.item_17(40)
    assert verdict.passed, verdict


def test_verify_runs_without_torch_or_network_and_says_the_same_twice() -> None:
    verdict = exam.item_36()
    assert verdict.passed, verdict


def test_a_whole_record_holds_without_a_caution(files: dict[str, bytes]) -> None:
    found = verify(files, EVIDENCE)
    assert (found.faults, found.cautions) == ([], [])
    facts = found.to_json()
    assert facts["holds"]
    assert facts["witnessed"]
    assert facts["runs"] == [{"run": "run-1", "stage": "adapt", "planned": 4, "reserved": 4, "ran": 4}]
    assert facts["epsilon"]["1e-05"]["pld"] == pytest.approx(PLAN.epsilon(), abs=1e-6)
    assert facts["epsilon"]["1e-05"]["rdp"] > facts["epsilon"]["1e-05"]["pld"]
    assert facts["egress"] == {"payloads": 4, "bytes": 4006, "without_mechanism": 0}
    assert [count for count, _ in facts["classes"]] == [60]


def test_without_a_witness_or_key_it_says_so(files: dict[str, bytes]) -> None:
    found = verify({name: data for name, data in files.items() if name != CHECKPOINT}, Evidence())
    assert found.holds
    assert [caution.split(":")[0] for caution in found.cautions] == [
        "no officer's key was given",
        "unwitnessed",
    ]


def test_a_head_that_a_witness_saw_must_be_there(files: dict[str, bytes]) -> None:
    known = entries_of(files)[5].hash
    assert verify(files, replace(EVIDENCE, witnessed=[known])).holds
    found = verify(files, replace(EVIDENCE, witnessed=["f" * 64]))
    assert found.faults == ["the ledger lacks an entry that a witness has seen: it was cut or rolled back"]


def cheaper(entries: list[Entry]) -> None:
    place = first(entries, EntryType.reserve)
    entries[place] = replace(entries[place], epsilon_after={"1e-05": 0.01, "0.001": 0.01})


def more_steps(entries: list[Entry]) -> None:
    place = first(entries, EntryType.reserve)
    entries[place] = replace(entries[place], events=[PLAN.event(3).triple()])


def other_noise(entries: list[Entry]) -> None:
    place = first(entries, EntryType.reserve)
    entries[place] = replace(entries[place], events=[[1.0, 0.1, 1]])


def no_policy(entries: list[Entry]) -> None:
    del entries[first(entries, EntryType.policy)]
    shift_settles(entries)


def no_plan(entries: list[Entry]) -> None:
    del entries[first(entries, EntryType.plan)]
    shift_settles(entries)


def shift_settles(entries: list[Entry]) -> None:
    for place, entry in enumerate(entries):
        if "settles" in entry.detail:
            entries[place] = replace(entry, detail={**entry.detail, "settles": entry.detail["settles"] - 1})


def other_plan(entries: list[Entry]) -> None:
    place = first(entries, EntryType.reserve)
    entries[place] = replace(entries[place], plan_sha256="e" * 64)


def expired(entries: list[Entry]) -> None:
    place = first(entries, EntryType.policy)
    detail = {**entries[place].detail, "expires": "2020-01-01T00:00:00+00:00"}
    entries[place] = replace(entries[place], detail=detail)


def other_payload(entries: list[Entry]) -> None:
    place = first(entries, EntryType.commit)
    entries[place] = replace(entries[place], payload=[Payload("adapt.adapter", "e" * 64, 1000)])


def another_class(entries: list[Entry]) -> None:
    place = first(entries, EntryType.reserve)
    cohort = replace(entries[place].cohort, classes={"c0": 59})
    entries[place] = replace(entries[place], cohort=cohort)


def caught_by_audit(entries: list[Entry]) -> None:
    entries.append(
        replace(entries[-1], type=EntryType.audit, detail={"kind": "artefact", "lower": 2.0, "upper": 1.0})
    )


def earlier(entries: list[Entry]) -> None:
    entries[4] = replace(entries[4], ts="2020-01-01T00:00:00.000000+00:00")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (cheaper, "not what its history gives"),
        (more_steps, "not what its history gives"),
        (more_steps, "more was reserved than its plan has"),
        (other_noise, "more was reserved than its plan has"),
        (other_noise, "more steps ran than were reserved"),
        (no_policy, "under a policy that was not in force"),
        (no_plan, "no plan names"),
        (other_plan, "another plan than its run's"),
        (expired, "outside the policy's dates"),
        (other_payload, "1 payloads of the ledger have no receipt"),
        (other_payload, "no entry of the ledger pays for it"),
        (another_class, "numbers of patients do not follow"),
        (caught_by_audit, "an audit found more than the claimed epsilon"),
        (earlier, "earlier than the one before it"),
    ],
)
def test_a_forged_but_signed_ledger_is_found(
    site: Path, files: dict[str, bytes], change: Callable[[list[Entry]], None], text: str
) -> None:
    found = verify(lied(site, files, change), EVIDENCE)
    assert any(text in fault for fault in found.faults), found.faults


def audited(entries: list[Entry]) -> int:
    """Where the adapter's audit is."""
    return next(i for i, entry in enumerate(entries) if entry.detail.get("kind") == "artefact")


def unaudited(entries: list[Entry]) -> None:
    del entries[audited(entries)]


def student_alone_audited(entries: list[Entry]) -> None:
    at = audited(entries)
    entries[at] = replace(entries[at], detail=entries[at].detail | {"artefact": "student"})


def another_run_audited(entries: list[Entry]) -> None:
    at = audited(entries)
    entries[at] = replace(entries[at], run_id="run-0")


def audited_too_early(entries: list[Entry]) -> None:
    """Before the last round left; the entry after it settles a reservation, which moves with it."""
    at = audited(entries)
    reserve, commit, audit = entries[at - 2 : at + 1]
    moved = replace(commit, detail=commit.detail | {"settles": reserve.seq + 1})
    audit = replace(audit, ts=reserve.ts, epsilon_after=entries[at - 3].epsilon_after)
    entries[at - 2 : at + 1] = [audit, reserve, moved]


@pytest.mark.parametrize("change", [unaudited, student_alone_audited, another_run_audited, audited_too_early])
def test_an_audit_that_the_policy_requires_is_owed(
    site: Path, files: dict[str, bytes], change: Callable[[list[Entry]], None]
) -> None:
    found = verify(lied(site, files, change), EVIDENCE)
    assert (found.faults, found.holds) == ([], False)
    assert len(found.owed) == 1
    assert "run run-1" in found.owed[0]
    assert "wardround privacy audit" in found.owed[0]
    assert found.to_json()["owed"] == found.owed


def test_no_audit_is_owed_that_no_policy_requires(files: dict[str, bytes], tmp_path: Path) -> None:
    policy = policy_for(OFFICER, audit={"artefact_mia": "optional"})
    make_site(tmp_path / "site", OFFICER, policy)
    bare = lied(tmp_path / "site", read_bundle(tmp_path / "site"), unaudited)
    assert verify(bare, EVIDENCE).owed == []
    unknown = {name: data for name, data in files.items() if not name.startswith(POLICY)}
    assert verify(unknown, EVIDENCE).owed == []


def test_a_run_that_goes_on_owes_its_audit_later(site: Path, files: dict[str, bytes]) -> None:
    def unfinished(entries: list[Entry]) -> None:
        del entries[audited(entries) - 2 :]  # the last round, and what came after it

    lines = files[RECEIPTS].splitlines(keepends=True)
    found = verify(lied(site, files | {RECEIPTS: b"".join(lines[:-1])}, unfinished), EVIDENCE)
    assert (found.faults, found.owed) == ([], [])
    assert any("audit.artefact_mia" in caution for caution in found.cautions)


def receipt(**changes: Any) -> bytes:
    line = ReceiptLine("harbour", "adapt", 0, "adapt.numbers", 10, "a" * 64, "none", None)
    return (canonical_json(asdict(replace(line, **changes))) + "\n").encode()


@pytest.mark.parametrize(
    ("stage", "text"),
    [
        ("adapt", "without a mechanism, and the policy wants one"),
        ("student", "something left, and the policy says"),
    ],
)
def test_what_left_against_the_policy_is_found(files: dict[str, bytes], stage: str, text: str) -> None:
    found = verify(files | {RECEIPTS: files[RECEIPTS] + receipt(stage=stage)}, EVIDENCE)
    assert any(text in fault for fault in found.faults)
    assert any("after the ledger's last entry" in fault for fault in found.faults)


def test_a_removed_receipt_is_found(files: dict[str, bytes]) -> None:
    shorter = files[RECEIPTS].split(b"\n", 1)[1]
    assert not verify(files | {RECEIPTS: shorter}, EVIDENCE).holds
    assert not verify({name: data for name, data in files.items() if name != RECEIPTS}, EVIDENCE).holds


def test_another_policy_is_told_from_the_ledgers(files: dict[str, bytes], tmp_path: Path) -> None:
    path = sign_policy(policy_for(OFFICER, max_epsilon_total=0.1), tmp_path, OFFICER)
    signed = path.with_name("policy.json.sig").read_bytes()
    found = verify(files | {POLICY: path.read_bytes(), "policy.json.sig": signed}, EVIDENCE)
    assert "the ledger's last policy is another than the one given" in found.faults


def test_open_reservations_unplanned_stops_and_missing_rehearsals_are_cautions(tmp_path: Path) -> None:
    policy = policy_for(OFFICER)
    ledger = Ledger.create(tmp_path, "harbour", policy.caps)
    sign_policy(policy, tmp_path, OFFICER)
    from common.privacy.terms import policy_record

    run = Context("run", "d" * 64, policy.digest, "c" * 64)
    plan = PrivacyPlan.make(PLAN.settings, 2.0)
    ledger.record(EntryType.policy, Context(), policy_record(policy))
    ledger.record(EntryType.plan, run, {"plans": {"adapt": plan.to_json()}})
    ledger.reserve(run, "adapt", PATIENTS, [plan.event(1)])
    found = verify(read_bundle(tmp_path), EVIDENCE)
    assert found.faults == []
    assert [caution.split(":")[0] for caution in found.cautions] == [
        "unwitnessed", "run run, stage adapt", "1 reservations were never closed; they are counted as spent",
        "no rehearsal passed before the first reservation",
    ]  # fmt: skip


def test_a_bundle_holds_no_key_and_no_member(site: Path, tmp_path: Path) -> None:
    names = write_bundle(site, tmp_path / "site.zip")
    assert set(names) == set(FILES)
    assert MEMBERS not in names
    assert read_bundle(tmp_path / "site.zip") == read_bundle(site)
    data = (tmp_path / "site.zip").read_bytes()
    assert (site / MEMBERS).read_bytes().strip() not in data
    assert b"PRIVATE KEY" not in data


def test_a_zip_of_another_program_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "no.zip").write_bytes(b"PK nonsense")
    with pytest.raises(ArtefactError, match="no bundle"):
        read_bundle(tmp_path / "no.zip")
    with pytest.raises(ArtefactError, match="no ledger"):
        write_bundle(tmp_path, tmp_path / "out.zip")


def test_an_empty_folder_is_no_record(tmp_path: Path) -> None:
    found = verify(read_bundle(tmp_path), EVIDENCE)
    assert found.faults == ["ledger.jsonl is missing"]
    assert json.dumps(found.to_json())
