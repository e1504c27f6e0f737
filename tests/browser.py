"""A real browser for the tests of pages, where there is one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
DEADLINE_S = 120


def find_browser() -> str:
    for name in NAMES:
        if path := shutil.which(name):
            return path
    line = "no chromium on this machine; the fix: apt-get update && apt-get install -y chromium"
    if os.environ.get("CI"):
        pytest.fail(line)
    pytest.skip(line)


def browse(browser: str, page: Path, folder: Path, *options: str) -> str:
    """Run the browser once on ``page``; return what it wrote to stdout. No process is left behind."""
    command = [
        browser,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={folder / 'profile'}",
        *options,
        page.as_uri(),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own group: started by us just above
            raise
    assert process.returncode == 0, errors
    return output
