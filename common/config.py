"""Recipes and site files: YAML and ``key=value`` in, checked dataclasses out.

The only module that imports omegaconf; what leaves it is typed. Every fault of a file is listed at
once, with the key, what is wrong and the fix.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.canonical import sha256_of
from common.changes import changes
from common.durable import write_atomic
from common.errors import ConfigError
from common.privacy_rules import privacy_notes
from common.recipe import Recipe, SiteConfig, SiteFile
from common.recipe_rules import file_faults, recipe_faults, site_file_faults
from common.schema_check import Fault, choose_from, read_section

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
BASE = "base"


@dataclass(frozen=True)
class RecipeCheck:
    """What `check_recipe` found: ``faults`` forbid a run, ``notes`` say what to know of it."""

    name: str
    faults: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Layer:
    """One source of settings, kept to say where a faulty key was written."""

    label: str
    config: DictConfig


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe with its overrides, on top of ``configs/base.yaml``.

    Args:
        name_or_path: the stem of a file in ``configs/``, or a path to a YAML file.
        overrides: ``key=value``; a site is ``sites[0]`` or its name (``sites.chase.student=...``).

    Raises:
        ConfigError: with every fault found.
    """
    path = _find(name_or_path)
    recipe, faults, _ = _read_recipe(path, overrides)
    if faults:
        raise ConfigError(_headline(f"recipe {path.stem!r}", faults), faults)
    return recipe


def check_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> RecipeCheck:
    """Like `load_recipe`, but faults are returned, and a data root that is not given is only a note."""
    try:
        path = _find(name_or_path)
    except ConfigError as error:
        return RecipeCheck(name_or_path, error.faults, ())
    recipe, faults, rootless = _read_recipe(path, overrides)
    notes = tuple(privacy_notes(recipe))
    if rootless:
        faults = [fault for fault in faults if fault != rootless]
        notes = ("its images were not looked for: it needs data.root=FOLDER", *notes)
    return RecipeCheck(recipe.name, tuple(faults), notes)


def list_recipes() -> list[tuple[str, str]]:
    """(name, description) of every recipe in ``configs/``, sorted by name."""
    return [(path.stem, _description(path)) for path in recipe_files()]


def recipe_files() -> list[Path]:
    found = (path for path in CONFIG_DIR.glob("*.yaml") if path.stem != BASE)
    return sorted(found, key=lambda path: path.stem)


def save_run_config(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as YAML; `load_run_config` reads the same recipe back."""
    _save(recipe, path)


def save_site(site: SiteFile, path: Path) -> None:
    """Write a ``site.yaml``; `load_site` reads the same site back."""
    _save(site, path)


def _save(section: Recipe | SiteFile, path: Path) -> None:
    plain = json.loads(json.dumps(asdict(section)))  # enums as their text
    # Letters beyond ASCII are escaped: unescaped, YAML takes some of them for the end of a line.
    write_atomic(path, yaml.safe_dump(plain, sort_keys=False).encode())


def load_run_config(path: Path) -> Recipe:
    """The recipe of a finished or interrupted run; its images need not be there any more.

    Raises ``ConfigError`` with every fault found.
    """
    try:
        # Everything in it is resolved: "${" in a text is a text.
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); name the folder of a run") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {_first_line(error)}; restore the file") from error
    recipe, faults = read_section(Recipe, plain)
    assert isinstance(recipe, Recipe)
    faults = faults or recipe_faults(recipe)
    if faults:
        raise ConfigError(_headline(str(path), faults), [str(fault) for fault in faults])
    return recipe


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256 (hex) of every setting of the recipe."""
    return sha256_of(asdict(recipe))


def differences(before: Recipe, now: Recipe) -> list[tuple[str, Any, Any]]:
    """(key, value before, value now) of every setting that differs; a list counts as one setting."""
    return list(changes(asdict(before), asdict(now)))


def load_site(path: Path) -> SiteFile:
    """A hospital's ``site.yaml``. Raises ``ConfigError`` with every fault found."""
    config, faults = _load_yaml(path)
    plain, unresolved = _resolve(config)
    site, shape_faults = read_section(SiteFile, plain)
    assert isinstance(site, SiteFile)
    if not faults:
        broken = {fault.key for fault in [*unresolved, *shape_faults]}
        faults = [*unresolved, *shape_faults]
        faults += [fault for fault in site_file_faults(site) if not _related(fault.key, broken)]
    if faults:
        raise ConfigError(_headline(str(path), faults), [str(fault) for fault in faults])
    return site


def _find(name_or_path: str) -> Path:
    names = [path.stem for path in recipe_files()]
    if name_or_path in names:
        return CONFIG_DIR / f"{name_or_path}.yaml"
    path = Path(name_or_path).expanduser()
    is_path = path.suffix in (".yaml", ".yml") or len(path.parts) > 1
    if is_path and path.is_file():
        return path
    if is_path:
        what = f"there is no file {name_or_path}"
        fix = f"name a YAML file, or a recipe: {choose_from(path.stem, names)}"
    else:
        what, fix = f"there is no recipe {name_or_path!r}", choose_from(name_or_path, names)
    raise ConfigError(what, [f"{what}; {fix}"])


def _read_recipe(path: Path, overrides: Sequence[str]) -> tuple[Recipe, list[str], str]:
    """The recipe as far as it can be read, its faults, and the one of them (or "") on a missing data.root."""
    layers, lines = [], []
    for label, file in ((f"{BASE}.yaml", CONFIG_DIR / f"{BASE}.yaml"), (path.name, path)):
        config, faults = _load_yaml(file)
        layers.append(_Layer(label, config))
        lines += [f"{label}: {fault}" for fault in faults]
    try:
        merged = OmegaConf.merge(*(layer.config for layer in layers))
    except OmegaConfBaseException as error:
        return Recipe(name=path.stem), [*lines, f"{path.name}: {_first_line(error)}; correct the file"], ""
    assert isinstance(merged, DictConfig)
    changed, problems = _override(merged, overrides)
    lines += problems
    plain, faults = _resolve(merged)
    recipe, shape_faults = read_section(Recipe, plain)
    assert isinstance(recipe, Recipe)
    recipe = _with_paths(recipe if recipe.name else replace(recipe, name=path.stem))
    broken = {fault.key for fault in [*faults, *shape_faults]}
    faults += shape_faults
    # A file that could not be read has no sites either: only its own fault is worth telling.
    together = [] if lines and not recipe.sites else [*recipe_faults(recipe), *file_faults(recipe)]
    faults += [fault for fault in together if not _related(fault.key, broken)]
    rootless = ""
    for fault in faults:
        line = f"{_source(fault.key, layers, changed)}: {fault}"
        lines.append(line)
        if fault.key == "data.root" and recipe.data.root is None:
            rootless = line
    return recipe, lines, rootless


def _load_yaml(path: Path) -> tuple[DictConfig, list[Fault]]:
    empty = OmegaConf.create({})
    try:
        config = OmegaConf.load(path)
    except OSError as error:
        return empty, [Fault("", f"cannot be read ({error.strerror})", "check its name and permissions")]
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        return empty, [Fault("", f"is not YAML: {_first_line(error)}", "correct that line")]
    if not isinstance(config, DictConfig):
        return empty, [Fault("", "is a list", "write it as 'key: value' lines")]
    return config, []


def _override(config: DictConfig, overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Apply ``key=value`` to ``config`` in place; return the keys set and a line for each that failed."""
    changed, problems = [], []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            problems.append(f"override {text!r}: not a setting; write key=value, as in run.rounds=5")
            continue
        try:
            key = _site_key(config, key)
            parsed = OmegaConf.from_dotlist([f"value={value}"])["value"]
            OmegaConf.update(config, key, parsed, merge=True, force_add=True)
            changed.append(key)
        except ConfigError as error:
            problems.append(f"override {text!r}: {error.message}")
        except yaml.YAMLError:
            problems.append(f"override {text!r}: its value is not YAML; check brackets and quotes")
        except (OmegaConfBaseException, ValueError, IndexError, TypeError, AttributeError) as error:
            problems.append(f"override {text!r}: {_first_line(error)}; check the key and the value")
    return changed, problems


def _site_key(config: DictConfig, key: str) -> str:
    """``sites.NAME.rest`` and ``sites.0.rest`` as ``sites[0].rest``."""
    head, _, rest = key.partition(".")
    name, _, rest = rest.partition(".")
    sites = config.get("sites")
    if head != "sites" or not name or not OmegaConf.is_list(sites):
        return key
    names = [str(site.get("name")) if OmegaConf.is_dict(site) else "" for site in sites]
    if name not in names and not (name.isdigit() and int(name) < len(names)):
        raise ConfigError(f"there is no site {name!r}; {choose_from(name, names)}")
    index = names.index(name) if name in names else int(name)
    return f"sites[{index}].{rest}" if rest else f"sites[{index}]"


def _resolve(config: DictConfig) -> tuple[Any, list[Fault]]:
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True), []
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        plain = OmegaConf.to_container(config, resolve=False)
        return plain, [Fault(str(key), _first_line(error), "give it a value")]


def _with_paths(recipe: Recipe) -> Recipe:
    """Absolute paths: a manifest from the data root if any, all others from the working directory."""
    root = None if recipe.data.root is None else Path(recipe.data.root).expanduser().absolute()
    sites = [_with_signed(_with_manifest(site, root or Path.cwd())) for site in recipe.sites]
    data = replace(recipe.data, root=None if root is None else os.path.normpath(root))
    return replace(recipe, data=data, sites=sites)


def _with_manifest(site: SiteConfig, root: Path) -> SiteConfig:
    if site.manifest is None:
        return site
    return replace(site, manifest=os.path.normpath(root / Path(site.manifest).expanduser()))


def _with_signed(site: SiteConfig) -> SiteConfig:
    return replace(site, signed_policy=_absolute(site.signed_policy), officer_key=_absolute(site.officer_key))


def _absolute(path: str | None) -> str | None:
    return None if path is None else os.path.normpath(Path(path).expanduser().absolute())


def _source(key: str, layers: Sequence[_Layer], changed: Sequence[str]) -> str:
    """Where ``key`` was last written: an override, a file, or (written nowhere) the recipe's own file."""
    if any(_related(key, {name}) for name in changed):
        return "override"
    for layer in reversed(layers):
        if _holds(OmegaConf.to_container(layer.config, resolve=False), key):
            return layer.label
    return layers[-1].label


def _holds(values: Any, key: str) -> bool:
    for part in re.findall(r"[^.\[\]]+", key):
        try:
            values = values[int(part)] if isinstance(values, list) else values[part]
        except (LookupError, TypeError, ValueError):
            return False
    return True


def _related(key: str, others: set[str]) -> bool:
    """Whether one of ``others`` is ``key``, lies above it, or lies below it."""
    return any(_above(key, other) or _above(other, key) for other in others)


def _above(outer: str, inner: str) -> bool:
    return inner == outer or (inner.startswith(outer) and inner[len(outer)] in ".[")


def _headline(subject: str, faults: Sequence[object]) -> str:
    return f"{subject} has {len(faults)} fault{'s' if len(faults) != 1 else ''}"


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None)
    if mark is not None and problem:
        return f"{problem} in line {mark.line + 1}"
    return text.splitlines()[0]


def _description(path: Path) -> str:
    config, faults = _load_yaml(path)
    if faults:
        return f"(cannot be read; see: wardround validate {path.stem})"
    return str(OmegaConf.select(config, "description", default="") or "")
