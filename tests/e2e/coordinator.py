"""A consortium that is really served, for the tests of what reaches it."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from common.network.documents import write_document
from server.network.consortium import Consortium, Settings
from server.network.membership import kit_for
from tests.e2e import walks
from tests.joining_sites import invoke, joining
from tests.proxy import nginx_or_skip
from tests.tls import free_port

START_S = 90.0


@contextmanager
def running(*arguments: str | Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A command in a process of its own, and the file of what it says; ended with the block."""
    said = Path(str(arguments[2])) / f"said-{arguments[1]}-{time.monotonic_ns()}"
    command = [sys.executable, "-m", "wardround", *map(str, arguments)]
    with said.open("w") as file:
        # A proxy that nobody is: whoever asked it for this machine itself would stand still.
        environment = walks.environment(HTTPS_PROXY="http://127.0.0.1:9")
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield process, said
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_for(text: str, said: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + START_S
    while text not in said.read_text():
        assert process.poll() is None, said.read_text()
        assert time.monotonic() < end, said.read_text()
        time.sleep(0.1)


def ended(process: subprocess.Popen[str], said: Path) -> tuple[int, str]:
    return process.wait(timeout=START_S), said.read_text()


@dataclass(frozen=True)
class Fleet:
    """A consortium that is served, and three sites: two members, and one that is none."""

    consortium: Consortium
    sites: Path
    serving: subprocess.Popen[str]
    said: Path

    @property
    def public(self) -> str:
        return f"localhost:{self.consortium.settings.port}"

    @property
    def ca(self) -> bytes:
        return self.consortium.ca_pem.encode()

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cadata=self.consortium.ca_pem)

    def node(self, site: str, port: int) -> tuple[str | Path, ...]:
        folder = self.sites / site
        return "site", "node", folder, "--socket", folder / "guard.sock", "--port", str(port)

    def online(self, site: str) -> bool | None:
        listed = json.loads(invoke("consortium", "members", self.consortium.folder, "--json").stdout)
        return next(member["online"] for member in listed["members"] if member["name"] == site)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """harbour was added before the coordinator served, hill after; stray has a kit and was never added."""
    nginx_or_skip()
    root = tmp_path_factory.mktemp("fleet")
    now = datetime.now(UTC)
    settings = Settings(host="localhost", listen="127.0.0.1", port=free_port(), superlink_port=free_port())
    consortium = Consortium.create(root / "c", settings, 90, 825, now)
    requests = {name: joining(root, name) for name in ("harbour", "hill", "stray")}

    def add(name: str) -> str:
        line = requests[name].fingerprint
        done = invoke(
            "consortium", "add", consortium.folder, root / name / "join.json", "--fingerprint", line
        )
        assert done.exit_code == 0, done.output
        return done.output

    assert "queued" in add("harbour")
    with running("consortium", "serve", consortium.folder) as (process, said):
        wait_for("serving localhost:", said, process)
        assert "harbour is registered" in said.read_text()
        assert "hill is registered" in add("hill")
        kits = consortium.folder / "kits"
        write_document(kits / "kit-stray.json", kit_for(consortium, requests["stray"]))
        for name in requests:
            assert invoke("site", "join", root / name, kits / f"kit-{name}.json").exit_code == 0
        yield Fleet(consortium, root, process, said)
