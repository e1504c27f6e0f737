"""A hospital joins a consortium: the keys, the request, the membership and the kit."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.network.joining import NODE_KEY, REQUEST, prepare_site
from common.config import load_site
from common.errors import ArtefactError, ConfigError, FederationError, VerificationFailed
from common.network.documents import JoinRequest, read_request, write_document
from common.network.identity import (
    create_node_key,
    fingerprint_of,
    plain_fingerprint,
    public_line,
    read_node_key,
    spoken,
)
from common.privacy.keys import PATIENT_KEY, SIGNING_KEY, read_private_key
from server.network.consortium import Consortium
from server.network.membership import add_member
from server.network.registry import MEMBERS, Registry, State
from tests.joining_sites import NOW, consortium, founded, joining, rewritten

__all__ = ["consortium", "founded"]  # fixtures


def secrets_of(site: Path) -> list[bytes]:
    """Every way in which the site's private keys could stand in a file."""
    node, ledger = read_node_key(site / NODE_KEY), read_private_key(site / SIGNING_KEY)
    number = node.private_numbers().private_value
    raw = ledger.private_bytes(
        serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
    )
    patients = (site / PATIENT_KEY).read_bytes()
    lines = [line for path in (NODE_KEY, Path(SIGNING_KEY)) for line in (site / path).read_bytes().split()]
    return [
        number.to_bytes(48, "big"), f"{number:x}".encode(), str(number).encode(),
        raw, raw.hex().encode(), patients, patients.hex().encode(),
        *(line for line in lines if len(line) > 20), b"PRIVATE",
    ]  # fmt: skip


# --- the hospital -------------------------------------------------------------------------------------


def test_a_request_and_a_kit_hold_no_secret(tmp_path: Path, consortium: Consortium) -> None:
    request, site = joining(tmp_path, "harbour"), tmp_path / "harbour"
    kit, _ = add_member(consortium, request, NOW)
    ca_key = (consortium.folder / "ca.key").read_bytes().split()
    for path in (site / REQUEST, kit):
        data = path.read_bytes()
        assert not [secret for secret in secrets_of(site) if secret in data]
        assert not [line for line in ca_key if len(line) > 20 and line in data]
        assert str(tmp_path).encode() not in data
        assert str(consortium.folder).encode() not in data


def test_a_sites_node_key_is_what_flower_reads_and_its_owners_alone(tmp_path: Path) -> None:
    request = joining(tmp_path, "harbour")
    path = tmp_path / "harbour" / NODE_KEY
    key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert isinstance(key.curve, ec.SECP384R1)
    assert public_line(key.public_key()) == request.node_key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    joining(tmp_path, "harbour")
    site = tmp_path / "harbour"
    (site / "site.yaml").write_text("name: harbour\npatients: 40\n")
    kept = ("site.yaml", NODE_KEY, SIGNING_KEY, PATIENT_KEY, "ledger.jsonl")
    before = [(site / name).read_bytes() for name in kept]
    again = prepare_site(site, "harbour", Path("other.csv"))
    assert again.made == []
    assert [(site / name).read_bytes() for name in kept] == before
    assert read_request(site / REQUEST) == again.request  # ECDSA signs anew


def test_nothing_is_made_if_what_is_there_contradicts_the_name(tmp_path: Path) -> None:
    joining(tmp_path, "harbour")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError) as caught:
        prepare_site(tmp_path / "harbour", "Hill!", None)
    assert len(caught.value.faults) == 3  # the name itself, site.yaml and the ledger
    assert sorted(tmp_path.rglob("*")) == before


def test_the_sites_file_is_one_that_the_guard_reads(tmp_path: Path) -> None:
    manifest = tmp_path / 'odd "name": # of.csv'
    prepare_site(tmp_path / "harbour", "harbour", manifest)
    given = load_site(tmp_path / "harbour" / "site.yaml")
    assert (given.name, given.manifest) == ("harbour", str(manifest))
    commented = (tmp_path / "harbour" / "site.yaml").read_text().splitlines()
    start = next(index for index, line in enumerate(commented) if line.startswith("# What else"))
    (tmp_path / "all.yaml").write_text(
        "name: harbour\n" + "\n".join(line.removeprefix("# ") for line in commented[start + 1 :]) + "\n"
    )
    assert load_site(tmp_path / "all.yaml").policy.max_payload_mb == 64.0  # what it offers can be said


# --- the request --------------------------------------------------------------------------------------


def test_a_request_that_was_changed_is_refused(tmp_path: Path) -> None:
    request, other = joining(tmp_path, "harbour"), joining(tmp_path, "hill")
    path = tmp_path / "changed.json"
    write_document(path, request)
    assert read_request(path) == request
    for changed, faults in (
        ({"name": "hill"}, 2),
        ({"node_key": other.node_key}, 2),  # another's node under this ledger
        ({"ledger_key": other.ledger_key}, 2),
        ({"node_signature": other.node_signature}, 1),
        ({"ledger_signature": other.ledger_signature}, 1),
        ({"node_signature": ""}, 1),
        ({"ledger_signature": request.ledger_signature.upper()}, 1),
    ):
        write_document(path, replace(request, **changed))
        with pytest.raises(VerificationFailed) as caught:
            read_request(path)
        assert len(caught.value.faults) == faults, changed


def test_nobody_hands_in_a_key_that_is_not_his(tmp_path: Path) -> None:
    """Neither of the two keys of a request can be another hospital's."""
    theirs = joining(tmp_path, "harbour")
    node, ledger = create_node_key(tmp_path / "mine"), Ed25519PrivateKey.generate()
    mine = JoinRequest.make("thief", node, ledger)
    for stolen in (
        replace(mine, node_key=theirs.node_key, node_signature=theirs.node_signature),
        replace(mine, ledger_key=theirs.ledger_key, ledger_signature=theirs.ledger_signature),
    ):
        write_document(tmp_path / "stolen.json", stolen)
        with pytest.raises(VerificationFailed):
            read_request(tmp_path / "stolen.json")


def test_every_fault_of_a_request_is_told_at_once(tmp_path: Path) -> None:
    joining(tmp_path, "harbour")
    path = tmp_path / "harbour" / REQUEST

    def spoil(document: dict[str, Any]) -> None:
        document.update(name="../x", node_key="ssh-ed25519 AAAA", ledger_key=7, schema=2, extra="x")
        del document["node_signature"]

    rewritten(path, spoil)
    with pytest.raises(ArtefactError) as caught:
        read_request(path)
    keys = {fault.split(":")[0] for fault in caught.value.faults}
    assert keys == {"name", "node_key", "ledger_key", "schema", "extra", "node_signature"}


@pytest.mark.parametrize(
    "text", ["", "[]", '{"schema":1,"schema":1}', "\x00", '{"a":' * 9000, '"' + "a" * 70000]
)
def test_what_is_no_request_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "join.json").write_text(text)
    with pytest.raises(ArtefactError):
        read_request(tmp_path / "join.json")


def test_a_key_of_another_curve_or_spelling_is_refused(tmp_path: Path) -> None:
    request = joining(tmp_path, "harbour")
    small = ec.generate_private_key(ec.SECP256R1()).public_key()
    line = small.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    for key in (line, request.node_key + " comment", request.node_key + "\n", " " + request.node_key):
        write_document(tmp_path / "join.json", replace(request, node_key=key))
        with pytest.raises(ArtefactError, match="node_key"):
            read_request(tmp_path / "join.json")


def test_a_fingerprint_is_read_as_people_write_it() -> None:
    digits = "0123456789abcdef" * 4
    assert plain_fingerprint(spoken(digits)) == digits
    assert plain_fingerprint(digits.upper().replace("0", " 0")) == digits
    assert plain_fingerprint(digits[:-1]) == plain_fingerprint(digits + "0") == plain_fingerprint("") == ""


# --- the members --------------------------------------------------------------------------------------


class Superlink:
    """The SuperLink's side of `Registry.settle`, in a dictionary; ``fails``: at the next registration."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}
        self.gone: list[str] = []
        self.fails = False

    @staticmethod
    def _key(pem: bytes) -> str:
        return fingerprint_of(serialization.load_pem_public_key(pem))

    def register(self, pem: bytes, name: str) -> int:
        if self.fails:
            raise FederationError("gone away")
        return self.known.setdefault(self._key(pem), len(self.known) + 1)

    def unregister(self, pem: bytes) -> None:
        self.turn_out(self._key(pem))

    def fingerprints(self) -> list[str]:
        return list(self.known)

    def turn_out(self, fingerprint: str) -> None:
        self.known.pop(fingerprint, None)
        self.gone.append(fingerprint)


def states(registry: Registry) -> dict[str, State]:
    return {member.name: member.state for member in registry.members()}


def test_members_are_told_to_the_superlink_once_and_wait_if_it_fails(
    tmp_path: Path, consortium: Consortium
) -> None:
    registry, superlink = Registry(consortium.folder), Superlink()
    first, second = joining(tmp_path, "harbour"), joining(tmp_path, "hill")
    for request in (first, second):
        registry.add(request, NOW)
    assert registry.unsettled()
    superlink.fails = True
    with pytest.raises(FederationError):
        registry.settle(superlink)
    assert set(states(registry).values()) == {State.queued}
    superlink.fails = False
    assert [member.name for member in registry.settle(superlink)] == ["harbour", "hill"]
    assert registry.settle(superlink) == []
    assert superlink.known == {first.fingerprint: 1, second.fingerprint: 2}
    registry.remove("harbour", NOW)
    registry.settle(superlink)
    assert states(registry) == {"harbour": State.removed, "hill": State.registered}
    assert set(superlink.known) == {second.fingerprint}


def test_one_member_that_the_superlink_refuses_keeps_no_other_out(
    tmp_path: Path, consortium: Consortium
) -> None:
    registry, superlink = Registry(consortium.folder), Superlink()
    for name in ("first", "harbour", "hill"):
        registry.add(joining(tmp_path, name), NOW)
    refused = registry.find("first").fingerprint

    class Choosy(Superlink):
        def register(self, pem: bytes, name: str) -> int:
            if self._key(pem) == refused:
                raise FederationError("takes no key back")
            return superlink.register(pem, name)

    with pytest.raises(FederationError) as caught:
        registry.settle(Choosy())
    assert caught.value.faults == ("first: takes no key back",)
    assert list(states(registry).values()) == [State.queued, State.registered, State.registered]


def test_a_superlink_with_a_new_database_learns_the_members_and_no_other(
    tmp_path: Path, consortium: Consortium
) -> None:
    registry = Registry(consortium.folder)
    request, gone = joining(tmp_path, "harbour"), joining(tmp_path, "gone")
    for entry in (gone, request):
        registry.add(entry, NOW)
    registry.settle(Superlink())
    registry.remove(gone.fingerprint, NOW)
    registry.settle(Superlink())
    anew = Superlink()
    registry.settle(anew, anew=True)
    assert set(anew.known) == {request.fingerprint}
    anew.known["stranger"] = 9
    assert registry.turn_out_strangers(anew) == ["stranger"]
    assert set(anew.known) == {request.fingerprint}


def test_a_site_is_known_by_its_keys_hash_and_a_removed_key_never_returns(
    tmp_path: Path, consortium: Consortium
) -> None:
    registry, request = Registry(consortium.folder), joining(tmp_path, "harbour")
    registry.add(request, NOW)
    with pytest.raises(ConfigError, match="belongs to harbour already"):
        registry.add(request, NOW)
    (tmp_path / "second").mkdir()
    namesake = joining(tmp_path / "second", "harbour")
    with pytest.raises(ConfigError, match="a member with another key"):
        registry.add(namesake, NOW)
    registry.remove(spoken(request.fingerprint), NOW)
    with pytest.raises(ConfigError, match="for good"):
        registry.add(request, NOW)
    assert registry.add(namesake, NOW).fingerprint == namesake.fingerprint
    with pytest.raises(ConfigError, match="no member is 'nobody'; members: harbour"):
        registry.remove("nobody", NOW)


def test_a_damaged_list_of_members_is_refused(tmp_path: Path, consortium: Consortium) -> None:
    registry = Registry(consortium.folder)
    registry.add(joining(tmp_path, "harbour"), NOW)
    path = consortium.folder / MEMBERS
    whole = path.read_text()
    for damaged in (
        whole[:-20],
        whole.replace('"queued"', '"king"'),
        whole.replace('"schema": 1', '"schema": 2'),
    ):
        path.write_text(damaged)
        with pytest.raises(ArtefactError):
            registry.members()
    other = create_node_key(tmp_path / "other").public_key()
    path.write_text(whole.replace(json.loads(whole)["members"][0]["node_key"], public_line(other)))
    with pytest.raises(
        ArtefactError, match="damaged"
    ):  # a key under another's fingerprint is never registered
        registry.settle(Superlink())
