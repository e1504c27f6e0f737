"""Who belongs to the consortium: ``members.json``, by the fingerprint of a hospital's key.

A member is added or removed here first, and then at the SuperLink if it runs (`settle`); what could not be
told to it waits. So the file is right whether or not anything is served.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from common.durable import write_atomic
from common.errors import ArtefactError, ConfigError, FederationError
from common.network.documents import JoinRequest
from common.network.identity import fingerprint_of, plain_fingerprint, public_pem, read_public_line
from common.strict_json import read_strictly

MEMBERS = "members.json"
SCHEMA = 1


class State(StrEnum):
    queued = "queued"  # added; the SuperLink does not know it yet
    registered = "registered"
    leaving = "leaving"  # removed; the SuperLink does not know that yet
    removed = "removed"


BELONGING = (State.queued, State.registered)
UNSETTLED = (State.queued, State.leaving)


@dataclass(frozen=True)
class Member:
    """A hospital. ``node_key`` as in `JoinRequest`; times in UTC, ISO 8601; ``node_id``: the SuperLink's."""

    name: str
    fingerprint: str
    node_key: str
    ledger_key: str
    state: State
    added: str
    removed: str | None = None
    node_id: int | None = None

    @property
    def belongs(self) -> bool:
        return self.state in BELONGING

    @property
    def pem(self) -> bytes:
        """The key as Flower keeps it."""
        key = read_public_line(self.node_key)
        if key is None or fingerprint_of(key) != self.fingerprint:
            raise ArtefactError(
                f"the entry of {self.name} in {MEMBERS} is damaged: restore it from its backup"
            )
        return public_pem(key)


@dataclass(frozen=True)
class _File:
    schema: int
    members: list[Member]


class Fleet(Protocol):
    """What `settle` asks of a running SuperLink; `server.network.control` is the one."""

    def register(self, pem: bytes, name: str) -> int: ...

    def unregister(self, pem: bytes) -> None: ...

    def fingerprints(self) -> list[str]: ...

    def turn_out(self, fingerprint: str) -> None: ...


class Registry:
    """The members of one consortium. Every change is made under a lock and is on the disk when it returns."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def members(self) -> list[Member]:
        """All that ever were, in the order of joining. Raises ``ArtefactError`` if the file is damaged."""
        path = self._folder / MEMBERS
        if not path.exists():
            return []
        try:
            found = read_strictly(path.read_text(encoding="utf-8"), _File, "members")
        except (OSError, UnicodeDecodeError, ArtefactError) as error:
            raise ArtefactError(f"{path} is damaged: restore it from its backup") from error
        if found.schema != SCHEMA:
            raise ArtefactError(f"{path} has schema {found.schema}: use the release that wrote it")
        return found.members

    def find(self, name_or_fingerprint: str) -> Member:
        """The one member of that name or fingerprint. Raises ``ConfigError``."""
        wanted = plain_fingerprint(name_or_fingerprint)
        belonging = [member for member in self.members() if member.belongs]
        for member in belonging:
            if member.name == name_or_fingerprint or (wanted and member.fingerprint == wanted):
                return member
        names = ", ".join(member.name for member in belonging) or "there is none"
        raise ConfigError(f"no member is {name_or_fingerprint!r}; members: {names}")

    def check(self, request: JoinRequest) -> None:
        """Raises ``ConfigError`` with everything that keeps ``request`` from becoming a member."""
        faults = []
        for member in self.members():
            if member.fingerprint == request.fingerprint:
                faults.append(
                    f"node_key: belongs to {member.name} already"
                    if member.belongs
                    else f"node_key: was removed as {member.name}, for good; the site moves network/node.key "
                    "away and runs wardround site init again"
                )
            elif member.belongs and member.name == request.name:
                faults.append(f"name: {member.name} is a member with another key; consortium remove it first")
            elif member.belongs and member.ledger_key == request.ledger_key:
                faults.append(f"ledger_key: is that of the member {member.name}")
        if faults:
            raise ConfigError(f"{request.name} cannot join", faults)

    def add(self, request: JoinRequest, now: datetime) -> Member:
        """Raises ``ConfigError`` like `check`."""
        with self._locked() as members:
            self.check(request)
            member = Member(
                request.name, request.fingerprint, request.node_key, request.ledger_key, State.queued,
                now.isoformat(timespec="seconds"),
            )  # fmt: skip
            members.append(member)
        return member

    def remove(self, name_or_fingerprint: str, now: datetime) -> Member:
        """It belongs no more, from here on. Raises ``ConfigError`` if nobody is so called."""
        with self._locked() as members:
            member = self.find(name_or_fingerprint)
            # One that was queued may be at the SuperLink all the same: we may have been stopped in between.
            gone = replace(member, state=State.leaving, removed=now.isoformat(timespec="seconds"))
            members[members.index(member)] = gone
        return gone

    def unsettled(self) -> bool:
        return any(member.state in UNSETTLED for member in self.members())

    def settle(self, fleet: Fleet, anew: bool = False) -> list[Member]:
        """Tell ``fleet`` what it has not heard, and return those that it now has. May be repeated at will.

        ``anew``: tell it of every member, as a SuperLink with a new database must be. Raises
        ``FederationError`` once all have had their turn, with each that it refused.
        """
        settled, refused = [], []
        with self._locked() as members:
            for index, member in enumerate(members):
                try:
                    members[index] = _told(fleet, member, anew)
                except FederationError as error:
                    refused.append(f"{member.name}: {error}")
                if members[index] != member:
                    self._save(members)
                    settled.append(members[index])
        if refused:
            raise FederationError("the SuperLink was not told of every member", refused)
        return settled

    def turn_out_strangers(self, fleet: Fleet) -> list[str]:
        """Unregister whoever is no member, however it came to be registered; return the fingerprints."""
        with self._locked() as members:
            known = {member.fingerprint for member in members if member.state is not State.removed}
            strangers = [key for key in fleet.fingerprints() if key not in known]
            for fingerprint in strangers:
                fleet.turn_out(fingerprint)
        return strangers

    @contextmanager
    def _locked(self) -> Iterator[list[Member]]:
        """The members, to be changed in place; written when the block ends well."""
        with (self._folder / f"{MEMBERS}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            members = self.members()
            before = list(members)
            yield members
            if members != before:
                self._save(members)

    def _save(self, members: list[Member]) -> None:
        document = {"schema": SCHEMA, "members": [asdict(member) for member in members]}
        write_atomic(self._folder / MEMBERS, (json.dumps(document, indent=1) + "\n").encode())


def _told(fleet: Fleet, member: Member, anew: bool) -> Member:
    """``member`` as it stands once ``fleet`` has heard of it."""
    if member.state is State.queued or (anew and member.state is State.registered):
        return replace(member, state=State.registered, node_id=fleet.register(member.pem, member.name))
    if member.state is State.leaving:
        fleet.unregister(member.pem)
        return replace(member, state=State.removed)
    return member
