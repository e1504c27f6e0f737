"""Which code this is: one digest over the source files, for whoever proposes a run and for whoever tests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
SHIPPED_CODE = ("client", "common", "server")


def code_sha256(project: Path = PROJECT) -> str:
    """Digest over the source files of both sides in ``project``: path and text of each, in order."""
    paths = [path for folder in SHIPPED_CODE for path in sorted((project / folder).rglob("*.py"))]
    return sources_sha256((path.relative_to(project).as_posix(), path.read_bytes()) for path in paths)


def sources_sha256(sources: Iterable[tuple[str, bytes]]) -> str:
    """`code_sha256` of (path from the project on, text) in their order."""
    digest = hashlib.sha256()
    for name, text in sources:
        digest.update(f"{name}|{hashlib.sha256(text).hexdigest()}\n".encode())
    return digest.hexdigest()
