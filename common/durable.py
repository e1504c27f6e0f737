"""Files of a run that a crash or a full disk must not leave half written."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from common.errors import DiskFault


def write_atomic(path: Path, data: bytes, lasting: bool = True) -> None:
    """Replace ``path`` by ``data``, or leave it as it was.

    Args:
        lasting: whether it is on the disk when this returns; not needed of what no later process reads.

    Raises ``DiskFault`` if the disk is full or does not take it, with what to free and how to go on.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if lasting:
            _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_fault(path.parent, error, len(data)) from error


def append_line(path: Path, line: str) -> None:
    """Append ``line``. Raises ``DiskFault`` like `write_atomic`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise disk_fault(path.parent, error, len(line)) from error


def disk_fault(folder: Path, error: OSError, needed: int) -> DiskFault:
    """The error to raise when ``folder`` did not take ``needed`` bytes."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return DiskFault(f"cannot write to {folder} ({error.strerror}): mend that, then use --resume")
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        free = 0
    return DiskFault(
        f"no space left in {folder}: {needed / 1e6:.1f} MB to write, {free / 1e6:.1f} MB free. Free at least "
        f"{max(needed - free, 0) / 1e6 + 1:.0f} MB on its disk, then run again with --resume: "
        "the last state that was saved is kept"
    )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
