"""What a site hands to a verifier: its records, as a folder or one zip. Never a key, and never who is who."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from common.durable import write_atomic
from common.errors import ArtefactError
from common.privacy.journal import HEAD, LEDGER
from common.privacy.ledger import RECEIPTS
from common.privacy.policy import POLICY, SIGNATURE_SUFFIX

CHECKPOINT = "checkpoint.json"
FILES = (LEDGER, HEAD, RECEIPTS, POLICY, POLICY + SIGNATURE_SUFFIX, CHECKPOINT)
_STAMP = (1980, 1, 1, 0, 0, 0)  # the first moment that a zip can name: equal files give equal bytes
MAX_BYTES = 1 << 28


def read_bundle(path: Path) -> dict[str, bytes]:
    """File name -> content of those of `FILES` that are there.

    Raises ``ArtefactError`` if it is no bundle, or a zip that `write_bundle` did not write byte for byte.
    """
    if path.is_dir():
        return {name: (path / name).read_bytes() for name in FILES if (path / name).is_file()}
    try:
        data = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = {item.filename: item for item in archive.infolist()}
            if sum(item.file_size for item in entries.values()) > MAX_BYTES or not set(entries) <= set(FILES):
                raise ArtefactError(f"{path} holds other files than a bundle's, or is too large")
            files = {name: archive.read(name) for name in entries}
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ArtefactError(f"{path} is no bundle: a site's folder, or a zip of its records") from error
    if packed(files) != data:
        raise ArtefactError(
            f"{path} was changed, or packed by another program: unpack it and give the folder"
        )
    return files


def write_bundle(folder: Path, out: Path) -> list[str]:
    """Pack a site's records into the zip ``out``; returns the names in it."""
    files = read_bundle(folder)
    if LEDGER not in files:
        raise ArtefactError(f"there is no ledger in {folder}")
    write_atomic(out, packed(files))
    return sorted(files)


def packed(files: dict[str, bytes]) -> bytes:
    """The one zip of these files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name, _STAMP), files[name])
    return buffer.getvalue()
