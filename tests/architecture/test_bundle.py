"""The Flower app bundle: exactly what a run needs, and it works away from the project."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_files

from tests.architecture.sources import ROOT

COMMAND_LINE_ONLY = {"common/doctor.py", "common/interrupts.py"}
FLOWERS_OWN = {"pyproject.toml", ".info/CONTENT"}


@pytest.fixture(scope="module")
def bundle() -> zipfile.ZipFile:
    """The bundle of the project's files, and of some that are in it only to be left out."""
    files: dict[str, bytes | Path] = {
        path.relative_to(ROOT).as_posix(): path
        for part in ("client", "common", "server", "simulations", "tests", "configs", "docs", "")
        for path in ((ROOT / part).rglob("*") if part else ROOT.glob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    for stray in (
        "docs/notes.md",
        "runs/demo/config.yaml",
        "tests/data/case.json",
        "common/case.json",
        "spare.py",
    ):
        files[stray] = b"# not for a bundle\n"
    content, _ = build_fab_from_files(files)
    return zipfile.ZipFile(io.BytesIO(content))


def test_the_bundle_holds_exactly_what_a_run_needs(bundle: zipfile.ZipFile) -> None:
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in ("client", "common", "server")
        for path in (ROOT / package).rglob("*.py")
        if not path.name.endswith("commands.py")
    }
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert set(bundle.namelist()) - FLOWERS_OWN == wanted - COMMAND_LINE_ONLY | {"LICENSE"}


def test_the_bundle_holds_no_image_table_or_weights(bundle: zipfile.ZipFile) -> None:
    kinds = {Path(name).suffix for name in bundle.namelist()}
    assert kinds == {"", ".py", ".yaml", ".toml"}


def test_both_apps_load_from_the_bundle_alone(bundle: zipfile.ZipFile, tmp_path: Path) -> None:
    bundle.extractall(tmp_path)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import client.app, common, server.app\n"
        "for module in (client.app, common, server.app):\n"
        "    assert module.__file__.startswith(sys.argv[1]), module.__file__\n"
        "assert client.app.app and server.app.app\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'simulations', 'wardround'}))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
