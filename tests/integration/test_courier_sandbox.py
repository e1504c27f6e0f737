"""The sandbox of one task: what a program in it finds, and what is left when it is over."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import client.network.task as task
from client.network.task import TOKEN, Courier, NoSandbox, Program, Sandbox, sandbox_faults
from common.errors import ConfigError
from common.relay import MOST_CONNECTIONS, Destination
from tests.namespaces import need_sandbox, user

TOKEN_TEXT = "0123456789abcdef"
TELL = "import json, os, sys; tell = lambda value: print(json.dumps(value), flush=True)\n"


@pytest.fixture(scope="module")
def courier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Courier, Path]]:
    """A courier and the guard's folder, which its group may enter."""
    need_sandbox()
    door = tmp_path_factory.mktemp("door")
    with user(f"wr-sandbox-{os.getpid()}") as name:
        shutil.chown(door, group=name)
        door.chmod(0o2750)
        yield Courier.find(name, door), door


@pytest.fixture
def echo() -> Iterator[Destination]:
    """What stands for the SuperNode: says back what it hears."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    yield Destination.parse(f"127.0.0.1:{server.getsockname()[1]}")
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def make(courier: tuple[Courier, Path], node: Destination, tmp_path: Path) -> Sandbox:
    (tmp_path / "empty").mkdir(exist_ok=True)
    return Sandbox(*courier, node, tmp_path / "empty")


def told(sandbox: Sandbox, code: str, *arguments: str) -> dict[str, object]:
    """What ``code`` told, run in the sandbox to its end."""
    process = sandbox.start(Program(TELL + textwrap.dedent(code), (TOKEN, *arguments)), TOKEN_TEXT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out.decode()
    found: dict[str, object] = json.loads(out.decode().splitlines()[-1])
    return found


def test_a_task_is_another_user_without_rights_and_alone(
    courier: tuple[Courier, Path], echo: Destination, tmp_path: Path
) -> None:
    found = told(
        make(courier, echo, tmp_path),
        """
        lines = [line for line in open("/proc/self/status") if line.startswith(("Cap", "NoNew"))]
        status = dict(line.split(":", 1) for line in lines)
        processes = [name for name in os.listdir("/proc") if name.isdigit()]
        tell({"ids": [os.getuid(), os.getgid(), os.getgroups()], "pid": os.getpid(), "processes": processes,
              "rights": {name: value.strip() for name, value in status.items()},
              "open": os.listdir("/proc/self/fd")})
        """,
    )  # fmt: skip
    who, _ = courier
    assert found["ids"] == [who.uid, who.gid, list(who.groups)]
    assert found["processes"] == ["1"] == [str(found["pid"])]
    assert isinstance(found["rights"], dict)
    assert found["rights"].pop("NoNewPrivs") == "1"
    assert len(found["rights"]) == 5
    assert {int(value, 16) for value in found["rights"].values()} == {0}
    assert len(found["open"]) == 4  # type: ignore[arg-type]  # the three of every program, and the listing


def test_a_task_finds_its_token_and_nothing_of_the_machines_files(
    courier: tuple[Courier, Path], echo: Destination, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("for everybody to read")
    secret.chmod(0o644)
    (courier[1] / "guard.sock").touch()
    found = told(
        make(courier, echo, tmp_path),
        """
        def writes(path):
            try:
                open(path, "a").close()
            except OSError as error:
                return error.strerror
        places = ["/new", "/usr/new", "/etc/passwd", sys.argv[3] + "/new", sys.prefix + "/new"]
        tell({"token": open(sys.argv[1]).read(), "mode": os.stat(sys.argv[1]).st_mode & 0o777,
              "secret": os.path.exists(sys.argv[2]), "door": os.listdir(sys.argv[3]),
              "home": os.listdir(os.environ["HOME"]),
              "writes": [writes(place) for place in places], "own": writes(os.environ["HOME"] + "/mine"),
              "etc": sorted(os.listdir("/etc")), "environment": sorted(os.environ)})
        """,
        str(secret),
        str(courier[1]),
    )  # fmt: skip
    assert (found["token"], found["mode"]) == (TOKEN_TEXT, 0o600)
    assert found["secret"] is False
    assert found["door"] == ["guard.sock"]
    assert found["home"] == []
    assert None not in found["writes"]  # type: ignore[operator]
    assert found["own"] is None
    assert found["etc"] == ["hosts", "ld.so.cache", "passwd", "ssl"]
    assert set(found["environment"]) - {"LC_CTYPE"} == set(task._VARIABLES)  # type: ignore[call-overload]


def test_the_token_is_in_no_argument_and_no_environment(
    courier: tuple[Courier, Path], echo: Destination, tmp_path: Path
) -> None:
    process = make(courier, echo, tmp_path).start(Program("import time; time.sleep(30)", ()), TOKEN_TEXT)
    end = time.monotonic() + 20
    try:
        seen = b""
        while b"-I\0-c\0import time" not in seen:  # from its first helper until the task itself runs
            assert time.monotonic() < end
            for number in (process.pid, *children(process.pid)):
                for name in ("cmdline", "environ"):
                    with suppress(OSError):  # it ended while we looked
                        seen += Path(f"/proc/{number}/{name}").read_bytes()
        assert b"unshare" in seen
        assert TOKEN_TEXT.encode() not in seen
    finally:
        process.kill()
        process.communicate()


def children(parent: int) -> list[int]:
    try:
        listed = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:
        return []
    return [number for child in map(int, listed) for number in (child, *children(child))]


def test_everything_of_a_task_ends_with_it_and_with_whoever_started_it(
    courier: tuple[Courier, Path], echo: Destination, tmp_path: Path
) -> None:
    who, door = courier
    (tmp_path / "empty").mkdir()
    fork = "import os, time\nif os.fork() == 0: os.setsid()\ntime.sleep(60)"
    start = (
        "import sys, time\nfrom pathlib import Path\n"
        "from client.network.task import *\nfrom common.relay import Destination\n"
        f"box = Sandbox({who!r}, Path({str(door)!r}), {echo!r}, Path({str(tmp_path / 'empty')!r}))\n"
        f"print(box.start(Program({fork!r}, ()), 'token').pid, flush=True)\ntime.sleep(60)\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    first = int(starter.stdout.readline())
    end = time.monotonic() + 30
    while len(family := children(first)) < 2:  # the task and its daemon
        assert time.monotonic() < end
        time.sleep(0.05)
    starter.kill()  # not told, but killed: nobody is left to clear up
    starter.communicate()
    while any(Path(f"/proc/{number}").exists() for number in (first, *family)):
        assert time.monotonic() < end, "a process of the task lives on"
        time.sleep(0.05)
    assert not os.path.ismount(tmp_path / "empty")


def test_of_the_network_a_task_reaches_the_node_alone(
    courier: tuple[Courier, Path], echo: Destination, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        found = told(
            make(courier, echo, tmp_path),
            """
            import socket
            node, other, most = map(int, sys.argv[2:])
            def reach(address):
                try:
                    socket.create_connection(address, 5).close()
                    return True
                except OSError:
                    return False
            data, back = os.urandom(3_000_000), bytearray()
            import threading
            link = socket.create_connection(("127.0.0.1", node), 5)
            threading.Thread(target=lambda: (link.sendall(data), link.shutdown(socket.SHUT_WR))).start()
            while part := link.recv(1 << 16):
                back += part
            held = [socket.create_connection(("127.0.0.1", node), 5) for _ in range(most + 4)]
            refused = 0
            for one in held:
                one.settimeout(2)
                try:
                    one.sendall(b"x")
                    refused += one.recv(1) != b"x"
                except OSError:
                    refused += 1
            tell({"whole": bytes(back) == data,
                  "others": [reach(("127.0.0.1", other)), reach(("192.0.2.1", 80))],
                  "links": [name for _, name in socket.if_nameindex()], "refused": refused})
            """,
            str(echo.port),
            str(other.getsockname()[1]),
            str(MOST_CONNECTIONS),
        )
    assert found == {"whole": True, "others": [False, False], "links": ["lo"], "refused": 4}


def test_by_default_a_courier_is_nobody_with_the_sockets_group_alone(
    courier: tuple[Courier, Path],
) -> None:
    who, door = courier
    nobody = Courier.find(None, door)
    assert nobody.name == "nobody"
    assert nobody.groups == (door.stat().st_gid,)
    assert nobody.uid != who.uid


def test_who_cannot_be_a_courier_is_told_all_that_is_wrong(tmp_path: Path) -> None:
    need_sandbox()
    with pytest.raises(ConfigError, match="useradd"):
        Courier.find("nobody-of-this-name", tmp_path)
    with pytest.raises(ConfigError, match="is root"):
        Courier.find("root", tmp_path)
    with pytest.raises(ConfigError, match="is root"):  # nobody, in the group of root's folder
        Courier.find(None, tmp_path)
    shutil.chown(tmp_path, group=54321)
    with pytest.raises(ConfigError) as wrong:
        Courier.find("nobody", tmp_path)
    assert wrong.value.faults == (
        "it may not enter " + str(tmp_path) + ": add it to the group 54321 (usermod -aG 54321 NAME)",
    )


def test_without_root_or_its_tools_no_sandbox_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(task.shutil, "which", lambda tool, path: None if tool == "unshare" else tool)
    faults = sandbox_faults()
    assert len(faults) == 2
    assert "util-linux" in faults[0]
    assert "as root" in faults[1]


def test_without_a_sandbox_each_task_has_a_home_and_a_token_file_of_its_own(tmp_path: Path) -> None:
    code = TELL + "tell([open(sys.argv[1]).read(), os.environ['FLWR_HOME'], sorted(os.environ)])"
    said = []
    for token in ("one", "two"):
        out, _ = NoSandbox(tmp_path).start(Program(code, (TOKEN,)), token).communicate(timeout=60)
        said.append(json.loads(out))
    assert [one[0] for one in said] == ["one", "two"]
    assert said[0][1] != said[1][1]
    assert "HOME" in said[0][2]
    assert "WARDROUND_SITES" not in said[0][2]


@pytest.mark.parametrize(
    ("address", "inside"),
    [("127.0.0.1:9094", "127.0.0.1"), ("127.0.0.5:1", "127.0.0.5"), ("[::1]:9094", "::1"),
     ("node.hospital.example:9094", "127.0.0.1")],
)  # fmt: skip
def test_a_node_is_met_on_the_tasks_own_loopback(address: str, inside: str) -> None:
    assert Destination.parse(address).inside == inside


@pytest.mark.parametrize(
    "address", ["", "host", "host:", ":1", "host:0", "host:70000", "10.0.0.1:1", "a'b:1"]
)
def test_what_is_no_node_is_refused(address: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Destination.parse(address)
