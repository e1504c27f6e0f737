"""``site executor`` from its options to its end: what it checks, says and makes before the first task."""

from __future__ import annotations

import getpass
import ipaddress
import os
import secrets
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from client.network.executor import Launcher, Node, SiteExecutor
from client.network.task import Courier, NoSandbox, Sandbox, exposure_faults, sandbox_faults
from common.config import load_site
from common.errors import ConfigError
from common.privacy.keys import write_secret
from common.relay import Destination
from common.signals import told_to_end

SECRET = "executor.secret"
SECRET_BYTES = 32


@dataclass(frozen=True)
class Settings:
    """What `wardround site executor` was given; see its help."""

    folder: Path
    node: str
    socket: Path
    courier_user: str | None = None
    secret_file: Path | None = None
    root_certificates: Path | None = None
    no_sandbox: bool = False
    longest_s: float = 86400.0


def execute(settings: Settings, say: Callable[[str], None]) -> None:
    """Run the executor until this process is told to end.

    Raises:
        ConfigError: no sandbox can be made, the courier may not be who it is, or the link is not safe.
        FederationError: as `SiteExecutor.run`.
    """
    node = Node(settings.node, _secret(settings), _certificates(settings))
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wardround-courier-")))
        launcher = _launcher(settings, scratch, say)
        told = stack.enter_context(told_to_end())
        say(f"executor for the SuperNode on {settings.node}, process {os.getpid()}")
        SiteExecutor(settings.folder, node, launcher, say, settings.longest_s).run(told.wait)
    say("executor ended")


def _launcher(settings: Settings, scratch: Path, say: Callable[[str], None]) -> Launcher:
    if settings.no_sandbox:
        say(
            f"warning: no sandbox: a bundle runs as {getpass.getuser()}, and can read and change what that "
            "user can: this site's folder and images, the SuperNode's key, other tasks. Never so where there "
            "are patients' data"
        )
        return NoSandbox(scratch)
    door = settings.socket.resolve().parent
    faults = sandbox_faults()
    try:
        node = Destination.parse(settings.node)
    except ValueError:
        node = None
        faults.append(f"--node {settings.node} is neither this machine's own number nor a name, and a port")
    if not door.is_dir():
        faults.append(f"there is no folder {door}: start the guard first (wardround site guard)")
    manifest = settings.folder / load_site(settings.folder / "site.yaml").manifest
    faults += exposure_faults([settings.folder, manifest.resolve().parent], door)
    if faults or node is None:
        raise ConfigError(
            "no sandbox can be made for couriers; without one (--no-sandbox) a bundle can read this site's "
            "data",
            faults,
        )
    courier = Courier.find(settings.courier_user, door)
    say(f"each courier runs as {courier.name} in a sandbox, and reaches the guard and the SuperNode alone")
    return Sandbox(courier, door, node, scratch)


def _certificates(settings: Settings) -> Path | None:
    """Raises ``ConfigError`` for a link without TLS that leaves this machine: tasks' tokens are on it."""
    if settings.root_certificates is None and not _is_loopback(settings.node):
        raise ConfigError(
            f"{settings.node} is not on this machine: give its SuperNode a certificate, and name "
            "--root-certificates"
        )
    path = settings.root_certificates
    return None if path is None else path.resolve()


def _is_loopback(node: str) -> bool:
    host = node.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def secret_file(folder: Path) -> Path:
    """Of the site in ``folder``, made if it is missing: whichever of SuperNode and executor starts first."""
    path = folder / SECRET
    if not path.exists():
        write_secret(path, secrets.token_hex(SECRET_BYTES).encode())
    return path


def _secret(settings: Settings) -> bytes:
    """What the SuperNode knows this executor by. Raises ``ConfigError`` if others can read it."""
    path = settings.secret_file or secret_file(settings.folder)
    if path.stat().st_mode & 0o007:
        raise ConfigError(f"every user of this machine can open {path}: chmod o-rwx it, and make a new one")
    secret = path.read_bytes()
    if not secret:
        raise ConfigError(f"{path} is empty: delete it, and it is made anew")
    return secret
