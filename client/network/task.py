"""One task of a courier in a sandbox: what a site shows to code that comes from outside, and nothing more.

The sandbox is made of namespaces by ``unshare`` and left by ``setpriv``, of util-linux. Its root is empty but
for what is listed here, read-only: the system's libraries, Python and its packages, the guard's socket. Data,
keys, the site's folder, other tasks and other users' processes are not there to be refused. Its home, its
``/tmp`` and what Flower unpacks are made for the task and gone with it, as is every process that it left.

Its network is its own too, and leads to the SuperNode and nowhere else (`common.relay`).

What it does not do: limit how much processor time and memory a task takes.
"""

from __future__ import annotations

import grp
import os
import pwd
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError
from common.privacy.keys import write_secret
from common.relay import LISTEN, Destination, carry, handshake, say

TOOLS = ("unshare", "setpriv", "mount", "umount", "pivot_root", "env", "sh")
NOBODY = "nobody"
TOKEN = "/tmp/token"
PROBE_S = 20.0
# No configuration of the hospital's: a library's cache, and the certificates that everybody may see.
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/ssl/certs")
_DEVICES = ("null", "zero", "random", "urandom")
_TMP_BYTES = "1g"
_PATH = "/usr/bin:/bin"
_ADMIN_PATH = f"{_PATH}:/usr/sbin:/sbin"
_NAMESPACES = ("--mount", "--pid", "--ipc", "--uts", "--net")
_VARIABLES = {
    "PATH": _PATH, "HOME": "/tmp/home", "FLWR_HOME": "/tmp/flwr", "TMPDIR": "/tmp", "LANG": "C.UTF-8",
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONDONTWRITEBYTECODE": "1",
}  # fmt: skip


@dataclass(frozen=True)
class Courier:
    """The user as whom a task runs: ``name`` for messages, and numbers for the kernel."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]

    @classmethod
    def find(cls, name: str | None, door: Path) -> Courier:
        """User ``name``; None: ``nobody``, with the group of the guard's folder ``door``.

        Raises ``ConfigError`` listing every fault: there is no such user, it is root, or it may not enter
        ``door``.
        """
        try:
            user = pwd.getpwnam(name or NOBODY)
        except KeyError:
            raise ConfigError(
                f"there is no user {name or NOBODY!r}: make one (useradd --system --no-create-home), in the "
                f"group of {door}"
            ) from None
        about = door.stat()
        groups = set(os.getgrouplist(user.pw_name, user.pw_gid)) if name else {about.st_gid}
        faults = []
        if user.pw_uid == 0 or user.pw_gid == 0 or 0 in groups:
            faults.append(f"{user.pw_name} is root or of root's group: a courier is neither")
        if about.st_gid not in groups and about.st_uid != user.pw_uid:
            group = _group(about.st_gid)
            faults.append(f"it may not enter {door}: add it to the group {group} (usermod -aG {group} NAME)")
        if faults:
            raise ConfigError(f"user {user.pw_name!r} cannot be the courier", faults)
        return cls(user.pw_name, user.pw_uid, user.pw_gid, tuple(sorted(groups)))


@dataclass(frozen=True)
class Program:
    """What runs: Python code for ``-c`` or a ``file``, its ``arguments``, and ``files`` it has to see."""

    code: str | Path
    arguments: tuple[str, ...]
    files: tuple[Path, ...] = ()

    def command(self, python: Path) -> list[str]:
        first = ["-c", self.code] if isinstance(self.code, str) else [str(self.code)]
        return [str(python), "-I", *first, *self.arguments]


class Sandbox:
    """Runs each task as ``courier`` in namespaces of its own. Needs root.

    Args:
        door: the folder of the guard's socket.
        node: the one address that a task can reach.
        empty: an empty folder, on which each task's own root is mounted, where it alone sees it.
    """

    def __init__(self, courier: Courier, door: Path, node: Destination, empty: Path) -> None:
        self._courier, self._door, self._node, self._empty = courier, door, node, empty

    def start(self, program: Program, token: str) -> subprocess.Popen[bytes]:
        """Start ``program``, which finds ``token`` in the file `TOKEN`. It ends with this process.

        The token is in no argument and in no environment, where other users could read it. What the program
        writes comes through the process's ``stdout``.
        """
        python = _python()
        visible = [*shown_to_couriers(self._door), *program.files]
        if isinstance(program.code, Path):
            visible.append(program.code)
        lines = [*self._furnish(visible), self._listen(python), *self._enter(program.command(python))]
        command = [
            "setpriv", "--pdeathsig", "KILL", "unshare", *_NAMESPACES, "--fork", "--kill-child",
            "--propagation", "private", "sh", "-euc", "\n".join(lines),
        ]  # fmt: skip
        hand, inside = handshake()
        with inside:
            process = subprocess.Popen(
                command, stdin=inside, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env={"PATH": _ADMIN_PATH}, cwd="/",
            )  # fmt: skip
        say(hand, token)
        carry(hand, self._node, lambda: process.poll() is None)
        return process

    def _furnish(self, visible: Sequence[Path]) -> list[str]:
        """The lines that fill the new root, and go there."""
        lines = [
            f"mount -t tmpfs -o mode=0755,size=1m,nosuid,nodev courier {_quoted(self._empty)}",
            f"cd {_quoted(self._empty)}",
            "mkdir -p proc dev tmp etc old",
            "mount -t proc -o nosuid,nodev,noexec proc proc",
            # Before what is shown: that may lie below /tmp.
            f"mount -t tmpfs -o mode=1777,size={_TMP_BYTES},nosuid,nodev courier tmp",
        ]
        for path in visible:
            lines += _shown(path)
        for device in _DEVICES:
            lines += [f": > dev/{device}", f"mount --bind /dev/{device} dev/{device}"]
        uid, gid = self._courier.uid, self._courier.gid
        lines += [
            f"printf '127.0.0.1 localhost\\n{self._node.inside} {self._node.host}\\n' > etc/hosts",
            f"echo courier:x:{uid}:{gid}::/tmp/home:/bin/false > etc/passwd",
            f"(umask 077; cat > .{TOKEN})",
            "mkdir -m 0700 tmp/home tmp/flwr",
            f"chown {uid}:{gid} .{TOKEN} tmp/home tmp/flwr",
            "pivot_root . old",
            "cd /",
            "umount -l old",
            "rmdir old",
            "mount -o remount,ro,mode=0755,nosuid,nodev courier /",
        ]
        return lines

    def _listen(self, python: Path) -> str:
        """The line by which the node is met inside; it hands its listener out through standard input."""
        words = [str(python), "-I", "-S", "-c", LISTEN, self._node.inside, str(self._node.port)]
        return shlex.join(words)

    def _enter(self, command: Sequence[str]) -> list[str]:
        """The line that becomes ``command``, as the courier, with no right of root's left."""
        courier = self._courier
        rights = [
            "setpriv", "--reuid", str(courier.uid), "--regid", str(courier.gid),
            "--groups", ",".join(map(str, courier.groups)), "--no-new-privs", "--bounding-set=-all",
            "--inh-caps=-all", "--ambient-caps=-all", "--pdeathsig", "KILL",
        ]  # fmt: skip
        variables = [f"{name}={value}" for name, value in _VARIABLES.items()]
        words = [*rights, "env", "-i", "-C", "/tmp", *variables, *command]
        return ["ulimit -c 0", "exec " + shlex.join(words) + " < /dev/null"]


class NoSandbox:
    """Runs each task as this process's own user, who can read whatever it can: for demonstrations.

    Args:
        scratch: a folder for what tasks leave behind.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch

    def start(self, program: Program, token: str) -> subprocess.Popen[bytes]:
        """As `Sandbox.start`, and with a home of its own too."""
        home = Path(tempfile.mkdtemp(dir=self._scratch))
        write_secret(home / "token", token.encode())
        command = program.command(Path(sys.executable))
        words = [str(home / "token") if word == TOKEN else word for word in command]
        variables = {**_VARIABLES, "HOME": str(home), "FLWR_HOME": str(home / "flwr"), "TMPDIR": str(home)}
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=variables,
            start_new_session=True,
        )  # fmt: skip


def sandbox_faults() -> list[str]:
    """Why no sandbox can be made on this machine, all of it; empty where one can."""
    faults = [
        f"there is no {tool} here: install util-linux and coreutils"
        for tool in TOOLS
        if shutil.which(tool, path=_ADMIN_PATH) is None
    ]
    if os.geteuid() != 0:
        faults.append("only root makes namespaces for another user: start it as root")
    if not faults:
        probe = ["unshare", *_NAMESPACES, "--fork", "sh", "-ec"]
        probe += ["mount -t tmpfs none /mnt && mount -t proc proc /proc && setpriv --no-new-privs true"]
        done = subprocess.run(probe, capture_output=True, text=True, timeout=PROBE_S, check=False)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["no word of why"])[-1]
            faults.append(f"this machine makes no namespaces ({why}): allow it, or start on the host itself")
    return faults


def shown_to_couriers(door: Path) -> list[Path]:
    """All of this machine that a task sees, read-only. ``door``: the folder of the guard's socket."""
    python = [Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix)]
    return list(dict.fromkeys([*map(Path, _SYSTEM), *python, door]))


def exposure_faults(private: Sequence[Path], door: Path) -> list[str]:
    """Which folders of ``private`` lie in what couriers see, and what to do about it."""
    return [
        f"{folder} lies in {shown}, which couriers see: move one of the two"
        for folder in dict.fromkeys(private)
        for shown in shown_to_couriers(door)
        if folder.is_relative_to(shown)
    ]


def _python() -> Path:
    """This installation's Python by its real path."""
    return Path(sys.prefix).resolve() / "bin" / Path(sys.executable).name


def _shown(path: Path) -> list[str]:
    """The lines by which ``path`` is seen in the new root too, at the same place and read-only."""
    inside = _quoted(Path("." + str(path)))
    if path.is_symlink() and path.parent == Path("/"):  # /bin -> usr/bin
        return [f"ln -s {_quoted(path.readlink())} {inside}"]
    if not path.exists():
        return []
    if path.is_dir():
        make = f"mkdir -p {inside}"
    else:
        make = f"mkdir -p {_quoted(Path('.' + str(path.parent)))} && : > {inside}"
    return [
        make,
        f"mount --bind {_quoted(path)} {inside}",
        f"mount -o remount,bind,ro,nosuid,nodev {inside}",
    ]


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
