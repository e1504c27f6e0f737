"""The kit that a member gets, the commands around it, and the node that is started from it."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from client.network.joining import AUTHORITY, KIT, NODE_KEY, REQUEST, take_kit
from client.network.node import NodePlan, explain, look
from common.canonical import canonical_json
from common.errors import ArtefactError, ConfigError, FederationError, VerificationFailed
from common.network.documents import read_kit, write_document
from common.network.identity import plain_fingerprint, spoken
from server.network.consortium import Consortium, Settings
from server.network.membership import add_member, check_fingerprint, kit_for, remove_member
from server.network.registry import Member, Registry, State
from tests.joining_sites import NOW, consortium, founded, invoke, joining, rewritten

__all__ = ["consortium", "founded"]  # fixtures


# --- the kit ------------------------------------------------------------------------------------------


def test_adding_a_second_member_leaves_the_firsts_files_byte_identical(
    tmp_path: Path, consortium: Consortium
) -> None:
    kit, known = add_member(consortium, joining(tmp_path, "harbour"), NOW)
    assert not known
    take_kit(tmp_path / "harbour", kit, NOW)
    watched = [kit, *(tmp_path / "harbour").rglob("*"), *consortium.folder.rglob("*.crt")]
    before = {path: path.read_bytes() for path in watched if path.is_file()}
    add_member(consortium, joining(tmp_path, "hill"), NOW)
    assert {path: path.read_bytes() for path in before} == before
    first = Registry(consortium.folder).find("harbour")
    assert canonical_json(asdict(kit_for(consortium, first))) + "\n" == kit.read_text()


def test_a_kit_names_no_other_member(tmp_path: Path, consortium: Consortium) -> None:
    first = joining(tmp_path, "harbour")
    add_member(consortium, first, NOW)
    kit, _ = add_member(consortium, joining(tmp_path, "hill"), NOW)
    for secret in ("harbour", first.fingerprint, first.node_key, first.ledger_key):
        assert secret not in kit.read_text()


def test_a_kit_is_taken_by_the_site_it_was_made_for_alone(tmp_path: Path, consortium: Consortium) -> None:
    kit, _ = add_member(consortium, joining(tmp_path, "harbour"), NOW)
    taken, expiry = take_kit(tmp_path / "harbour", kit, NOW)
    assert taken.address == "localhost:8443"
    assert expiry.days == 825
    assert (tmp_path / "harbour" / AUTHORITY).read_text() == consortium.ca_pem
    joining(tmp_path, "hill")
    with pytest.raises(ArtefactError) as caught:
        take_kit(tmp_path / "hill", kit, NOW)
    assert len(caught.value.faults) == 2  # another key, another name
    with pytest.raises(ArtefactError, match="new kit"):
        take_kit(tmp_path / "harbour", kit, NOW + timedelta(days=826))


def test_another_consortiums_kit_does_not_replace_one(tmp_path: Path, consortium: Consortium) -> None:
    request = joining(tmp_path, "harbour")
    kit, _ = add_member(consortium, request, NOW)
    take_kit(tmp_path / "harbour", kit, NOW)
    kept = (tmp_path / "harbour" / KIT).read_bytes()
    other = Consortium.create(tmp_path / "other", Settings(host="localhost"), 90, 825, NOW)
    theirs, _ = add_member(other, request, NOW)
    with pytest.raises(ArtefactError, match="another consortium's kit"):
        take_kit(tmp_path / "harbour", theirs, NOW)
    assert (tmp_path / "harbour" / KIT).read_bytes() == kept
    other.renew(
        90, 825, NOW + timedelta(days=1)
    )  # the same authority's next certificate is the same consortium
    (tmp_path / "harbour" / KIT).unlink()
    take_kit(tmp_path / "harbour", theirs, NOW)
    write_document(theirs, kit_for(other, request))
    take_kit(tmp_path / "harbour", theirs, NOW)


def test_every_fault_of_a_kit_is_told_at_once(tmp_path: Path, consortium: Consortium) -> None:
    kit, _ = add_member(consortium, joining(tmp_path, "harbour"), NOW)

    def spoil(document: dict[str, Any]) -> None:
        document.update(host="a b", port=70000, release="x", node="y", consortium="0" * 64, node_config="x")

    rewritten(kit, spoil)
    with pytest.raises(ArtefactError) as caught:
        read_kit(kit)
    keys = {fault.split(":")[0] for fault in caught.value.faults}
    assert keys == {"host", "port", "release", "node", "ca_certificate", "node_config"}


# --- the commands -------------------------------------------------------------------------------------


def test_the_commands_end_to_end_with_the_fingerprint_asked_for(tmp_path: Path) -> None:
    folder, site = tmp_path / "c", tmp_path / "harbour"
    assert invoke("consortium", "init", folder, "--host", "fed.example.org").exit_code == 0
    shown = invoke("site", "init", site, "--name", "harbour")
    assert shown.exit_code == 0, shown.output
    line = next(line for line in shown.output.splitlines() if line.startswith("fingerprint "))
    said = line.removeprefix("fingerprint ")
    request = site / REQUEST
    wrong = said[:-1] + ("0" if said[-1] != "0" else "1")
    assert invoke("consortium", "add", folder, request, "--fingerprint", wrong).exit_code == 22
    assert invoke("consortium", "add", folder, request, given="yes\n").exit_code == 22
    added = invoke("consortium", "add", folder, request, given=said + "\n")
    assert added.exit_code == 0, added.output
    assert "queued until wardround consortium serve runs" in added.output
    kit = folder / "kits" / "kit-harbour.json"
    joined = invoke("site", "join", site, kit)
    assert joined.exit_code == 0, joined.output
    assert "is another release" not in joined.output
    consortium = next(line for line in joined.output.splitlines() if line.startswith("consortium "))
    listed = json.loads(invoke("consortium", "members", folder, "--json").stdout)
    assert listed["served"] is False
    assert [(m["name"], m["state"], m["online"]) for m in listed["members"]] == [("harbour", "queued", None)]
    assert len(listed["certificates"]) == 3
    kit.unlink()
    assert invoke("consortium", "kit", folder, "harbour").exit_code == 0
    assert read_kit(kit).consortium == plain_fingerprint(consortium.removeprefix("consortium "))
    assert invoke("consortium", "remove", folder, "harbour").exit_code == 0
    assert not kit.exists()
    assert invoke("consortium", "init", folder, "--host", "fed.example.org").exit_code == 12
    assert invoke("consortium", "serve", tmp_path / "nothing").exit_code == 10


def test_members_warns_below_thirty_days_and_exits_with_12_once_a_certificate_is_over(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    near = Consortium.create(tmp_path / "near", Settings(host="localhost"), 20, 825, now).folder
    warned = invoke("consortium", "members", near)
    assert warned.exit_code == 0
    assert "warning: the server's certificate ends on" in warned.stderr
    over = Consortium.create(tmp_path / "over", Settings(host="localhost"), 20, 825, now - timedelta(days=21))
    for command in ("members", "serve"):
        refused = invoke("consortium", command, over.folder)
        assert refused.exit_code == 12
        assert f"wardround consortium renew {over.folder}" in refused.stderr
    assert invoke("consortium", "renew", over.folder).exit_code == 0
    assert invoke("consortium", "members", over.folder).exit_code == 0


def test_removal_says_when_it_holds(tmp_path: Path, consortium: Consortium) -> None:
    add_member(consortium, joining(tmp_path, "harbour"), NOW)
    gone, known = remove_member(consortium, "harbour", NOW)
    assert (gone.state, known) == (State.leaving, False)


def test_a_fingerprint_must_be_given_in_full(tmp_path: Path) -> None:
    request = joining(tmp_path, "harbour")
    check_fingerprint(request, spoken(request.fingerprint))
    for given in ("", request.fingerprint[:-1], request.fingerprint[:16]):
        with pytest.raises(VerificationFailed):
            check_fingerprint(request, given)


# --- the node -----------------------------------------------------------------------------------------


def node_plan(tmp_path: Path, consortium: Consortium) -> NodePlan:
    kit, _ = add_member(consortium, joining(tmp_path, "harbour"), NOW)
    take_kit(tmp_path / "harbour", kit, NOW)
    return NodePlan.of(tmp_path / "harbour", Path("/run/wardround/guard.sock"), 9094)


def test_a_node_is_started_from_the_kit_alone(tmp_path: Path, consortium: Consortium) -> None:
    joining(tmp_path, "hill")
    with pytest.raises(ArtefactError, match="there is no kit"):
        NodePlan.of(tmp_path / "hill", Path("/run/guard.sock"), 9094)
    command = node_plan(tmp_path, consortium).command()
    given = dict(zip(command[1::2], command[2::2], strict=True))
    assert given == {
        "--root-certificates": str(tmp_path / "harbour" / AUTHORITY),
        "--superlink": "localhost:8443",
        "--auth-supernode-private-key": str(tmp_path / "harbour" / NODE_KEY),
        "--host": "127.0.0.1",
        "--port": "9094",
        "--node-config": 'guard="unix:/run/wardround/guard.sock"',
    }
    from flwr.common.config import parse_config_args

    assert parse_config_args([given["--node-config"]]) == {"guard": "unix:/run/wardround/guard.sock"}
    for path in ('/run/a".sock', "/run/a b.sock", "/run/a\n.sock"):
        with pytest.raises(ConfigError, match="misreads"):
            NodePlan.of(tmp_path / "harbour", Path(path), 9094)


def test_an_expired_kit_is_told_before_anything_starts(tmp_path: Path, consortium: Consortium) -> None:
    plan = node_plan(tmp_path, consortium)
    with pytest.raises(ArtefactError, match="wardround site join"):
        look(plan.kit, NOW + timedelta(days=826))


def test_a_port_that_is_taken_is_told_as_uvicorn_says_it(tmp_path: Path, consortium: Consortium) -> None:
    plan = node_plan(tmp_path, consortium)
    said = "[Errno 98] error while attempting to bind on ('127.0.0.1', 9094): address already in use"
    error = explain(1, [said, "RuntimeError: SuperNode Runtime HTTP API failed to start."], plan)
    assert isinstance(error, ConfigError)
    assert "choose another with --port" in error.message


def test_an_end_that_nobody_knows_shows_the_last_lines(tmp_path: Path, consortium: Consortium) -> None:
    plan = node_plan(tmp_path, consortium)
    error = explain(7, ["", "first", *map(str, range(8))], plan)
    assert isinstance(error, FederationError)
    assert error.faults == tuple(map(str, range(8)))


def test_a_member_knows_whether_it_belongs() -> None:
    belonging = {state: Member("a", "f", "n", "l", state, "").belongs for state in State}
    assert [state for state, belongs in belonging.items() if belongs] == [State.queued, State.registered]
