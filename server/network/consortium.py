"""A consortium's folder at the coordinator: what is set, and where things lie.

::

    FOLDER/
      consortium.json   host, ports, limits: may be edited while nothing is served
      ca.key ca.crt     the authority; the key is needed by `init` and `renew` alone
      tls/              the servers' keys and certificates
      members.json      who belongs to it (`server.network.registry`)
      kits/             one file a member, nothing secret
      superlink/ nginx/ what the two programs keep, model updates among it

The folder is its owner's alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from common.durable import write_atomic
from common.errors import ArtefactError, ConfigError
from common.network.certificates import Expiry
from common.network.documents import is_host
from common.schema_check import Fault, read_section
from common.strict_json import parse_strictly
from server.network.authority import (
    CA_CERTIFICATE,
    LOOPBACK,
    create_authority,
    issue,
    read_certificate,
    renew_authority,
)

SCHEMA = 1
SETTINGS = "consortium.json"
SMALLEST_BODY_MB = 6  # Flower sends tensors in chunks of 5 MiB
SERVER, LOOPBACK_STEM = Path("tls/server"), Path("tls/loopback")


@dataclass(frozen=True)
class Settings:
    """``consortium.json``.

    Attributes:
        host: by which hospitals reach the coordinator. port: the one that they reach.
        listen: the address that nginx listens on. superlink_port: on loopback, for nginx and this machine.
        body_mb: a longer request is refused unread.
    """

    schema: int = SCHEMA
    host: str = ""
    port: int = 8443
    listen: str = "0.0.0.0"
    superlink_port: int = 18443
    body_mb: int = 8

    def faults(self) -> Iterator[Fault]:
        if self.schema != SCHEMA:
            yield Fault("schema", f"{self.schema} is not {SCHEMA}", "use the release that made this folder")
        if not is_host(self.host):
            yield Fault("host", f"{self.host!r} is no host name", "write it in lower case, without https://")
        for key in ("port", "superlink_port"):
            if not 0 < getattr(self, key) < 1 << 16:
                yield Fault(key, f"{getattr(self, key)} is no port", "choose one from 1 to 65535")
        if self.port == self.superlink_port:
            yield Fault("superlink_port", "is the public port too", "choose another one")
        if not is_host(self.listen) or self.listen[-1].isalpha():
            yield Fault("listen", f"{self.listen!r} is no address", "write 0.0.0.0, or one of this machine's")
        if self.body_mb < SMALLEST_BODY_MB:
            fix = f"choose {SMALLEST_BODY_MB} or more: tensors come in chunks of 5 MiB"
            yield Fault("body_mb", f"{self.body_mb} is too small", fix)


@dataclass(frozen=True)
class Consortium:
    folder: Path
    settings: Settings

    @classmethod
    def create(cls, folder: Path, settings: Settings, days: int, ca_days: int, now: datetime) -> Consortium:
        """A new consortium. Raises ``ConfigError`` with every fault, ``ArtefactError`` if there is one."""
        _check(settings, str(folder))
        if (folder / SETTINGS).exists():
            raise ArtefactError(f"{folder} holds a consortium already: it is never overwritten")
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        consortium = cls(folder, settings)
        create_authority(folder, settings.host, ca_days, now)
        consortium.issue_servers(days, now)
        # Last: a folder with settings is a whole one.
        write_atomic(folder / SETTINGS, (json.dumps(asdict(settings), indent=2) + "\n").encode())
        return consortium

    @classmethod
    def open(cls, folder: Path) -> Consortium:
        """Raises ``ConfigError`` with every fault of its settings."""
        path = folder / SETTINGS
        try:
            plain = parse_strictly(path.read_text(encoding="utf-8"), "settings")
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be read ({error.strerror}): make a consortium with wardround consortium init"
            ) from error
        except (UnicodeDecodeError, ArtefactError) as error:
            raise ConfigError(f"{path} is not plain JSON: correct it") from error
        settings, faults = read_section(Settings, plain)
        assert isinstance(settings, Settings)
        _check(settings, str(path), faults)
        return cls(folder, settings)

    def issue_servers(self, days: int, now: datetime) -> None:
        """New certificates, under the same authority, for what hospitals reach and for what loopback does."""
        issue(self.folder, self.folder / SERVER, [self.settings.host], days, now)
        issue(self.folder, self.folder / LOOPBACK_STEM, LOOPBACK, days, now)

    def renew(self, days: int, ca_days: int | None, now: datetime) -> None:
        """Certificates anew; with ``ca_days`` the authority's as well, for its same key."""
        if ca_days is not None:
            renew_authority(self.folder, self.settings.host, ca_days, now)
        self.issue_servers(days, now)

    def expiries(self, now: datetime) -> list[Expiry]:
        """When the servers' and the authority's certificates end. Raises ``ArtefactError`` if one is gone."""
        named = (
            ("the server's certificate", SERVER.with_suffix(".crt")),
            ("the loopback's certificate", LOOPBACK_STEM.with_suffix(".crt")),
            ("the authority's certificate", Path(CA_CERTIFICATE)),
        )
        return [Expiry.of(what, read_certificate(self.folder / path), now) for what, path in named]

    def check_in_force(self, now: datetime) -> list[Expiry]:
        """Those that end soon. Raises ``ArtefactError`` with every one that is over, and what renews it."""
        found = self.expiries(now)
        if over := [str(expiry) for expiry in found if expiry.over]:
            authority = "--authority " if any("authority" in text for text in over) else ""
            raise ArtefactError(
                f"renew with: wardround consortium renew {authority}{self.folder}, then serve again", over
            )
        return [expiry for expiry in found if expiry.near]

    @property
    def ca_pem(self) -> str:
        return (self.folder / CA_CERTIFICATE).read_text(encoding="ascii")

    @property
    def loopback_address(self) -> str:
        return f"127.0.0.1:{self.settings.superlink_port}"


def _check(settings: Settings, subject: str, faults: list[Fault] | None = None) -> None:
    known = list(faults or [])
    told = {fault.key for fault in known}
    known += [fault for fault in settings.faults() if fault.key not in told]
    if known:
        raise ConfigError(f"{subject}: the settings of the consortium are wrong", [str(f) for f in known])
