"""Real image sets cut into hospitals: each simulated site gets its own manifest, as a real one has.

A set is a folder below ``data.root`` with an ``index.csv`` (columns ``id,split,patient,group,image,mask``
and any others). Images stay where they are; the manifests point at them.
"""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.patients import Split
from client.splits import assign_splits
from common.errors import ConfigError, DataError
from common.recipe import CohortConfig, CutConfig, Recipe
from common.seeding import derive_rng, derive_seed

INDEX_COLUMNS = ("id", "split", "patient", "group", "image", "mask")
MIN_TEST_IMAGES = 8  # a cohort's site with fewer is drawn again
MIN_VAL_IMAGES = 2
VAL_SHARE = 0.1  # of the labelled training images, in addition to them
DRAWS = 2000


@dataclass(frozen=True)
class IndexRow:
    """One image of a set; ``patient`` is the image's own id where the set has no patients."""

    patient: str
    split: Split | None
    group: str
    image: Path
    mask: Path | None


Unit = tuple[IndexRow, ...]  # one patient's images


def cut_sites(recipe: Recipe, out: Path) -> list[Path]:
    """Write ``out/SITE/data/manifest.csv`` for every site that is cut from a real set.

    Sites with a ``cut`` come first, then the cohort's ``site-1`` ... ``site-N``; sites with a manifest of
    their own or with phantoms are left out. The cut depends on ``run.seed`` and the sets alone.

    Returns:
        The manifests' paths, in that order.

    Raises:
        ConfigError: ``data.root`` is missing or no folder.
        DataError: a set is missing or broken, or is too small for what the recipe asks of it.
    """
    cuts = [(site.name, site.cut) for site in recipe.sites if site.cut is not None]
    if not cuts and recipe.cohort is None:
        return []
    root = _root(recipe)
    seed = recipe.run.seed
    sites: list[tuple[str, list[IndexRow]]] = []
    faults = []
    for name, cut in cuts:
        try:
            sites.append((name, _cut(name, cut, root, seed)))
        except DataError as error:
            faults += [f"site {name}: {line}" for line in (error.faults or [error.message])]
    if recipe.cohort is not None:
        try:
            sites += _cohort(recipe.cohort, root, seed)
        except DataError as error:
            faults += [f"cohort: {line}" for line in (error.faults or [error.message])]
    if faults:
        raise DataError(f"The sites of {recipe.name or 'this recipe'} cannot be cut from {root}:", faults)
    return [_write_manifest(out / name / "data" / "manifest.csv", rows) for name, rows in sites]


def read_index(root: Path, dataset: str) -> list[IndexRow]:
    """The rows of a set's ``index.csv``. Raises `DataError` naming the path and the sets that are there."""
    index = root / dataset / "index.csv"
    if not dataset or not index.is_file():
        there = ", ".join(sorted(found.parent.name for found in root.glob("*/index.csv"))) or "none"
        raise DataError(f"no set {dataset!r}: {index} is no file (sets there: {there}): set data.root=PATH.")
    with index.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        absent = [column for column in INDEX_COLUMNS if column not in (reader.fieldnames or ())]
        if absent:
            raise DataError(f"{index} has no column {', '.join(absent)}: take the set's own index.csv.")
        rows = [_index_row(index, reader.line_num, cells) for cells in reader]
    if not rows:
        raise DataError(f"{index} lists no image: take the set's own index.csv.")
    return rows


def _index_row(index: Path, line: int, cells: dict[str, str]) -> IndexRow:
    split = cells["split"]
    if split and split not in list(Split):
        raise DataError(f"{index}, line {line}: split {split!r} is none of {', '.join(Split)}.")
    if not cells["id"] or not cells["image"]:
        raise DataError(f"{index}, line {line}: no id or no image.")
    mask = index.parent / cells["mask"] if cells["mask"] else None
    return IndexRow(
        patient=cells["patient"] or cells["id"],
        split=Split(split) if split else None,
        group=cells["group"],
        image=index.parent / cells["image"],
        mask=mask,
    )


def _root(recipe: Recipe) -> Path:
    if not recipe.data.root:
        raise ConfigError(f"{recipe.name or 'This recipe'} needs real images: say where with data.root=PATH.")
    root = Path(recipe.data.root)
    if not root.is_dir():
        raise ConfigError(f"The data root {root} is no folder: say where the images lie, data.root=PATH.")
    return root


def _write_manifest(path: Path, rows: Sequence[IndexRow]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent.resolve()  # resolved: ".." of a linked folder leads elsewhere
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "mask", "patient", "split", "spacing_mm", "group"])
        for row in rows:
            files = [
                os.path.relpath(item.resolve(), folder) if item else "" for item in (row.image, row.mask)
            ]
            writer.writerow([*files, row.patient, row.split, "", row.group])
    return path


# --- one site from a part of a set ----------------------------------------------------------------


def _cut(site: str, cut: CutConfig, root: Path, seed: int) -> list[IndexRow]:
    """The set's own train and test, one training patient moved to val; masks beyond ``labelled`` dropped."""
    listed = read_index(root, cut.dataset)
    rows = [
        row for row in listed if cut.group in (None, row.group) and row.image.stem.endswith(cut.image_suffix)
    ]
    if not rows:
        groups = ", ".join(sorted({row.group or "(none)" for row in listed}))
        asked = f"of group {cut.group!r} and suffix {cut.image_suffix!r}"
        raise DataError(f"{cut.dataset} has no image {asked}: correct the cut (groups: {groups}).")
    rows = _with_splits(rows, derive_seed(seed, "cut", site))
    if cut.labelled is None:
        return rows
    units = _units([row for row in rows if row.split == Split.train and row.mask is not None])
    labelled = list(chain.from_iterable(_shuffled(units, derive_rng(seed, "cut", site, "labelled"))))
    if cut.labelled > len(labelled):
        raise DataError(
            f"{cut.labelled} labelled training images asked of {len(labelled)}: lower cut.labelled."
        )
    keep = set(labelled[: cut.labelled])
    return [row if row.split != Split.train or row in keep else replace(row, mask=None) for row in rows]


def _with_splits(rows: list[IndexRow], seed: int) -> list[IndexRow]:
    """The index's split with a val patient from train, or one dealt by patient where it has none."""
    labelled = sorted({row.patient for row in rows if row.mask is not None})
    splits = {row.patient: row.split for row in rows}
    if None in splits.values():
        dealt = assign_splits(labelled, sorted(set(splits) - set(labelled)), seed)
        return [replace(row, split=dealt[row.patient]) for row in rows]
    train = [patient for patient in labelled if splits[patient] == Split.train]
    if Split.val in splits.values() or len(train) < 2:
        return rows
    moved = train[derive_rng(seed, "val").integers(len(train))]
    return [replace(row, split=Split.val) if row.patient == moved else row for row in rows]


# --- many sites from one set ----------------------------------------------------------------------


def _cohort(cohort: CohortConfig, root: Path, seed: int) -> list[tuple[str, list[IndexRow]]]:
    """Each group is cut over the sites by a Dirichlet draw of its own, train and test by the same.

    Hsu, Qi & Brown, Measuring the effects of non-identical data distribution, 2019, with a set's groups in
    place of its classes. A draw that leaves a site with too few images is drawn again.
    """
    train, test = _train_and_test(read_index(root, cohort.dataset), cohort.test_fraction, seed)
    for attempt in range(DRAWS):
        rng = derive_rng(seed, "cohort", "mixture", attempt)
        pools: list[tuple[list[Unit], list[Unit]]] = [([], []) for _ in range(cohort.sites)]
        for group in train:
            shares = rng.dirichlet([cohort.alpha] * cohort.sites)
            for units, side in ((train[group], 0), (test[group], 1)):
                for pool, part in zip(pools, _parts(units, shares), strict=True):
                    pool[side].extend(part)
        sites = [
            _site(cohort, *pool, derive_rng(seed, "cohort", "site", at)) for at, pool in enumerate(pools)
        ]
        filled = [(f"site-{number}", rows) for number, rows in enumerate(sites, 1) if rows]
        if len(filled) == cohort.sites:
            return filled
    raise DataError(
        f"no cut of {cohort.dataset} into {cohort.sites} sites with {cohort.labelled} labelled, "
        f"{_val_images(cohort)} validation and {MIN_TEST_IMAGES} test images each in {DRAWS} draws: "
        "lower cohort.sites or cohort.labelled, or raise cohort.alpha."
    )


def _train_and_test(
    rows: list[IndexRow], test_fraction: float, seed: int
) -> tuple[dict[str, list[Unit]], dict[str, list[Unit]]]:
    """Shuffled patients a group; a patient without all masks cannot be tested on and stays in train."""
    groups: dict[str, list[Unit]] = defaultdict(list)
    for unit in _units(rows):
        groups[unit[0].group].append(unit)
    train: dict[str, list[Unit]] = {}
    test: dict[str, list[Unit]] = {}
    for group, units in sorted(groups.items()):
        order = _shuffled(units, derive_rng(seed, "cohort", "test", group))
        labelled = [unit for unit in order if _has_masks(unit)]
        test[group] = labelled[: round(test_fraction * len(labelled))]
        train[group] = [unit for unit in order if unit not in test[group]]
    return train, test


def _parts(units: list[Unit], shares: NDArray[np.float64]) -> list[list[Unit]]:
    ends = np.rint(np.cumsum(shares) * len(units)).astype(int).tolist()
    return [units[start:end] for start, end in zip([0, *ends[:-1]], [*ends[:-1], len(units)], strict=True)]


def _site(
    cohort: CohortConfig, train: list[Unit], test: list[Unit], rng: np.random.Generator
) -> list[IndexRow]:
    """A site's rows, none if its pools are too small."""
    tested = [replace(row, split=Split.test) for row in chain.from_iterable(test)]
    shuffled = sorted(_shuffled(train, rng), key=_has_masks, reverse=True)
    masked = sum(map(_has_masks, shuffled))
    labelled, rest = _take(shuffled[:masked], cohort.labelled)
    held, rest = _take(rest, _val_images(cohort))
    others, _ = _take([*rest, *shuffled[masked:]], cohort.unlabelled)
    if len(tested) < MIN_TEST_IMAGES or len(labelled) < cohort.labelled or len(held) < _val_images(cohort):
        return []
    bare = [replace(row, mask=None) for row in (*labelled[cohort.labelled :], *others)]
    trained = [replace(row, split=Split.train) for row in (*labelled[: cohort.labelled], *bare)]
    return [*trained, *(replace(row, split=Split.val) for row in held), *tested]


def _val_images(cohort: CohortConfig) -> int:
    return max(MIN_VAL_IMAGES, round(VAL_SHARE * cohort.labelled))


def _take(units: list[Unit], images: int) -> tuple[list[IndexRow], list[Unit]]:
    """The rows of whole patients until there are at least ``images``, and the patients left."""
    taken: list[IndexRow] = []
    for place, unit in enumerate(units):
        if len(taken) >= images:
            return taken, units[place:]
        taken.extend(unit)
    return taken, []


def _units(rows: Iterable[IndexRow]) -> list[Unit]:
    """Rows by patient, in the index's order: a patient is never cut in two."""
    found: dict[str, list[IndexRow]] = defaultdict(list)
    for row in rows:
        found[row.patient].append(row)
    return [tuple(unit) for unit in found.values()]


def _has_masks(unit: Unit) -> bool:
    return all(row.mask is not None for row in unit)


def _shuffled(units: list[Unit], rng: np.random.Generator) -> list[Unit]:
    return [units[place] for place in rng.permutation(len(units))]
