"""A set's folders -> a folder with a manifest, PNG images and label masks; all of it or nothing."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from client.manifest_rows import OPTIONAL, REQUIRED
from client.patients import Split
from client.preparation.known_set import Item, KnownSet
from client.preparation.source import Array, Pixels, Source
from client.splits import assign_splits
from common import progress
from common.errors import DataError, DiskFault, UsageError

MANIFEST, ABOUT = "manifest.csv", "about.json"
PROGRESS_STEPS = 20


@dataclass(frozen=True)
class Preparation:
    """What was made of a set.

    Attributes:
        manifest: its path.
        splits: patients of each split.
        seed: what patients were dealt with; None where the set has splits of its own.
        notes: what was left out, and what a patient is where the set does not tell.
    """

    known: KnownSet
    manifest: Path
    images: int
    labelled: int
    patients: int
    splits: dict[str, int]
    seed: int | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values: what is above, the set's name, its unit, classes and terms."""
        own = {key: value for key, value in vars(self).items() if key not in ("known", "manifest", "notes")}
        return {
            "set": self.known.name,
            "manifest": str(self.manifest),
            **own,
            "notes": list(self.notes),
            "unit": self.known.unit,
            "classes": [asdict(item) for item in self.known.classes],
            "terms": asdict(self.known.terms),
        }


def prepare(known: KnownSet, source: Path, destination: Path, seed: int) -> Preparation:
    """Read the set in ``source``; write ``manifest.csv``, ``images/``, ``masks/`` and ``about.json``.

    Without splits of the set's own, patients are dealt by ``seed`` (`client.splits`).

    Guarantees: ``destination`` is there whole or not at all; ``source`` is only read.

    Raises:
        UsageError: ``destination`` is there already.
        DataError: every fault of the folders and of the files in them, at once.
        DiskFault: ``destination`` cannot be written.
    """
    if destination.exists() or destination.is_symlink():
        raise UsageError(f"{destination} is there already: name a new folder, or remove it first")
    found = Source(source)
    items = _find(known, found)
    with _whole_or_nothing(destination) as building:
        _copy(items, building, found)
        splits = _splits(items, seed, found)
        if found.faults:
            faults = list(dict.fromkeys(found.faults))
            raise DataError(
                f"{source} is not {known.name} as it is handed out ({len(faults)} fault(s))", faults
            )
        _write_manifest(building / MANIFEST, items, splits)
        made = _summary(known, destination, items, splits, seed, found.notes)
        about = json.dumps({**made.to_json(), "manifest": MANIFEST}, indent=2, ensure_ascii=False)
        (building / ABOUT).write_text(about + "\n", encoding="utf-8")
    return made


def _find(known: KnownSet, found: Source) -> list[Item]:
    try:
        items = known.find(found) if found.root.is_dir() else []
    except OSError as error:
        raise DataError(
            f"{error.filename} cannot be read ({error.strerror}): allow it, then try again"
        ) from error
    if not items and not found.faults:
        text = f"holds no image where {known.name} has them: `wardround data sets {known.name}` shows where"
        found.faults.append(f"{found.root} {text}")
    return items


@contextmanager
def _whole_or_nothing(destination: Path) -> Iterator[Path]:
    """A folder beside ``destination`` that takes its name at the end, or goes if anything is raised."""
    building = destination.with_name(f".{destination.name}.part-{os.getpid()}")
    try:
        building.mkdir(parents=True)
        yield building
        building.rename(destination)
    except OSError as error:
        raise DiskFault(
            f"cannot write {destination} ({error.strerror}): free space there, or name another folder"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _copy(items: Sequence[Item], folder: Path, found: Source) -> None:
    """Decode every image and mask; write them as long as nothing is wrong, for then all of it will go."""
    for name in ("images", "masks"):
        (folder / name).mkdir()
    chunk = math.ceil(len(items) / PROGRESS_STEPS) or 1
    progress.stage("reading the set", math.ceil(len(items) / chunk))
    for place, item in enumerate(items, 1):
        arrays = {"images": _read(item.image, found)}
        if item.mask is not None:
            arrays["masks"] = _read(item.mask, found)
            _check_sizes(item.image, item.mask, arrays.values(), found)
        if not found.faults:
            for kind, array in arrays.items():
                Image.fromarray(array).save(folder / kind / f"{item.name}.png")
        if place % chunk == 0 or place == len(items):
            progress.step(f"{place} of {len(items)} images")
    for pixels in found.also_read:
        _read(pixels, found)
    progress.end()


def _read(pixels: Pixels, found: Source) -> Array | None:
    try:
        return pixels.read()
    except DataError as error:
        if error.faults:
            found.faults += [f"{pixels.where}/{fault}" for fault in error.faults]
        else:
            found.faults.append(f"{pixels.where} {error.message}")
        return None


def _check_sizes(image: Pixels, mask: Pixels, arrays: Iterable[Array | None], found: Source) -> None:
    sizes = ["x".join(map(str, array.shape[:2])) for array in arrays if array is not None]
    if len(set(sizes)) > 1:
        found.faults.append(
            f"{mask.where} has {sizes[1]} pixels (rows x columns), {image.where} has {sizes[0]}: restore both"
        )


def _splits(items: Sequence[Item], seed: int, found: Source) -> dict[str, Split]:
    """Patient -> split: the set's own, or dealt; what is wrong goes to ``found``."""
    if found.faults:
        return {}
    official = {item.patient: item.split for item in items if item.split is not None}
    if official:
        return official
    labelled = {item.patient for item in items if item.mask is not None}
    try:
        return assign_splits(sorted(labelled), sorted({item.patient for item in items} - labelled), seed)
    except DataError as error:
        found.faults.append(error.message)
        return {}


def _write_manifest(path: Path, items: Sequence[Item], splits: Mapping[str, Split]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*REQUIRED, *OPTIONAL])
        for item in items:
            spacing = "x".join(f"{side:.6g}" for side in item.spacing_mm) if item.spacing_mm else ""
            mask = f"masks/{item.name}.png" if item.mask is not None else ""
            row = [f"images/{item.name}.png", mask, item.patient, splits[item.patient], spacing, item.group]
            writer.writerow(row)


def _summary(
    known: KnownSet,
    destination: Path,
    items: Sequence[Item],
    splits: Mapping[str, Split],
    seed: int,
    notes: Sequence[str],
) -> Preparation:
    told = [] if known.patients_known else [f"a patient is {known.unit}: epsilons would be of images."]
    if known.whole is not None and len(items) != known.whole:
        told.append(f"{len(items)} images are here; the whole set has {known.whole}.")
    return Preparation(
        known=known,
        manifest=destination / MANIFEST,
        images=len(items),
        labelled=sum(item.mask is not None for item in items),
        patients=len(splits),
        splits={name.value: sum(split == name for split in splits.values()) for name in Split},
        seed=seed if items[0].split is None else None,
        notes=(*notes, *told),
    )
