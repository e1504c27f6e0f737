"""The Flower app bundle: exactly what a run needs, and it works away from the project."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk, build_fab_from_files

from common.errors import ConfigError
from common.release import build_bundle
from tests.architecture.sources import ROOT

NOT_OF_A_RUN = {
    "common/doctor.py", "common/interrupts.py", "common/release.py", "common/relay.py", "common/signals.py",
    "common/guard_link/service.py",
    "common/network/certificates.py", "common/network/children.py", "common/network/documents.py",
    "common/network/handshake.py", "common/network/proxies.py",
    *(path.relative_to(ROOT).as_posix() for path in (ROOT / "server/network").glob("*.py")),
}  # fmt: skip
COURIER = {"client/__init__.py", "client/app.py", "client/faults.py"}
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
        for package in ("common", "server")
        for path in (ROOT / package).rglob("*.py")
        if not path.name.endswith("commands.py")
    }
    assert set(bundle.namelist()) - FLOWERS_OWN == wanted - NOT_OF_A_RUN | COURIER | {"LICENSE"}


def test_a_release_is_the_same_bytes_wherever_and_whenever_it_is_built(
    bundle: zipfile.ZipFile, tmp_path: Path
) -> None:
    copy = tmp_path / "elsewhere"
    for name in ("client", "common", "server", "pyproject.toml", ".gitignore", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
            shutil.copytree(source, copy / name, ignore=ignored, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(source, copy / name)
    (copy / "client" / "study.py").write_text("PATIENTS = 'of one study'\n")
    (copy / "configs").mkdir()
    (copy / "configs" / "study.yaml").write_text("name: study\n")
    (copy / "notes.py").write_text("# of somebody\n")
    built = build_bundle(copy)
    assert built == build_bundle(copy) == build_bundle()
    # What `flwr run` and `flwr build` make of the same folder is the same bundle.
    assert built == build_fab_from_disk(copy)
    assert set(zipfile.ZipFile(io.BytesIO(built)).namelist()) == set(bundle.namelist())


def test_another_source_is_another_bundle(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    for name in (
        "client/__init__.py",
        "client/app.py",
        "client/faults.py",
        "common/a.py",
        "server/app.py",
        "LICENSE",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    for name in (*NOT_OF_A_RUN, "common/commands.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")  # Flower refuses a pattern that matches nothing
    before = build_bundle(tmp_path)
    (tmp_path / "client" / "app.py").write_text("x = 2\n")
    assert build_bundle(tmp_path) != before


def test_without_sources_there_is_nothing_to_build(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="checkout"):
        build_bundle(tmp_path)


def test_the_bundle_holds_no_image_table_or_weights(bundle: zipfile.ZipFile) -> None:
    kinds = {Path(name).suffix for name in bundle.namelist()}
    assert kinds == {"", ".py", ".toml"}


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
