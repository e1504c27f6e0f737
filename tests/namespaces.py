"""A user of the operating system's and a sandbox for the tests that need both, where they can be had."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from client.network.task import sandbox_faults


def need_sandbox() -> None:
    """Skip where no sandbox can be made, with a line that names the fix; where a skip would hide it, fail."""
    faults = sandbox_faults()
    if not faults:
        return
    line = f"no sandbox on this machine; the fix: {'; '.join(faults)}"
    if os.environ.get("CI"):
        pytest.fail(line)
    pytest.skip(line)


@contextmanager
def user(name: str) -> Iterator[str]:
    """A user ``name`` with a group of that name, who is gone afterwards."""
    subprocess.run(
        ["useradd", "--system", "--no-create-home", "--user-group", "--shell", "/bin/false", name],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    try:
        yield name
    finally:
        subprocess.run(["userdel", name], check=True, capture_output=True, timeout=60)
