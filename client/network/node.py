"""The hospital's SuperNode: how it is started from the kit, and what its end means in plain words."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from client.network.joining import AUTHORITY, KIT, NODE_KEY
from common.errors import ArtefactError, ConfigError, FederationError, WardroundError
from common.network.certificates import Expiry
from common.network.children import Child, flower_environment, flower_program
from common.network.documents import Kit, read_kit
from common.network.handshake import shake_hands
from common.network.identity import fingerprint_of, read_node_key, spoken

LOOK_S = 0.5
_SOCKET = re.compile(r"[\w./@+,=-]+")
# Flower's words for what went wrong (flwr 1.41), as it writes them to its log.
_NOT_ACTIVATED = "[code: 2004]"
_GRACEFUL = "SuperNode terminated gracefully"  # also how it ends itself when it is answered with 401
_PORT_TAKEN = "address already in use"
_TLS = "SSL/TLS handshake error"


@dataclass(frozen=True)
class NodePlan:
    """A SuperNode about to start.

    Attributes:
        folder: the site's. kit: where to. fingerprint: of its key. guard: the guard's socket.
        runtime_port: on loopback, for the processes of this SuperNode; one a SuperNode on a machine.
        secret: what its executor is known by; None: the SuperNode starts couriers itself, of any bundle.
    """

    folder: Path
    kit: Kit
    fingerprint: str
    guard: Path
    runtime_port: int
    secret: Path | None = None

    @classmethod
    def of(cls, folder: Path, guard: Path, runtime_port: int, secret: Path | None = None) -> NodePlan:
        """Raises ``ArtefactError`` if there is no kit or key, ``ConfigError`` for a socket's path."""
        if not _SOCKET.fullmatch(str(guard)):
            raise ConfigError(f"{guard}: Flower misreads this path; use letters, digits and . _ - @ + , =")
        kit = read_kit(folder / KIT) if (folder / KIT).exists() else None
        if kit is None:
            raise ArtefactError(f"there is no kit in {folder}: wardround site join {folder} KIT")
        key = read_node_key(folder / NODE_KEY)
        return cls(folder, kit, fingerprint_of(key.public_key()), guard, runtime_port, secret)

    def command(self) -> list[str]:
        """Flower's own program: to this kit's coordinator alone, over TLS, with this site's key."""
        executed = ["--isolation", "process", "--superexec-auth-secret-file", str(self.secret)]
        return [
            flower_program("flower-supernode"),
            "--root-certificates", str(self.folder / AUTHORITY),
            "--superlink", self.kit.address,
            "--auth-supernode-private-key", str(self.folder / NODE_KEY),
            "--host", "127.0.0.1", "--port", str(self.runtime_port),
            "--node-config", f'guard="unix:{self.guard}"',
            *([] if self.secret is None else executed),
        ]  # fmt: skip


def run_node(
    plan: NodePlan, stopped: Callable[[float], bool], say: Callable[[str], None], now: datetime
) -> None:
    """The SuperNode runs until ``stopped``, which waits the seconds that it is given at most.

    Guarantee: wrong authority, expired certificate, nobody there and not registered are told apart, by
    their message and their exit code.

    Raises:
        ArtefactError: a certificate is over, or not of the kit's authority.
        FederationError: the coordinator is not reached, or does not take this site's key.
    """
    for warning in look(plan.kit, now):
        say(f"warning: {warning}")
    home = plan.folder / "network" / "flower"
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    node = Child("the SuperNode", plan.command(), say, flower_environment(home))
    try:
        while node.ended is None and not stopped(LOOK_S):
            pass
        code = node.ended
    finally:
        node.stop()
    if code is not None:
        raise explain(code, node.lines(), plan)


def look(kit: Kit, now: datetime) -> list[str]:
    """What will soon be wrong: certificates, clocks. Raises like `run_node`, before anything is started."""
    authority = Expiry.of("the kit's authority", kit.authority, now)
    if authority.over:
        raise ArtefactError(f"{authority}: ask the coordinator for a new kit, then wardround site join")
    server = shake_hands(kit.host, kit.port, kit.ca_certificate, now)
    found = [f"{expiry}: tell the coordinator" for expiry in (server.expiry, authority) if expiry.near]
    if server.clock_s is not None and server.apart:
        found.append(
            f"this machine's clock and the coordinator's are {abs(server.clock_s):.0f} s apart: at 300 s "
            "this site is turned away; set it (timedatectl set-ntp true)"
        )
    return found


def explain(code: int, lines: Sequence[str], plan: NodePlan) -> WardroundError:
    """What a SuperNode's end by itself means, from its exit code and its last lines."""
    text = "\n".join(lines)
    where = plan.kit.address
    if _NOT_ACTIVATED in text:
        return FederationError(
            f"the coordinator at {where} does not take this site's key",
            [
                "it is not a member, or was removed: ask for wardround consortium members, and compare the "
                f"fingerprint {spoken(plan.fingerprint)}",
                "or it ended less than a minute ago without saying goodbye: wait a minute and start it again",
            ],
        )
    if _GRACEFUL in text:
        return FederationError(
            f"the coordinator at {where} turned this site away while it was connected",
            [
                "it was removed: ask for wardround consortium members",
                "or this machine's clock is wrong by five minutes, or somebody here ended the process",
            ],
        )
    if _TLS in text:
        return ArtefactError(f"the certificate of {where} was refused: see above, and compare fingerprints")
    if _PORT_TAKEN in text:
        return ConfigError(f"port {plan.runtime_port} of this machine is taken: choose another with --port")
    last = [line for line in lines if line][-8:]
    return FederationError(f"the SuperNode ended by itself with {code}", last)
