"""A hospital's request becomes a membership and a kit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from common.code_digest import code_sha256
from common.errors import VerificationFailed
from common.network.documents import SCHEMA, JoinRequest, Kit, write_document
from common.network.identity import plain_fingerprint, spoken
from server.network.authority import authority_fingerprint
from server.network.consortium import Consortium
from server.network.registry import Member, Registry
from server.network.service import online, settle_if_served

KITS = "kits"


def check_fingerprint(request: JoinRequest, given: str) -> None:
    """Raises ``VerificationFailed`` unless ``given`` is the fingerprint of the request's key, in full."""
    if plain_fingerprint(given) != request.fingerprint:
        raise VerificationFailed(
            f"the fingerprint is not that of this request ({spoken(request.fingerprint)}): ask the hospital, "
            "by a number that you know, what its wardround site init showed"
        )


def kit_for(consortium: Consortium, member: Member | JoinRequest) -> Kit:
    """The same for the same member as long as the authority's certificate and the release are the same."""
    return Kit(
        schema=SCHEMA,
        consortium=authority_fingerprint(consortium.folder),
        host=consortium.settings.host,
        port=consortium.settings.port,
        ca_certificate=consortium.ca_pem,
        release=code_sha256(),
        site=member.name,
        node=member.fingerprint,
    )


def add_member(consortium: Consortium, request: JoinRequest, now: datetime) -> tuple[Path, bool]:
    """The kit's file, and whether the SuperLink knows the member already. Raises like `Registry.add`."""
    Registry(consortium.folder).add(request, now)
    path = consortium.folder / KITS / f"kit-{request.name}.json"
    write_document(path, kit_for(consortium, request))
    return path, settle_if_served(consortium)


def remove_member(consortium: Consortium, name: str, now: datetime) -> tuple[Member, bool]:
    """Who belongs no more, and whether the SuperLink knows that already."""
    gone = Registry(consortium.folder).remove(name, now)
    (consortium.folder / KITS / f"kit-{gone.name}.json").unlink(missing_ok=True)
    return gone, settle_if_served(consortium)


@dataclass(frozen=True)
class Roll:
    """What ``consortium members`` shows. ``online``: None where no SuperLink runs."""

    rows: list[tuple[Member, bool | None]]
    served: bool

    def to_json(self) -> list[dict[str, Any]]:
        return [
            # A node's id has up to 20 digits, more than some readers of JSON keep of a number.
            asdict(member)
            | {"node_id": None if member.node_id is None else str(member.node_id), "online": there}
            for member, there in self.rows
        ]


def roll_of(consortium: Consortium) -> Roll:
    """Every member, and whether its node is connected."""
    status = online(consortium)
    rows = [
        (member, None if status is None else status.get(member.fingerprint) == "online")
        for member in Registry(consortium.folder).members()
    ]
    return Roll(rows, status is not None)
