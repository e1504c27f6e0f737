"""A coordinator and its hospitals as they are run: the SuperLink and nginx on loopback, over TLS.

The stranger of these tests holds what anybody may hold, the authority's certificate.
"""

from __future__ import annotations

import signal
import socket
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from google.protobuf.message import Message

from client.network.joining import KIT, NODE_KEY
from client.network.node import NodePlan, explain
from common.errors import ArtefactError, FederationError
from common.network.children import Child, flower_environment
from common.network.documents import read_kit, write_document
from common.network.identity import public_pem, read_node_key
from server.network.consortium import Consortium
from server.network.control import control_of
from server.network.membership import kit_for
from server.network.nginx import FLEET_VERBS
from server.network.registry import Registry
from tests.e2e.coordinator import START_S, Fleet, ended, fleet, running, wait_for
from tests.joining_sites import invoke, joining
from tests.tls import free_port, tls_server

__all__ = ["fleet"]  # a fixture

MEBIBYTE = 1 << 20
PROTOBUF = {"Content-Type": "application/protobuf"}
CLOSED = {401, 403, 404}


# --- the stranger -------------------------------------------------------------------------------------


@contextmanager
def client_of(
    kind: type[ProtobufClient], address: str, ca: bytes, *keys: ec.EllipticCurvePrivateKey
) -> Iterator[Any]:
    signed = [NodeAuthHttpInterceptor(key, key.public_key()) for key in keys]
    client = kind.from_server_address(address, insecure=False, root_certificates=ca, interceptors=signed)
    try:
        yield client
    finally:
        client.close()


def status_of(call: Callable[[Message], Message], request: Message) -> int:
    """What the server answers to one of Flower's own calls."""
    try:
        call(request)
    except httpx.HTTPStatusError as error:
        return error.response.status_code
    return 200


def test_a_stranger_with_the_certificate_cannot_register_a_node_or_start_a_run(fleet: Fleet) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    pem = public_pem(key.public_key())
    with client_of(FleetHttpClient, fleet.public, fleet.ca, key) as node:
        assert status_of(node.RegisterNode, RegisterNodeFleetRequest(public_key=pem)) == 404
        assert status_of(node.UnregisterNode, UnregisterNodeFleetRequest(node_id=1)) == 404
        assert status_of(node.PullMessages, PullMessagesRequest()) == 401
        assert status_of(node.ActivateNode, ActivateNodeRequest(public_key=pem)) == 412
    with client_of(ControlHttpClient, fleet.public, fleet.ca) as control:
        assert status_of(control.RegisterNode, RegisterNodeRequest(public_key=pem)) == 404
        assert status_of(control.StartRun, StartRunRequest()) == 404
        assert status_of(control.ListNodes, ListNodesRequest()) == 404
    # The calls are right: from this machine itself they are answered.
    with client_of(ControlHttpClient, fleet.consortium.loopback_address, fleet.ca) as inside:
        assert status_of(inside.ListNodes, ListNodesRequest()) == 200


def superlinks_paths() -> set[str]:
    """Every path that Flower's SuperLink serves, from its own description."""
    from flwr.superlink.routers.control.router import router as control
    from flwr.superlink.routers.fleet.router import router as fleet_router

    return {route.path for router in (control, fleet_router) for route in router.routes}  # type: ignore[attr-defined]


def test_outside_there_is_nothing_but_the_fleet_verbs(fleet: Fleet) -> None:
    published = {f"/v1/fleet/{verb}" for verb in FLEET_VERBS}
    served = superlinks_paths()
    assert published < served
    assert len(served) > 30
    pages = {
        "/",
        "/health",
        "/docs",
        "/openapi.json",
        "/redoc",
        "/v1/runtime/acquire-task",
        "/v1/fleet",
        "/v1/fleet/",
    }
    with httpx.Client(base_url=f"https://{fleet.public}", verify=fleet.context()) as outside:
        for path in sorted(pages | served - published):
            for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
                answer = outside.request(method, path, headers=PROTOBUF)
                assert answer.status_code == 404, (method, path)
                assert "flower" not in answer.text.lower()
        for path in sorted(published):
            for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS"):
                assert outside.request(method, path).status_code == 403, (method, path)
            assert outside.post(path, headers=PROTOBUF).status_code == 401, path
    inside = f"https://{fleet.consortium.loopback_address}"
    with httpx.Client(base_url=inside, verify=fleet.context()) as loopback:
        for path in ("/docs", "/openapi.json"):  # they are there, behind
            assert loopback.get(path).status_code == 200


TRICKS = (
    "/v1/fleet/pull-messages/../../control/list-nodes",
    "/v1/fleet/pull-messages/..%2f..%2fcontrol/list-nodes",
    "/v1/fleet/pull-messages%2f..%2f..%2fcontrol%2flist-nodes",
    "/v1/fleet/pull-messages/%2e%2e/%2e%2e/control/list-nodes",
    "/v1/fleet/..%2fcontrol/list-nodes",
    "/v1/fleet/pull-messages;/../../control/list-nodes",
    "/v1/fleet/pull-messages%00/../../control/list-nodes",
    "/v1/fleet/pull-messages%3f/../../control/list-nodes",
    "/v1/fleet/pull-messages%0d%0aX:%20y",
    "//v1//control//list-nodes",
    "/V1/CONTROL/LIST-NODES",
    "/v1/control/list-nodes?/v1/fleet/pull-messages",
    "/v1/control/list-nodes#/v1/fleet/pull-messages",
    "/v1/fleet/../docs",
    "/v1/fleet/pull-messages/",
    "/v1/fleet/register-node",
    "/v1/fleet/./register-node",
    "/v1/fleet/register%2dnode",
    "\\v1\\control\\list-nodes",
    "https://localhost/v1/control/list-nodes",
)


@pytest.mark.parametrize("target", TRICKS)
def test_no_spelling_of_a_path_gets_past_the_list(fleet: Fleet, target: str) -> None:
    port = fleet.consortium.settings.port
    request = f"POST {target} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/protobuf\r\n"
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        fleet.context().wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        secure.sendall((request + "Content-Length: 0\r\nConnection: close\r\n\r\n").encode())
        answer = b"".join(iter(lambda: secure.recv(4096), b""))
    status = int(answer.split(None, 2)[1])
    assert status in {*CLOSED, 400}, answer
    # 401 is a member's verb that asked who is there; what lies behind would have answered 200.
    assert b"registered_at" not in answer


def test_a_second_request_behind_a_first_is_refused_too(fleet: Fleet) -> None:
    """Smuggled in a body whose length the two servers could read differently."""
    hidden = b"POST /v1/control/list-nodes HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
    head = (
        b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/protobuf\r\n"
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    )
    with (
        socket.create_connection(("127.0.0.1", fleet.consortium.settings.port), timeout=10) as plain,
        fleet.context().wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        secure.sendall(head + hidden)
        secure.settimeout(3)
        answer = b""
        try:
            while part := secure.recv(4096):
                answer += part
        except TimeoutError:
            pass
    assert b" 200" not in answer
    assert answer.count(b"HTTP/1.1 4") >= 1


def test_no_header_of_a_node_is_in_a_log_and_no_body_on_the_disk(fleet: Fleet) -> None:
    marked = b64encode(b"the signature of a node, kept nowhere").decode()
    headers = {**PROTOBUF, "flwr-signature": marked, "flwr-public-key": marked, "flwr-timestamp": marked}
    update = b"nobody keeps this".ljust(int(5.5 * MEBIBYTE), b"\x01")
    body = PushObjectRequest(object_id="0" * 64, object_content=update).SerializeToString()
    with httpx.Client(base_url=f"https://{fleet.public}", verify=fleet.context(), timeout=30) as outside:
        assert outside.post("/v1/fleet/push-object", headers=headers, content=body).status_code in (
            400,
            401,
            422,
        )
        over = outside.post("/v1/fleet/push-object", headers=headers, content=b"\x01" * (8 * MEBIBYTE + 1))
        assert over.status_code == 413
    # nginx notes a request when it has let go of its connection.
    wait_for('push-object HTTP/1.1" 413', fleet.consortium.folder / "nginx" / "access.log", fleet.serving)
    for path in (path for path in fleet.consortium.folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        assert marked.encode() not in data, path
        assert b"nobody keeps this" not in data, path
    assert "temporary file" not in (fleet.consortium.folder / "nginx" / "error.log").read_text()


# --- the hospitals ------------------------------------------------------------------------------------


def test_a_member_connects_and_is_refused_once_it_is_removed(fleet: Fleet) -> None:
    node = fleet.node("harbour", free_port())
    with running(*node) as (process, said):
        wait_for("SuperNode ID", said, process)
        assert fleet.online("harbour") is True
        assert fleet.online("hill") is False
        assert "activate-node" in (fleet.consortium.folder / "nginx" / "access.log").read_text()
        gone = invoke("consortium", "remove", fleet.consortium.folder, "harbour")
        assert "refused from now on" in gone.output
        code, text = ended(process, said)
        assert code == 30
        assert "turned this site away while it was connected" in text
    # It may come again with the same key, and is refused like whoever never was a member.
    key = read_node_key(fleet.sites / "harbour" / NODE_KEY)
    with client_of(FleetHttpClient, fleet.public, fleet.ca, key) as again:
        asked = ActivateNodeRequest(public_key=public_pem(key.public_key()))
        assert status_of(again.ActivateNode, asked) == 412
    assert fleet.online("harbour") is False


def test_a_node_that_was_never_added_is_refused(fleet: Fleet) -> None:
    with running(*fleet.node("stray", free_port())) as (process, said):
        code, text = ended(process, said)
    assert code == 30
    assert "does not take this site's key" in text
    assert "was removed: ask for wardround consortium members" in text


def test_a_member_leaves_when_it_is_told_to(fleet: Fleet) -> None:
    with running(*fleet.node("hill", free_port())) as (process, said):
        wait_for("SuperNode ID", said, process)
        process.send_signal(signal.SIGINT)
        code, text = ended(process, said)
    assert code == 0, text
    assert text.endswith("node of hill ended\n")
    assert fleet.online("hill") is False  # it said goodbye


def test_a_node_registered_by_hand_is_turned_out(fleet: Fleet) -> None:
    pem = public_pem(ec.generate_private_key(ec.SECP384R1()).public_key())
    with client_of(ControlHttpClient, fleet.consortium.loopback_address, fleet.ca) as inside:
        node = inside.RegisterNode(RegisterNodeRequest(public_key=pem)).node_id
        wait_for("a node that is no member was registered", fleet.said, fleet.serving)
        found = inside.ListNodes(ListNodesRequest()).nodes_info
    assert {entry.node_id: entry.status for entry in found}[node] == "unregistered"
    assert Registry(fleet.consortium.folder).find("hill")
    with control_of(fleet.consortium) as control:
        with pytest.raises(FederationError, match="takes no key back that was removed: it's"):
            control.register(pem, "it")
        other = Ed25519PrivateKey.generate().public_key()
        with pytest.raises(FederationError, match=r"the SuperLink refused \(4\d\d: "):
            control.register(other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), "other")


def test_a_wrong_authority_an_expired_certificate_and_nobody_are_told_apart(fleet: Fleet) -> None:
    folder, now = fleet.sites / "hill", datetime.now(UTC)
    kept, kit = (folder / KIT).read_bytes(), read_kit(folder / KIT)
    other = Consortium.create(fleet.sites / "other", fleet.consortium.settings, 90, 825, now)
    over = Consortium.create(
        fleet.sites / "over", fleet.consortium.settings, 90, 825, now - timedelta(days=100)
    )
    request = joining(fleet.sites, "hill")
    with tls_server(over.folder / "tls/server.crt", over.folder / "tls/server.key") as expired:
        for changed, code, told in (
            (kit_for(other, request), 12, "not of this kit's authority"),
            (
                replace(kit_for(over, request), port=expired),
                12,
                "has expired: the coordinator runs wardround",
            ),
            (replace(kit, port=free_port()), 30, "nobody listens on localhost:"),
        ):
            write_document(folder / KIT, changed)
            ended_at = invoke(*fleet.node("hill", free_port()))
            assert ended_at.exit_code == code, ended_at.output
            assert told in ended_at.stderr
            assert "Starting Flower SuperNode" not in ended_at.output
    (folder / KIT).write_bytes(kept)


def test_what_flower_itself_says_of_a_certificate_is_understood(fleet: Fleet) -> None:
    """A certificate may change while a node runs, and nobody looks at it first then."""
    other = Consortium.create(fleet.sites / "third", fleet.consortium.settings, 90, 825, datetime.now(UTC))
    plan = NodePlan.of(fleet.sites / "hill", fleet.sites / "guard.sock", free_port())
    authority = fleet.sites / "theirs.crt"
    authority.write_text(other.ca_pem)
    mistrusting = [str(authority) if word.endswith(".crt") else word for word in plan.command()]
    node = Child("node", mistrusting, lambda _: None, flower_environment(fleet.sites / "flower"))
    try:
        code = node.wait(START_S)
        assert code is not None, node.lines()
        assert isinstance(explain(code, node.lines(), plan), ArtefactError)
    finally:
        node.stop()


def test_serving_ends_with_both_its_programs(fleet: Fleet) -> None:
    """The last of this file: it ends what the others use."""
    second = invoke("consortium", "serve", fleet.consortium.folder)
    assert second.exit_code == 10  # while the first serves
    assert "another wardround consortium serve" in second.stderr
    fleet.serving.send_signal(signal.SIGTERM)
    code, text = ended(fleet.serving, fleet.said)
    assert (code, text.endswith("ended\n")) == (0, True), text
    for port in (fleet.consortium.settings.port, fleet.consortium.settings.superlink_port):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
    assert fleet.online("hill") is None
