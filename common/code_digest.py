"""Which code this is: one digest over the source files, for whoever proposes a run and for whoever tests."""

from __future__ import annotations

import hashlib
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
SHIPPED_CODE = ("client", "common", "server")


def code_sha256(project: Path = PROJECT) -> str:
    """Digest over the source files that a run ships to the sites: path and text of each, in order."""
    digest = hashlib.sha256()
    for folder in SHIPPED_CODE:
        for path in sorted((project / folder).rglob("*.py")):
            name = path.relative_to(project).as_posix()
            digest.update(f"{name}|{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
