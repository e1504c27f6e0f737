"""The programs beside a command: nginx's configuration, and how programs are started, heard and ended."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from common.errors import ConfigError, DeadlinePassed, FederationError
from common.network.certificates import system_clock
from common.network.children import Child, flower_environment, flower_program, wait_until
from server.network.consortium import SMALLEST_BODY_MB, Consortium, Settings
from server.network.nginx import FLEET_VERBS, Proxy, nginx_conf
from server.network.service import nginx_proxy, superlink_command
from tests.proxy import nginx_or_skip
from tests.tls import free_port
from wardround import main

PROXY = Proxy(
    Path("/srv/c/nginx"), Path("/srv/c/tls/server"), Path("/srv/c/ca.crt"), ("0.0.0.0", 8443), 18443, 8
)


def quiet(_: str) -> None:
    pass


def python(text: str, sink: Callable[[str], None] = quiet) -> Child:
    return Child("a program", [sys.executable, "-u", "-c", text], sink)


# --- nginx's configuration ----------------------------------------------------------------------------


def test_only_the_verbs_of_a_keyed_node_are_published() -> None:
    """As Flower 1.41 serves them: what it has besides is registering, which is the coordinator's."""
    from flwr.superlink.routers.fleet.router import router

    served = {route.path.removeprefix("/v1/fleet/") for route in router.routes}  # type: ignore[attr-defined]
    assert served - set(FLEET_VERBS) == {"register-node", "unregister-node"}
    assert set(FLEET_VERBS) <= served
    text = nginx_conf(PROXY)
    assert re.findall(r"^    location (.*) {", text, re.M) == [
        f"~ ^/v1/fleet/({'|'.join(FLEET_VERBS)})$",
        "/",
    ]
    assert text.count("proxy_pass") == 1
    assert "proxy_pass https://superlink/v1/fleet/$1;" in text


def test_no_line_of_the_log_has_a_header() -> None:
    formats = re.findall(r"log_format audit (.*?);", nginx_conf(PROXY), re.S)
    assert len(formats) == 1
    assert "$http_" not in formats[0]
    assert len(re.findall(r"access_log|error_log", nginx_conf(PROXY))) == 2


def test_the_size_of_a_body_is_configurable_and_never_below_a_chunk() -> None:
    assert "client_max_body_size 32m;" in nginx_conf(replace(PROXY, body_mb=32))
    assert [fault.key for fault in Settings(host="a", body_mb=5).faults()] == ["body_mb"]
    from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE

    for size in (SMALLEST_BODY_MB, Settings().body_mb):
        assert size << 20 > FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE


def test_no_body_is_kept_on_disk() -> None:
    for line in ("proxy_request_buffering off;", "proxy_buffering off;", "proxy_max_temp_file_size 0;"):
        assert line in nginx_conf(PROXY)


@pytest.mark.parametrize("name", ['a"; include "x', "a$host", "a;b", "a\nb", "a{b", "a\\b", "a'b"])
def test_a_path_that_nginx_would_misread_is_refused(name: str) -> None:
    for changed in ({"folder": Path("/srv") / name}, {"server": Path("/srv") / name}):
        with pytest.raises(ConfigError, match="misread"):
            nginx_conf(replace(PROXY, **changed))


def test_nginx_itself_reads_the_configuration(tmp_path: Path) -> None:
    nginx = nginx_or_skip()
    settings = Settings(host="localhost", listen="::1", port=free_port())
    consortium = Consortium.create(tmp_path / "a folder, é", settings, 90, 825, system_clock())
    (consortium.folder / "nginx" / "temp").mkdir(parents=True)
    path = consortium.folder / "nginx" / "nginx.conf"
    path.write_text(nginx_conf(nginx_proxy(consortium)))
    command = [nginx, "-e", "stderr", "-p", str(consortium.folder), "-c", str(path), "-t"]
    tried = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert tried.returncode == 0, tried.stderr
    assert "warn" not in tried.stderr


def test_without_nginx_serving_ends_with_10_and_names_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Consortium.create(tmp_path / "c", Settings(host="localhost"), 90, 825, system_clock())
    monkeypatch.setattr("server.network.service.NGINX_FOLDERS", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("NGINX", raising=False)
    ended = CliRunner().invoke(main, ["consortium", "serve", str(tmp_path / "c")])
    assert ended.exit_code == 10
    assert "apt install nginx" in ended.stderr


def test_the_superlink_is_on_loopback_over_tls_with_node_keys_and_a_database(tmp_path: Path) -> None:
    consortium = Consortium.create(tmp_path / "c", Settings(host="fed.example.org"), 90, 825, system_clock())
    command = superlink_command(consortium)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert "--insecure" not in command
    assert {"--enable-supernode-auth", "--ssl-certfile", "--ssl-keyfile", "--database"} <= set(command)


# --- programs -----------------------------------------------------------------------------------------


def test_a_program_is_heard_without_its_colours() -> None:
    heard: list[str] = []
    child = python("print('\\x1b[92mgreen\\x1b[0m'); print('plain'); raise SystemExit(3)", heard.append)
    assert child.wait(30) == 3
    assert child.lines() == ["green", "plain"] == heard


def test_a_listener_that_fails_does_not_hold_a_program_up() -> None:
    def full(_: str) -> None:
        raise OSError("no space left")

    child = python("print('x' * 1000000); print('y' * 1000000)", full)
    assert child.wait(30) == 0
    assert len(child.lines()) == 2


def test_ending_a_program_ends_what_it_started_and_one_that_does_not_listen() -> None:
    lines: list[str] = []
    child = python(
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(other.pid)\n"
        "time.sleep(600)",
        lines.append,
    )
    wait_until(lambda: bool(lines), child, 30)
    child.stop(grace_s=0.3)
    assert child.ended is not None
    end = time.monotonic() + 10
    while alive(int(lines[0])):
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether it runs; one that only waits to be buried does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_wait_ends_with_the_program_or_its_deadline() -> None:
    ended = python("print('why'); raise SystemExit(5)")
    with pytest.raises(FederationError, match="ended at its start with 5") as caught:
        wait_until(lambda: False, ended, 30)
    assert caught.value.faults == ("why",)
    slow = python("import time; time.sleep(600)")
    try:
        with pytest.raises(DeadlinePassed, match=r"not ready after 0\.2 s"):
            wait_until(lambda: False, slow, 0.2)
    finally:
        slow.stop()


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="cannot be started"):
        Child("nothing", ["/nowhere/at/all"], quiet)
    with pytest.raises(ConfigError, match="install Wardround again"):
        flower_program("flower-nothing")


def test_flowers_programs_keep_to_their_folder_and_call_nobody(tmp_path: Path) -> None:
    given = flower_environment(tmp_path)
    assert given["FLWR_HOME"] == str(tmp_path)
    assert (given["FLWR_TELEMETRY_ENABLED"], given["FLWR_DISABLE_UPDATE_CHECK"]) == ("0", "1")
    first = given["PATH"].split(os.pathsep)[0]
    assert (Path(first) / "flower-superexec").is_file()
