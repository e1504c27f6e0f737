"""A consortium and its joining sites, for the tests of both."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from client.network.joining import prepare_site
from common.canonical import canonical_json
from common.network.documents import JoinRequest
from server.network.consortium import Consortium, Settings
from server.network.registry import MEMBERS
from tests.tls import free_port
from wardround import main

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    """One authority for all tests; each has members of its own."""
    folder = tmp_path_factory.mktemp("founded") / "c"
    settings = Settings(host="localhost", superlink_port=free_port())
    return Consortium.create(folder, settings, 90, 825, NOW)


@pytest.fixture
def consortium(founded: Consortium) -> Consortium:
    (founded.folder / MEMBERS).unlink(missing_ok=True)
    return founded


def joining(folder: Path, name: str) -> JoinRequest:
    return prepare_site(folder / name, name, None).request


def invoke(*arguments: str | Path, given: str | None = None) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), input=given)


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(canonical_json(document))
