"""The bundle of a release: the one courier that every run of it ships, the same bytes wherever it is built.

A hospital that reviewed the source builds the bundle from it and compares the digest with the one that it
is asked to approve. Flower ships one bundle to both sides, so the server's code is in it beside the
courier's; a recipe, an image, a weight or the guard's code is not.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path, PurePosixPath

from common.code_digest import PROJECT, SHIPPED_CODE, sources_sha256
from common.errors import ConfigError

_BESIDE = ("pyproject.toml", ".gitignore", "LICENSE")


def build_bundle(project: Path = PROJECT) -> bytes:
    """Flower's own build of the sources in ``project``.

    Guarantee: the same sources give the same bytes, whenever and wherever they are built.

    Raises ``ConfigError`` where there are no sources to build from, or Flower refuses them.
    """
    from flwr.cli.build import build_fab_from_files

    if not (project / "pyproject.toml").is_file():
        raise ConfigError(f"{project} holds no pyproject.toml: build from a checkout of the release's source")
    files: dict[str, bytes | Path] = {name: project / name for name in _BESIDE if (project / name).is_file()}
    for folder in SHIPPED_CODE:
        for path in sorted((project / folder).rglob("*.py")):
            files[path.relative_to(project).as_posix()] = path
    try:
        bundle, _ = build_fab_from_files(files)
    except ValueError as error:
        raise ConfigError(f"Flower refuses to build {project}: {error}") from error
    content: bytes = bundle
    return content


def bundle_code_sha256(bundle: bytes) -> str:
    """What `code_sha256` is where ``bundle`` is unpacked: the digest that a run of it finds for itself."""
    with zipfile.ZipFile(io.BytesIO(bundle)) as opened:
        paths = [PurePosixPath(name) for name in opened.namelist() if name.endswith(".py")]
        order = sorted(
            (path for path in paths if path.parts[0] in SHIPPED_CODE),
            key=lambda path: (SHIPPED_CODE.index(path.parts[0]), path),
        )
        return sources_sha256((str(path), opened.read(str(path))) for path in order)
