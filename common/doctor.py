"""`wardround doctor`: what this machine has, and the cause and the fix of what is wrong with it."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("client", "common", "server")
GIB = 1 << 30
MEMORY_NEEDED = 2.5 * GIB  # peak of the demo
DISK_NEEDED = 1 * GIB


@dataclass(frozen=True)
class Finding:
    """``ok`` has neither cause nor fix; ``warning`` may slow or stop a run, ``error`` will."""

    subject: str
    found: str
    level: Literal["ok", "warning", "error"] = "ok"
    cause: str = ""
    fix: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def examine() -> list[Finding]:
    """Every finding. A check that fails itself is an error finding, not an exception."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        python_findings, package_findings, device_findings, memory_findings, disk_findings, port_findings,
        place_findings, recipe_findings, checkpoint_findings,
    )  # fmt: skip
    return [finding for check in checks for finding in _guarded(check)]


def _guarded(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    subject = check.__name__.removesuffix("_findings")
    try:
        return list(check())
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        return [
            Finding(subject, "could not be checked", "error", cause, "install again: make clean && make demo")
        ]


def installed_versions() -> dict[str, str]:
    """Version of each package that Wardround names as its dependency; "missing" where there is none."""
    return {name: _version(name) for name, _ in requirements()}


def requirements() -> list[tuple[str, str]]:
    """(package, version specifier) of each direct dependency, from pyproject.toml."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    parsed = [Requirement(text) for text in project["dependencies"]]
    return [(requirement.name, str(requirement.specifier)) for requirement in parsed]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def python_findings() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} ({sys.executable})")


def package_findings() -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    for name, wanted in requirements():
        found = _version(name)
        if found != "missing" and SpecifierSet(wanted).contains(found, prereleases=True):
            yield Finding(name, found)
        else:
            cause = f"this version of Wardround needs {name}{wanted}"
            yield Finding(name, found, "error", cause, f"pip install -c constraints.txt '{name}{wanted}'")


def device_findings() -> Iterator[Finding]:
    import torch

    yield Finding("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield Finding("cuda", ", ".join(names))
    else:
        yield Finding("cuda", "none (runs use the CPU)")


def memory_findings() -> Iterator[Finding]:
    available = available_memory()
    if available is None:
        yield Finding("memory", "this system does not tell")
    elif available >= MEMORY_NEEDED:
        yield Finding("memory", f"{available / GIB:.1f} GiB available")
    else:
        cause = f"the demo needs about {MEMORY_NEEDED / GIB:g} GiB"
        yield Finding(
            "memory", f"{available / GIB:.1f} GiB available", "warning", cause, "close other programs"
        )


def available_memory() -> int | None:
    """Bytes that a new program can use, or None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return int(kib) * 1024
    except (OSError, StopIteration, ValueError):
        return None


def disk_findings() -> Iterator[Finding]:
    for subject, folder in (("disk (here)", Path.cwd()), ("disk (temporary)", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        found = f"{free / GIB:.1f} GiB free in {folder}"
        if not os.access(folder, os.W_OK):
            cause, fix = "the folder cannot be written to", "run in a folder of your own, or give --out"
            yield Finding(subject, found, "warning", cause, fix)
        elif free < DISK_NEEDED:
            cause = f"a run needs up to {DISK_NEEDED / GIB:g} GiB"
            yield Finding(subject, found, "warning", cause, "free some space, or give --out on another disk")
        else:
            yield Finding(subject, found)


def port_findings() -> Iterator[Finding]:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            yield Finding("loopback port", f"127.0.0.1:{server.getsockname()[1]} could be opened")
    except OSError as error:
        cause = f"no port on 127.0.0.1 can be opened ({error.strerror})"
        fix = "use --engine loopback, which needs none; the ray engine and deployments do"
        yield Finding("loopback port", "none", "warning", cause, fix)


def place_findings() -> Iterator[Finding]:
    """Each package comes from this project: a stray installed ``common`` can shadow ours."""
    for name in PACKAGES:
        file = import_module(name).__file__
        place = Path(file or "").resolve().parent
        if place == ROOT / name:
            yield Finding(f"package {name}", str(place))
        else:
            cause = f"another package named {name} is found first"
            yield Finding(f"package {name}", str(place), "error", cause, f"uninstall it, or run from {ROOT}")


def recipe_findings() -> Iterator[Finding]:
    from common.config import check_recipe, list_recipes

    for name, _ in list_recipes():
        faults = check_recipe(name).faults
        if faults:
            yield Finding(
                f"recipe {name}", f"{len(faults)} faults", "error", faults[0], f"wardround validate {name}"
            )
        else:
            yield Finding(f"recipe {name}", "in order")


def checkpoint_findings() -> Iterator[Finding]:
    """The shipped initial weights are there and are those of their cards."""
    from common import checkpoints
    from common.errors import ArtefactError
    from common.names import GENERATORS, SHIPPED_STUDENTS, TEACHERS

    shipped = checkpoints.names()
    for name in sorted({*TEACHERS, *GENERATORS, *SHIPPED_STUDENTS, *shipped}):
        try:
            yield Finding(f"weights {name}", f"sha256 {checkpoints.base_sha256(name)[:12]}")
        except ArtefactError as error:
            yield Finding(
                f"weights {name}", "unusable", "error", error.message, "git checkout -- common/checkpoints"
            )
