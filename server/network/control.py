"""The SuperLink's control API, from this machine alone: who is registered, and who is there.

Flower's own `flwr supernode` lists nodes without their keys, and a member is known by its key; so this speaks
to the API itself, which is Flower's own affair and may change: Wardround pins 1.41, and a test runs it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from cryptography.hazmat.primitives import serialization
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

from common.errors import FederationError
from common.network.identity import fingerprint_of
from common.network.proxies import loopback_unproxied
from server.network.consortium import Consortium

UNREGISTERED = "unregistered"
ONLINE = "online"


@dataclass(frozen=True)
class Node:
    """A SuperNode as the SuperLink sees it. ``status``: registered, online, offline or unregistered."""

    node_id: int
    fingerprint: str
    status: str


class Control:
    """A `server.network.registry.Fleet`. Raises ``FederationError`` for what is refused or not answered."""

    def __init__(self, client: ControlHttpClient) -> None:
        self.client = client

    def nodes(self) -> list[Node]:
        found = self.ask(self.client.ListNodes, ListNodesRequest()).nodes_info
        return [Node(node.node_id, _fingerprint(node.public_key), node.status) for node in found]

    def register(self, pem: bytes, name: str) -> int:
        """The node's id; that of its first registration if it is known already."""
        wanted = _fingerprint(pem)
        for node in self.nodes():
            if node.fingerprint == wanted:
                if node.status == UNREGISTERED:
                    raise FederationError(f"the SuperLink takes no key back that was removed: {name}'s")
                return node.node_id
        made = self.ask(self.client.RegisterNode, RegisterNodeRequest(public_key=pem, name=name))
        return int(made.node_id)

    def unregister(self, pem: bytes) -> None:
        """From now on it is refused, in the middle of a run too. One that is not known is no fault."""
        self.turn_out(_fingerprint(pem))

    def fingerprints(self) -> list[str]:
        """The fingerprints of all that may connect."""
        return [node.fingerprint for node in self.nodes() if node.status != UNREGISTERED]

    def turn_out(self, fingerprint: str) -> None:
        for node in self.nodes():
            if node.fingerprint == fingerprint and node.status != UNREGISTERED:
                self.ask(self.client.UnregisterNode, UnregisterNodeRequest(node_id=node.node_id))

    @staticmethod
    def ask(call: Callable[[Any], Any], request: Any) -> Any:
        try:
            return call(request)
        except httpx.HTTPStatusError as error:
            said = f"{error.response.status_code}: {error.response.text[:200]}"
            raise FederationError(f"the SuperLink refused ({said})") from error
        except (httpx.HTTPError, RuntimeError) as error:
            raise FederationError(f"the SuperLink does not answer: {error}") from error


@contextmanager
def control_of(consortium: Consortium) -> Iterator[Control]:
    """The control API of the consortium's SuperLink."""
    os.environ.update(loopback_unproxied())  # httpx asks it for proxies
    client = ControlHttpClient.from_server_address(
        server_address=consortium.loopback_address,
        insecure=False,
        root_certificates=consortium.ca_pem.encode(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )
    try:
        yield Control(client)
    finally:
        client.close()


def _fingerprint(pem: bytes) -> str:
    return fingerprint_of(serialization.load_pem_public_key(pem))
