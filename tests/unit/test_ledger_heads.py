"""Signed heads: what they prove, who keeps which, and what they say of a ledger that was put back."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import client.witnesses
from client.account import OpenLedger
from client.witnesses import WITNESSED, witness
from common.errors import ArtefactError
from common.guard_api import PlanAnswer
from common.privacy import journal
from common.privacy.budget import Caps
from common.privacy.bundle import read_bundle
from common.privacy.entries import Context, EntryType, LedgerBroken
from common.privacy.events import Event
from common.privacy.heads import SignedHead
from common.privacy.journal import HEAD, LEDGER
from common.privacy.ledger import Ledger
from common.privacy.verify import Evidence, verify
from common.privacy.witness import read_heads, write_heads
from server import roll_call
from server import witness as server
from server.witness import Witness

CAPS = Caps(1e-5)
STEP = [Event(4.0, 1.0, 1)]
PATIENTS = [f"patient-{number}" for number in range(4)]
OTHER = Ed25519PrivateKey.generate()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.create(tmp_path / "east", "east", CAPS)


def spend(ledger: Ledger) -> SignedHead:
    ledger.reserve(Context("run"), "adapt", PATIENTS, STEP)
    return ledger.signed_head("east")


def head(site: str, seq: int, key: Ed25519PrivateKey = OTHER, digit: str = "a") -> SignedHead:
    return SignedHead.sign(site, (seq, digit * 64), key)


def put_back(ledger: Ledger, saved: dict[str, bytes]) -> None:
    """The ledger and its head file together, as from a backup: by itself it looks whole."""
    for name, data in saved.items():
        (ledger.folder / name).write_bytes(data)


def saved_of(ledger: Ledger) -> dict[str, bytes]:
    return {name: (ledger.folder / name).read_bytes() for name in (LEDGER, HEAD)}


# --- a head by itself ---------------------------------------------------------------------------------


def test_a_head_proves_itself_and_nothing_else(ledger: Ledger) -> None:
    signed = ledger.signed_head("east")
    assert signed.holds
    assert (signed.seq, signed.hash) == (0, ledger.entries[0].hash)
    changes = [
        {"site": "west"}, {"seq": 1}, {"hash": "b" * 64}, {"public_key": head("x", 0).public_key},
        {"signature": "0" * 128}, {"signature": ledger.entries[0].sig},
    ]  # fmt: skip
    assert not any(replace(signed, **change).holds for change in changes)
    assert not SignedHead.sign("a name / with a path", (0, "a" * 64), OTHER).holds


def test_a_file_of_heads_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    path, heads = tmp_path / "heads.jsonl", [head("west", 3), head("east", 9), head("east", 4)]
    write_heads(path, heads)
    assert read_heads(path) == [heads[1], heads[0]], "of each site and key the latest"
    whole = path.read_text()
    path.write_text(whole.replace('"seq":9', '"seq":8'))
    with pytest.raises(ArtefactError, match="1 of 2 heads are not signed"):
        read_heads(path)
    path.write_text(whole[:-5])
    with pytest.raises(ArtefactError, match="damaged"):
        read_heads(path)


# --- the site's own ledger ----------------------------------------------------------------------------


def test_a_ledger_that_was_put_back_is_refused_by_its_own_later_head(ledger: Ledger) -> None:
    spend(ledger)
    saved = saved_of(ledger)
    later = spend(ledger)
    ledger.check_witnessed("east", [later, head("west", 99)])
    put_back(ledger, saved)
    old = Ledger.open(ledger.folder, CAPS)  # whole, as far as it can tell
    with pytest.raises(LedgerBroken, match="rolled back"):
        old.check_witnessed("east", [later])


def test_a_head_from_before_a_key_was_rolled_still_counts(ledger: Ledger) -> None:
    before = spend(ledger)
    saved = {name: (ledger.folder / name).read_bytes() for name in (LEDGER, HEAD, "ledger.key")}
    ledger.roll_key()
    after = ledger.signed_head("east")
    assert before.public_key != after.public_key
    ledger.check_witnessed("east", [before, after])
    put_back(ledger, saved)
    old = Ledger.open(ledger.folder, CAPS)
    old.check_witnessed("east", [before])
    with pytest.raises(LedgerBroken, match="does not know: it was exchanged"):
        old.check_witnessed("east", [after])


def test_a_ledger_begun_anew_in_place_of_the_old_one_is_refused(ledger: Ledger) -> None:
    seen = spend(ledger)
    shutil.rmtree(ledger.folder)
    with pytest.raises(LedgerBroken, match="exchanged"):
        Ledger.create(ledger.folder, "east", CAPS).check_witnessed("east", [seen])


def test_an_open_ledger_checks_each_entry_once_and_sees_what_others_append(ledger: Ledger) -> None:
    kept = OpenLedger(ledger.folder)
    kept.read(CAPS)
    for _ in range(3):
        spend(ledger)  # another process, for all that the kept one can tell
        known = journal.entries_checked
        assert kept.read(CAPS).head == ledger.head
        assert journal.entries_checked - known == 1
    known = journal.entries_checked
    spend(kept.read(CAPS))
    kept.read(CAPS)
    assert journal.entries_checked == known, "its own entries are not read again"
    assert kept.read(Caps(1e-5, total=1e-3)).caps.total == 1e-3


def test_what_an_open_ledger_has_seen_must_stay(ledger: Ledger) -> None:
    saved, kept = saved_of(ledger), OpenLedger(ledger.folder)
    spend(kept.read(CAPS))
    whole = saved_of(ledger)
    put_back(ledger, saved)
    for _ in range(2):
        with pytest.raises(LedgerBroken, match="changed behind its end"):
            kept.read(CAPS)
    put_back(ledger, whole)
    assert kept.read(CAPS).entries[-1].type is EntryType.reserve
    flipped = bytearray(whole[LEDGER])
    flipped[40] ^= 1
    (ledger.folder / LEDGER).write_bytes(flipped)
    with pytest.raises(LedgerBroken):
        kept.read(CAPS)


def test_each_entrys_epsilon_is_what_the_verifier_computes(ledger: Ledger) -> None:
    """Though a COMMIT takes over the figures of the entry before it, and others are kept from before."""
    for _ in range(3):
        seq = ledger.reserve(Context("run"), "adapt", PATIENTS, STEP)
        ledger.commit(seq, [], STEP)
    anew = Ledger.open(ledger.folder, CAPS)
    anew.record(EntryType.checkpoint, Context(), {})
    anew.caps = Caps(1e-6)  # another delta: nothing to take over
    anew.record(EntryType.checkpoint, Context(), {})
    assert set(anew.entries[-1].epsilon_after) == {"1e-06", "1e-05", "0.001"}
    found = verify(read_bundle(ledger.folder), Evidence())
    assert not [fault for fault in found.faults if "epsilon" in fault]


# --- the verifier -------------------------------------------------------------------------------------


def test_a_witness_takes_the_caution_away_and_finds_a_rollback(ledger: Ledger) -> None:
    saved, heads = saved_of(ledger), [spend(ledger), head("west", 7)]
    bare, seen = verify(read_bundle(ledger.folder), Evidence()), Evidence(heads=heads)
    assert [c for c in bare.cautions if c.startswith("unwitnessed")]
    found = verify(read_bundle(ledger.folder), seen)
    assert not [c for c in found.cautions if "witness" in c]
    assert (found.facts["witnessed"], found.facts["witnessed_seq"]) == (True, heads[0].seq)
    put_back(ledger, saved)
    assert not [fault for fault in verify(read_bundle(ledger.folder), Evidence()).faults if "rolled" in fault]
    assert "rolled back" in verify(read_bundle(ledger.folder), seen).faults[0]


def test_a_witness_of_others_alone_is_none(ledger: Ledger) -> None:
    found = verify(read_bundle(ledger.folder), Evidence(heads=[head("west", 7)]))
    assert not found.facts["witnessed"]
    assert "the witness names no head of this ledger" in found.cautions


# --- a site as a witness ------------------------------------------------------------------------------


def test_a_site_keeps_of_each_peer_the_latest_and_says_what_went_back(tmp_path: Path) -> None:
    own, west = head("east", 5), head("west", 5)
    assert witness(tmp_path, "east", [own, west]) == []
    assert read_heads(tmp_path / WITNESSED) == [west], "its own head proves nothing in its own folder"
    later = head("west", 6)
    assert witness(tmp_path, "east", [later]) == []
    for old in (west, head("west", 6, digit="b")):
        assert "ledger of west went back" in witness(tmp_path, "east", [old])[0]
    rolled = head("west", 1, Ed25519PrivateKey.generate())
    assert "key that was not seen before" in witness(tmp_path, "east", [rolled])[0]
    assert witness(tmp_path, "east", [rolled]) == []
    assert set(read_heads(tmp_path / WITNESSED)) == {later, rolled}


def test_a_full_file_of_witnessed_heads_gives_none_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.witnesses, "MOST_WITNESSED", 2)
    kept = [head("north", 1), head("west", 1)]
    witness(tmp_path, "east", [*kept, head("south", 1)])
    assert read_heads(tmp_path / WITNESSED) == kept
    witness(tmp_path, "east", [head("west", 2)])
    assert read_heads(tmp_path / WITNESSED) == [kept[0], head("west", 2)]


# --- the server as a witness --------------------------------------------------------------------------


def test_the_server_takes_no_answer_whose_head_is_wrong() -> None:
    witness = Witness(private=True)
    witness.take("east", head("east", 5))
    wrong = [
        (None, server.MISSING),
        (head("west", 6), server.ANOTHER),
        (replace(head("east", 6), seq=7), server.UNSIGNED),
        (head("east", 4), server.WENT_BACK),
        (head("east", 5, digit="b"), server.WENT_BACK),
    ]
    for given, reason in wrong:
        with pytest.raises(ArtefactError, match=reason):
            witness.take("east", given)
    witness.take("east", head("east", 6, Ed25519PrivateKey.generate()))
    with pytest.raises(ArtefactError, match=server.UNASKED):
        Witness(private=False).take("east", head("east", 1))


def test_a_site_whose_head_went_back_is_not_in_the_run() -> None:
    witness = Witness(private=True)
    witness.take("east", head("east", 5))
    told = [PlanAnswer(site, True, "", preset="lite", ledger_head=head(site, 4)) for site in ("east", "west")]
    refused = PlanAnswer("north", False, "", "REFUSED_LEDGER")
    answers = [("node-1", told[0]), ("node-2", told[1]), ("node-3", refused)]
    assert roll_call._witnessed(witness, answers) == {"node-1": server.WENT_BACK}
    witness.save()
    assert witness.shown_to("node-1") == [head("east", 5), head("west", 4)]


def test_what_orders_show_is_on_the_disk_and_never_less(tmp_path: Path) -> None:
    path = tmp_path / server.HEADS_FILE
    witness = Witness(True, path)
    witness.take("east", head("east", 5))
    assert witness.shown_to("east") == []
    witness.save()
    assert witness.shown_to("east") == witness.shown_to("node-0001") == read_heads(path)
    resumed = Witness(True, path)
    assert resumed.shown_to("east") == [head("east", 5)]
    with pytest.raises(ArtefactError, match=server.WENT_BACK):
        resumed.take("east", head("east", 4))
    Witness(False, tmp_path / "none").save()
    assert not (tmp_path / "none").exists()


def test_an_order_shows_a_site_its_own_head_and_some_of_its_peers() -> None:
    witness = Witness(private=True)
    for number in range(100):
        witness.take(f"site-{number:03d}", head(f"site-{number:03d}", 1))
    witness.save()
    shown = {head.site for head in witness.shown_to("site-070")}
    assert len(shown) == server.SHOWN
    assert {"site-070", "site-071", "site-099", "site-000"} <= shown
    assert len(witness.shown_to("node-0001")) == 100, "whose name nobody knows yet"
