"""What a recipe must satisfy, value by value (`recipe_ranges`, `NAMES`) and together (`recipe_faults`).

Only names and numbers are looked at, apart from `file_faults`, which looks for the named files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from common import names
from common import recipe as schema
from common.checkpoints import imported_names
from common.painter_rules import painter_faults
from common.privacy_rules import privacy_faults
from common.recipe import Recipe, SiteConfig, SiteFile
from common.recipe_ranges import RANGES
from common.robust_rules import robust_faults
from common.schema_check import Fault, choose_from
from common.shared_student_rules import shared_student_faults
from common.student_rules import student_faults
from common.tuning.rules import adapter_faults

SITE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")  # a folder's name on every system
RECIPE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")

NAMES: dict[type, dict[str, tuple[str, ...]]] = {
    schema.ClassConfig: {"like": names.PRETRAINED_HEADS},
    schema.TeacherConfig: {"name": names.TEACHERS, "adapter": names.ADAPTER_PRESETS},
    schema.AggregationConfig: {"rule": names.AGGREGATION_RULES, "robust": names.ROBUST_ESTIMATORS},
    schema.GeneratorConfig: {"name": names.GENERATORS},
    schema.StudentConfig: {"name": names.STUDENTS},
    SiteConfig: {"student": names.STUDENTS, "adapter": names.ADAPTER_PRESETS},
    SiteFile: {"student": names.STUDENTS, "adapter": names.ADAPTER_PRESETS},
}


def value_faults(section: Any, key: str = "") -> Iterator[Fault]:
    """Every value of a section, and of those below it, against `RANGES` and `NAMES`."""
    ranges, names = RANGES.get(type(section), {}), NAMES.get(type(section), {})
    for item in fields(section):
        value = getattr(section, item.name)
        path = f"{key}.{item.name}" if key else item.name
        if value is None:
            continue
        if item.name in ranges and not ranges[item.name].holds(value):
            yield Fault(path, f"{value} is out of range", f"it must be {ranges[item.name]}")
        if item.name in names and value not in (known := _with_imported(names[item.name])):
            yield Fault(path, f"there is no {value!r}", choose_from(value, known))
        for inner_path, inner in _sections(path, value):
            yield from value_faults(inner, inner_path)


def _with_imported(known: tuple[str, ...]) -> tuple[str, ...]:
    """The names, and for teachers and generators those that this machine's user brought."""
    brought = {names.TEACHERS: "teacher", names.GENERATORS: "generator"}
    return (*known, *imported_names(brought[known])) if known in brought else known


def _sections(path: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, list):
        return [(f"{path}[{index}]", entry) for index, entry in enumerate(value) if is_dataclass(entry)]
    return [(path, value)] if is_dataclass(value) else []


def recipe_faults(recipe: Recipe) -> list[Fault]:
    """Everything that is wrong with the values of a recipe, one by one and together."""
    faults = list(value_faults(recipe))
    if not RECIPE_NAME.fullmatch(recipe.name):
        faults.append(
            Fault("name", f"{recipe.name!r} cannot name a folder", "use letters, digits, '-', '_' and '.'")
        )
    faults += _data_faults(recipe)
    faults += _consortium_faults(recipe)
    for index, site in enumerate(recipe.sites):
        faults += _site_faults(site, f"sites[{index}]", recipe)
    faults += adapter_faults(recipe)
    faults += robust_faults(recipe.aggregation)
    faults += student_faults(recipe)
    faults += privacy_faults(recipe)
    faults += _baseline_faults(recipe.baselines)
    faults += painter_faults(recipe)
    faults += shared_student_faults(recipe)
    return faults


def _data_faults(recipe: Recipe) -> Iterator[Fault]:
    data = recipe.data
    if data.image_size % 32:
        lower = max(32, data.image_size // 32 * 32)
        yield Fault(
            "data.image_size",
            f"{data.image_size} is not a multiple of 32",
            f"use {lower} or {lower + 32}, for example",
        )
    if not data.classes:
        yield Fault("data.classes", "there is no class", "name at least one: [{name: lesion, label: 255}]")
    for index, name in _repeated([entry.name for entry in data.classes]):
        yield Fault(
            f"data.classes[{index}].name", f"another class has the name {name!r}", "give each its own"
        )
    for index, label in _repeated([entry.label for entry in data.classes]):
        yield Fault(
            f"data.classes[{index}].label", f"another class has the label {label}", "give each its own"
        )
    for index, entry in enumerate(data.classes):
        if not entry.name:
            yield Fault(f"data.classes[{index}].name", "it is empty", "name the class, such as lesion")
    yield from _part_faults(data)


def _part_faults(data: schema.DataConfig) -> Iterator[Fault]:
    """What ``also`` may hold: label values, each once, and none of another class where classes exclude."""
    labels = RANGES[schema.ClassConfig]["label"]
    for index, entry in enumerate(data.classes):
        key = f"data.classes[{index}].also"
        if strange := [value for value in entry.also if not labels.holds(value)]:
            yield Fault(key, f"{strange} are out of range", f"a label value must be {labels}")
        for _, value in _repeated(entry.values):
            yield Fault(key, f"the class has the label value {value} twice", "name it once")
        for other in data.classes[:index] if data.exclusive else []:
            if shared := sorted(set(entry.also) & set(other.values) | {entry.label} & set(other.also)):
                fix = "set data.exclusive=false, or give each value to one class"
                yield Fault(key, f"classes exclude each other and {other.name} has {shared} too", fix)


def _consortium_faults(recipe: Recipe) -> Iterator[Fault]:
    if recipe.sites and recipe.cohort:
        yield Fault(
            "cohort", "there are sites and a cohort", "keep one of them: a cohort makes its own sites"
        )
    if not recipe.sites and not recipe.cohort:
        yield Fault("sites", "there are neither sites nor a cohort", "name at least two sites, or a cohort")
    planned = len(recipe.sites) or (recipe.cohort.sites if recipe.cohort else 0)
    if 0 < planned < recipe.run.min_sites:
        yield Fault(
            "run.min_sites",
            f"it asks for {recipe.run.min_sites} sites and the recipe has {planned}",
            "add sites, or lower run.min_sites",
        )
    for index, name in _repeated([site.name for site in recipe.sites]):
        yield Fault(f"sites[{index}].name", f"another site is called {name!r}", "give each site its own name")
    if recipe.cohort and not recipe.cohort.dataset:
        yield Fault("cohort.dataset", "it is empty", "name a data set below data.root, such as DSB2018_96")
    if recipe.data.root is None and (recipe.cohort or any(site.cut for site in recipe.sites)):
        yield Fault(
            "data.root", "the recipe needs real images and nobody says where they lie", "add data.root=FOLDER"
        )
    yield from _shared_cuts(recipe.sites)


def _shared_cuts(sites: list[SiteConfig]) -> Iterator[Fault]:
    """Two hospitals must not hold the same patients: one would test on what the other trained on."""
    cuts = [(index, site.cut) for index, site in enumerate(sites) if site.cut]
    for position, (index, cut) in enumerate(cuts):
        for other, earlier in cuts[:position]:
            same = cut.dataset == earlier.dataset and cut.image_suffix == earlier.image_suffix
            if same and (cut.group == earlier.group or None in (cut.group, earlier.group)):
                fix = "give each its own cut.group"
                yield Fault(f"sites[{index}].cut", f"it holds patients of sites[{other}] too", fix)


def _site_faults(site: SiteConfig, key: str, recipe: Recipe) -> Iterator[Fault]:
    if not SITE_NAME.fullmatch(site.name):
        yield Fault(
            f"{key}.name",
            f"{site.name!r} cannot name a site's folder",
            "use lower-case letters, digits and '-'",
        )
    sources = [name for name in ("manifest", "cut", "phantom") if getattr(site, name) is not None]
    if len(sources) != 1:
        found = f"it has {' and '.join(sources)}" if sources else "it has no images"
        yield Fault(key, found, "give exactly one of manifest, cut and phantom")
    if (site.signed_policy is None) != (site.officer_key is None):
        fix = "give both, or neither"
        yield Fault(key, "signed_policy and officer_key go together: a policy counts by its signature", fix)
    if site.cut and not site.cut.dataset:
        yield Fault(f"{key}.cut.dataset", "it is empty", "name a data set below data.root, such as HRF")
    if site.phantom:
        yield from _phantom_faults(site.phantom, f"{key}.phantom", recipe)


def _phantom_faults(phantom: schema.PhantomConfig, key: str, recipe: Recipe) -> Iterator[Fault]:
    if phantom.train_patients < recipe.data.min_patients:
        yield Fault(
            f"{key}.train_patients",
            f"{phantom.train_patients} are fewer than data.min_patients ({recipe.data.min_patients})",
            "raise one or lower the other",
        )
    size = phantom.object_size
    if len(size) != 2 or not 0 < size[0] <= size[1] < 0.5:
        yield Fault(
            f"{key}.object_size", f"{size} is no range of radii", "give two shares of the side, [0.08, 0.2]"
        )
    tint = phantom.scanner.tint
    if len(tint) != 3 or any(not 0 <= value <= 4 for value in tint):
        yield Fault(
            f"{key}.scanner.tint", f"{tint} is no tint", "give three factors (red, green, blue), 0 to 4"
        )


def _baseline_faults(baselines: list[str]) -> Iterator[Fault]:
    for index, name in enumerate(baselines):
        if name not in names.BASELINES:
            yield Fault(f"baselines[{index}]", f"there is no {name!r}", choose_from(name, names.BASELINES))
    for index, name in _repeated(baselines):
        yield Fault(f"baselines[{index}]", f"{name!r} is named twice", "name it once")


SIGNED_FILES = {
    "signed_policy": "name the policy.json of `wardround privacy policy sign`",
    "officer_key": "name the officer's public key (KEY.pub of `wardround privacy key`)",
}


def file_faults(recipe: Recipe) -> Iterator[Fault]:
    """The folders and manifests that the recipe names and that are not there."""
    if recipe.data.root is not None:
        yield from _root_faults(recipe, Path(recipe.data.root))
    for index, site in enumerate(recipe.sites):
        if site.manifest is not None and not Path(site.manifest).is_file():
            yield Fault(
                f"sites[{index}].manifest", f"there is no file {site.manifest}", "name a manifest (CSV)"
            )
        for field, fix in SIGNED_FILES.items():
            path = getattr(site, field)
            if path is not None and not Path(path).is_file():
                yield Fault(f"sites[{index}].{field}", f"there is no file {path}", fix)


def _root_faults(recipe: Recipe, root: Path) -> Iterator[Fault]:
    if not root.is_dir():
        yield Fault(
            "data.root",
            f"there is no folder {root}",
            "write data.root=FOLDER with the folder that holds the data sets",
        )
        return
    datasets = {
        f"sites[{index}].cut.dataset": site.cut.dataset for index, site in enumerate(recipe.sites) if site.cut
    }
    if recipe.cohort:
        datasets["cohort.dataset"] = recipe.cohort.dataset
    for key, dataset in datasets.items():
        if dataset and not (root / dataset / "index.csv").is_file():
            there = sorted(path.parent.name for path in root.glob("*/index.csv"))
            fix = choose_from(dataset, there) if there else "put the data set there"
            yield Fault(key, f"there is no {root / dataset / 'index.csv'}", fix)


def site_file_faults(site: SiteFile) -> list[Fault]:
    """Everything that is wrong with the values of a ``site.yaml``."""
    faults = list(value_faults(site))
    if not SITE_NAME.fullmatch(site.name):
        faults.append(
            Fault("name", f"{site.name!r} cannot name a site", "use lower-case letters, digits and '-'")
        )
    if not site.manifest:
        faults.append(Fault("manifest", "it is empty", "name the manifest, such as data/manifest.csv"))
    return faults


def _repeated(values: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """Index and value of each entry that an earlier one equals."""
    seen = set()
    for index, value in enumerate(values):
        if value in seen:
            yield index, value
        seen.add(value)
