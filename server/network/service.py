"""What a coordinator runs: the SuperLink on loopback, and nginx in front of it; both, or neither."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime

from common.checkpoints import FOLDER as MODELS
from common.checkpoints import SHIPPED
from common.durable import append_line
from common.errors import ArtefactError, ConfigError, FederationError
from common.network.certificates import system_clock
from common.network.children import Child, flower_environment, flower_program, wait_until
from common.network.handshake import shake_hands
from common.network.identity import spoken
from server.network.authority import CA_CERTIFICATE
from server.network.consortium import LOOPBACK_STEM, SERVER, Consortium
from server.network.control import control_of
from server.network.nginx import Proxy, nginx_conf
from server.network.registry import Registry

READY_S = 120.0
LOOK_S = 1.0  # between two looks at members.json and at the two programs
STRANGERS_S = 5.0
NGINX_FOLDERS = os.pathsep.join(["/usr/sbin", "/usr/local/sbin"])  # not on every user's path
NO_NGINX = "nginx is not installed: apt install nginx (or name it: NGINX=/path/to/nginx)"

# What the SuperLink writes at every look at it, a node's or our own, and that is worth no line.
_OFTEN = re.compile(
    r"/(pull-messages|send-node-heartbeat|list-nodes) HTTP/1.1\" 200|ControlServicer.ListNodes"
)

Say = Callable[[str], None]


def find_nginx() -> str:
    """Raises ``ConfigError`` naming the command that installs it."""
    found = os.environ.get("NGINX") or shutil.which("nginx") or shutil.which("nginx", path=NGINX_FOLDERS)
    if not found:
        raise ConfigError(NO_NGINX)
    return found


def superlink_command(consortium: Consortium) -> list[str]:
    """The SuperLink on loopback over TLS, for nodes with a registered key alone, with its database."""
    loopback, folder = consortium.folder / LOOPBACK_STEM, consortium.folder / "superlink"
    return [
        flower_program("flower-superlink"),
        "--host", "127.0.0.1", "--port", str(consortium.settings.superlink_port),
        "--ssl-ca-certfile", str(consortium.folder / CA_CERTIFICATE),
        "--ssl-certfile", str(loopback.with_suffix(".crt")),
        "--ssl-keyfile", str(loopback.with_suffix(".key")),
        "--enable-supernode-auth",
        "--database", str(folder / "state.db"),
        "--disable-runtime-dependency-installation",
    ]  # fmt: skip


def nginx_proxy(consortium: Consortium) -> Proxy:
    settings, folder = consortium.settings, consortium.folder
    return Proxy(
        folder=folder / "nginx",
        server=folder / SERVER,
        loopback_ca=folder / CA_CERTIFICATE,
        listen=(settings.listen, settings.port),
        upstream_port=settings.superlink_port,
        body_mb=settings.body_mb,
    )


def superlink_answers(consortium: Consortium) -> bool:
    """Whether this consortium's SuperLink, and nobody else, is there on loopback."""
    try:
        shake_hands("127.0.0.1", consortium.settings.superlink_port, consortium.ca_pem, system_clock(), 2.0)
    except (FederationError, ArtefactError):
        return False
    return True


def settle_if_served(consortium: Consortium) -> bool:
    """Tell the SuperLink of the members now, if it runs; whether it does. It is told later otherwise."""
    if not superlink_answers(consortium):
        return False
    with control_of(consortium) as control:
        Registry(consortium.folder).settle(control)
    return True


def online(consortium: Consortium) -> dict[str, str] | None:
    """Fingerprint -> status of each node at the SuperLink; None if it does not run."""
    if not superlink_answers(consortium):
        return None
    with control_of(consortium) as control:
        return {node.fingerprint: node.status for node in control.nodes()}


@contextmanager
def served(consortium: Consortium, say: Say, now: datetime) -> Iterator[list[Child]]:
    """The SuperLink and nginx run, and the members are registered, until the block ends.

    Raises:
        ConfigError: nginx or Flower is missing, or a port is taken. ArtefactError: a certificate is over.
        FederationError, DeadlinePassed: one of them does not start; its last lines are the faults.
    """
    for expiry in consortium.check_in_force(now):
        say(f"warning: {expiry}: wardround consortium renew {consortium.folder}")
    nginx = find_nginx()
    _check_ports(consortium)
    with ExitStack() as stack:
        superlink = _started(stack, consortium, "superlink", superlink_command(consortium))
        wait_until(lambda: superlink_answers(consortium), superlink, READY_S)
        _tell(consortium, say, anew=True)
        proxy = _started(stack, consortium, "nginx", _nginx_command(consortium, nginx))
        wait_until(lambda: _listens(consortium), proxy, READY_S)
        yield [superlink, proxy]


def attend(consortium: Consortium, programs: list[Child], stopped: Callable[[float], bool], say: Say) -> None:
    """Keep the SuperLink told of the members until ``stopped``.

    ``stopped(seconds)`` waits that long at most. Raises ``FederationError`` if a program ends by itself.
    """
    registry, looked, warned = Registry(consortium.folder), time.monotonic(), False
    while not stopped(LOOK_S):
        for program in programs:
            if (code := program.ended) is not None:
                last = [line for line in program.lines() if line][-8:]
                raise FederationError(f"{program.name} ended by itself with {code}", last)
        if time.monotonic() - looked > STRANGERS_S or (registry.unsettled() and not warned):
            looked = time.monotonic()
            warned = not _tell(consortium, say, warned=warned)


def _tell(consortium: Consortium, say: Say, anew: bool = False, warned: bool = False) -> bool:
    """Whether the SuperLink now knows the members and nobody else; one that it refuses keeps no other out.

    ``warned``: that it does not was said before, and is not said again.
    """
    registry = Registry(consortium.folder)
    before = {member.fingerprint: member.state for member in registry.members()}
    complete = True
    try:
        with control_of(consortium) as control:
            for fingerprint in registry.turn_out_strangers(control):
                say(
                    "warning: a node that is no member was registered on this machine, and is turned out: "
                    f"{spoken(fingerprint)}"
                )
            registry.settle(control, anew)
    except FederationError as error:
        if not warned:
            say(f"warning: {error}\nIt is tried again every {STRANGERS_S:g} s.")
        complete = False
    for member in registry.members():
        if before.get(member.fingerprint) != member.state:
            say(f"{member.name} is {member.state}: {spoken(member.fingerprint)}")
    return complete


def _started(stack: ExitStack, consortium: Consortium, name: str, command: list[str]) -> Child:
    folder = consortium.folder / name
    (folder / "temp").mkdir(parents=True, exist_ok=True)
    log = folder / "output.log"

    def keep(line: str) -> None:
        if not _OFTEN.search(line):
            append_line(log, line)

    environment = {**flower_environment(folder), SHIPPED: str(MODELS)}
    child = Child(name, command, keep, environment)
    stack.callback(child.stop)
    return child


def _nginx_command(consortium: Consortium, nginx: str) -> list[str]:
    """Writes the configuration, and lets nginx read it once before it is started for good."""
    folder = consortium.folder / "nginx"
    (folder / "temp").mkdir(parents=True, exist_ok=True)
    path = folder / "nginx.conf"
    path.write_text(nginx_conf(nginx_proxy(consortium)), encoding="utf-8")
    command = [nginx, "-p", f"{folder}/", "-e", "stderr", "-c", str(path)]
    try:
        tried = subprocess.run([*command, "-t"], capture_output=True, text=True, timeout=30, check=False)
    except OSError as error:
        raise ConfigError(f"{nginx} cannot be started ({error.strerror}): {NO_NGINX}") from error
    if tried.returncode:
        raise ConfigError(f"nginx refuses {path}", tried.stderr.strip().splitlines()[-4:])
    return [*command, "-g", "daemon off;"]


def _check_ports(consortium: Consortium) -> None:
    """So that the cause is named at once: each program would tell it in its own words, or only retry."""
    settings, faults = consortium.settings, []
    for address, port in ((settings.listen, settings.port), ("127.0.0.1", settings.superlink_port)):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError as error:
                faults.append(
                    f"{address} port {port}: {error.strerror}; see who has it (ss -ltnp), or set another in "
                    f"{consortium.folder}/consortium.json"
                )
    if faults:
        raise ConfigError("nothing can be served: is another wardround consortium serve running?", faults)


def _listens(consortium: Consortium) -> bool:
    settings = consortium.settings
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.listen, settings.listen)
    with suppress(OSError), socket.create_connection((here, settings.port), timeout=2.0):
        return True
    return False
