"""What the kernel says of this process's memory (Linux)."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path


def growth(work: Callable[[], object]) -> int:
    """Bytes that ``work`` adds to this process at most."""
    before = resident()
    work()
    return high_water() - before


def resident() -> int:
    """Bytes resident now, with nothing freed still held; `high_water` counts from here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the process still holds would hide the growth
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
    return _status("VmRSS")


def high_water() -> int:
    """The most bytes that were resident at once since `resident` was asked last."""
    return _status("VmHWM")


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024
