"""nginx for the tests of what hospitals reach, where there is one."""

from __future__ import annotations

import os

import pytest

from common.errors import ConfigError
from server.network.service import find_nginx


def nginx_or_skip() -> str:
    """The program; without it the test is skipped, and fails in continuous integration."""
    try:
        return find_nginx()
    except ConfigError:
        line = "no nginx on this machine; the fix: apt-get update && apt-get install -y nginx-light"
        if os.environ.get("CI"):
            pytest.fail(line)
        pytest.skip(line)
