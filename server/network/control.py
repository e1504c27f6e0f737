"""The SuperLink's control API, from this machine alone: who is registered and there, and what runs.

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
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

from common.canonical import sha256_of
from common.errors import FederationError
from common.network.identity import fingerprint_of_pem
from common.network.proxies import loopback_unproxied
from server.network.consortium import Consortium

UNREGISTERED = "unregistered"
FINISHED = "finished"


@dataclass(frozen=True)
class Node:
    """A SuperNode as the SuperLink sees it. ``status``: registered, online, offline or unregistered."""

    node_id: int
    fingerprint: str
    status: str


class Control:
    """A `server.network.registry.Fleet`. Raises ``FederationError`` for what is refused or not answered."""

    def __init__(self, client: ControlHttpClient) -> None:
        self._client = client

    def nodes(self) -> list[Node]:
        found = self._ask(self._client.ListNodes, ListNodesRequest()).nodes_info
        return [Node(node.node_id, fingerprint_of_pem(node.public_key), node.status) for node in found]

    def register(self, pem: bytes, name: str) -> int:
        """The node's id; that of its first registration if it is known already."""
        wanted = fingerprint_of_pem(pem)
        for node in self.nodes():
            if node.fingerprint == wanted:
                if node.status == UNREGISTERED:
                    raise FederationError(f"the SuperLink takes no key back that was removed: {name}'s")
                return node.node_id
        made = self._ask(self._client.RegisterNode, RegisterNodeRequest(public_key=pem, name=name))
        return int(made.node_id)

    def unregister(self, pem: bytes) -> None:
        """From now on it is refused, in the middle of a run too. One that is not known is no fault."""
        self.turn_out(fingerprint_of_pem(pem))

    def fingerprints(self) -> list[str]:
        """The fingerprints of all that may connect."""
        return [node.fingerprint for node in self.nodes() if node.status != UNREGISTERED]

    def turn_out(self, fingerprint: str) -> None:
        for node in self.nodes():
            if node.fingerprint == fingerprint and node.status != UNREGISTERED:
                self._ask(self._client.UnregisterNode, UnregisterNodeRequest(node_id=node.node_id))

    def start_run(self, bundle: bytes, config: dict[str, str]) -> int:
        """Start a run of ``bundle`` with ``config`` over its own run configuration; the run's number."""
        fab = fab_to_proto(Fab(sha256_of(bundle), bundle, {}))
        override = user_config_to_proto(dict(config))
        return int(
            self._ask(self._client.StartRun, StartRunRequest(fab=fab, override_config=override)).run_id
        )

    def run_is_over(self, number: int) -> bool:
        found = self._ask(self._client.ListRuns, ListRunsRequest(run_id=number)).run_dict
        return number in found and found[number].status.status == FINISHED

    def stop_run(self, number: int) -> None:
        self._ask(self._client.StopRun, StopRunRequest(run_id=number))

    @staticmethod
    def _ask(call: Callable[[Any], Any], request: Any) -> Any:
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
