"""The import layers hold, with no ignore list, and the linter would see it if they did not."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.architecture.sources import PACKAGES, ROOT

LINTER = Path(sys.executable).with_name("lint-imports")


def run_linter(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(LINTER), "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def test_the_layers_hold() -> None:
    result = run_linter(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_there_is_no_ignore_list() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    assert set(settings["root_packages"]) == set(PACKAGES)
    assert settings["include_external_packages"]
    for contract in settings["contracts"]:
        assert not [key for key in contract if "ignore" in key], contract["name"]


def test_every_contract_is_broken_by_an_import_against_it(tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    against = {
        "server/events.py": ["client.guard", "wardround"],
        "common/plan.py": ["omegaconf"],
        "common/privacy/plan.py": ["torch"],
        "client/guard.py": ["flwr.app", "socket", "common.network.children"],
    }
    for file, imports in against.items():
        with (tmp_path / file).open("a") as source:
            source.writelines(f"\nimport {name}\n" for name in imports)
    result = run_linter(tmp_path)
    assert result.returncode == 1
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    for contract in settings["contracts"]:
        assert f"{contract['name']} BROKEN" in " ".join(result.stdout.split()), result.stdout
