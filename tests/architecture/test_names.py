"""Names: of files, of packages, and of the things that a recipe may ask for."""

from __future__ import annotations

import ast
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from common import names, recipe
from tests.architecture.sources import PACKAGES, ROOT, functions_of, modules, name_of

FILE_LINES = 400
FUNCTION_LINES = 40  # the docstring not counted
PARAMETERS = 6


def test_the_sources_were_found() -> None:
    found = {name_of(path) for path in modules()}
    assert {"wardround", "common.config", "client.guard", "server.app", "simulations.commands"} <= found


def test_no_file_is_a_bag() -> None:
    bags = {"util", "utils", "helper", "helpers", "misc", "common_utils", "tools"}
    assert not [str(path) for path in modules() if path.stem in bags]


def test_no_file_is_longer_than_the_guide() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert not {name: lines for name, lines in lengths.items() if lines > FILE_LINES}


def test_no_function_is_longer_than_the_guide() -> None:
    long = {}
    for path in modules():
        for function in functions_of(path):
            docstring = len((ast.get_docstring(function, clean=False) or "").splitlines())
            lines = (function.end_lineno or function.lineno) - function.lineno + 1 - docstring
            if lines > FUNCTION_LINES:
                long[f"{name_of(path)}.{function.name}"] = lines
    assert not long


def test_no_function_takes_more_parameters_than_the_guide() -> None:
    wide = {}
    for path in modules():
        for function in functions_of(path):
            given = function.args
            names = [entry.arg for entry in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            if count > PARAMETERS:
                wide[f"{name_of(path)}.{function.name}"] = count
    assert not wide


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        path for path in modules() if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_comes_from_this_project(package: str) -> None:
    """A stray third-party package of the same name can shadow ours."""
    file = import_module(package).__file__
    assert file is not None
    assert Path(file).resolve().parent == ROOT / package


def test_the_top_level_holds_our_packages_and_no_others() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert folders <= {*PACKAGES, "tests", "docs"}
    assert {path.name for path in ROOT.glob("*.py")} == {"wardround.py"}


def test_flower_is_not_invited_to_rewrite_the_project_file() -> None:
    flower = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]
    assert "federations" not in flower
    assert flower["app"]["publisher"] == "wardround"


def test_the_names_in_the_recipe_are_those_of_the_registries() -> None:
    from client.students import STUDENTS
    from client.teachers import LOCAL_TEACHER
    from client.variants import VARIANTS
    from common.teacher import HEADS
    from common.tuning.presets import PRESETS
    from server.aggregation import RULES
    from simulations.baselines import MAKERS

    assert set(names.STUDENTS) == set(STUDENTS)
    assert set(names.AGGREGATION_RULES) == set(RULES)
    assert sorted(names.ADAPTER_PRESETS) == sorted(PRESETS)
    assert names.PRETRAINED_HEADS == HEADS
    assert set(names.BASELINES) == {*VARIANTS, LOCAL_TEACHER, *MAKERS} - {"student"}
    assert set(names.POOLED_BASELINES) == set(MAKERS)


def test_the_models_in_the_recipe_are_those_that_ship() -> None:
    from common import checkpoints

    shipped: dict[str, set[str]] = {}
    for name in checkpoints.names():
        shipped.setdefault(checkpoints.card(name)["kind"], set()).add(name)
    assert set(names.SHIPPED_STUDENTS) <= set(names.STUDENTS)  # vit-tiny: 12 MB, and MAE is its start
    assert shipped == {
        "teacher": set(names.TEACHERS),
        "generator": set(names.GENERATORS),
        "student": set(names.SHIPPED_STUDENTS),
    }


def test_a_default_recipe_uses_names_that_exist() -> None:
    defaults = recipe.Recipe()
    assert defaults.teacher.name in names.TEACHERS
    assert defaults.teacher.adapter in names.ADAPTER_PRESETS
    assert defaults.student.name in names.SHIPPED_STUDENTS
    assert defaults.generator.name in names.GENERATORS
    assert defaults.aggregation.rule in names.AGGREGATION_RULES
    assert set(defaults.baselines) <= set(names.BASELINES)
