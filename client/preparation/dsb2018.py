"""Data Science Bowl 2018 (BBBC038): cell nuclei, one mask a nucleus.

Layout as its competition describes it: ``stage1_train/ID/images/ID.png`` and ``stage1_train/ID/masks/``
with one black-and-white PNG a nucleus, none of which overlap; here they become one mask. The test half of
stage 1 (``stage1_test/ID/images/ID.png``) has its nuclei in ``stage1_solution.csv`` as run lengths: pairs
of a first pixel, counted from 1 down the columns, and a length. With both there, they are the test split.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from client.patients import Split
from client.preparation.known_set import Item, KnownSet, Labels, Terms
from client.preparation.pictures import FOREGROUND, read_binary, read_picture
from client.preparation.source import Pixels, Source
from common.errors import DataError
from common.recipe import ClassConfig

TRAIN, TEST, SOLUTION = "stage1_train", "stage1_test", "stage1_solution.csv"
COLUMNS = ("ImageId", "EncodedPixels", "Height", "Width")
Runs = list[tuple[str, int, int]]  # run lengths of one nucleus, and its image's height and width


def _find(source: Source) -> list[Item]:
    items = [
        item for case in source.subfolders(source.folder(TRAIN)) if (item := _training_item(source, case))
    ]
    test, solution = source.root / TEST, source.root / SOLUTION
    if not test.is_dir():
        return items
    if not solution.is_file():
        source.notes.append(f"{TEST} is left out: its nuclei are in {SOLUTION}, which is not there.")
        return items
    runs = _read_solution(source, solution)
    tested = [item for case in source.subfolders(test) if (item := _test_item(source, case, runs))]
    return [replace(item, split=Split.train) for item in items] + tested


def _training_item(source: Source, case: Path) -> Item | None:
    image = _image_of(source, case)
    masks = case / "masks"
    nuclei = sorted(masks.glob("*.png"))
    if not nuclei:
        source.fault(
            masks,
            "holds no mask: unpack the whole set again"
            if masks.is_dir()
            else "is missing: unpack the whole set again",
        )
    mask = Pixels(source.name_of(masks), partial(_merge, nuclei))
    if image is None or not nuclei:
        source.also_read += [*([image] if image else []), *([mask] if nuclei else [])]
        return None
    return Item(case.name, case.name, image, mask)


def _test_item(source: Source, case: Path, runs: dict[str, Runs]) -> Item | None:
    image = _image_of(source, case)
    if case.name not in runs:
        source.fault(case, f"has no line in {SOLUTION}: restore the file")
    if image is None or case.name not in runs:
        return None
    mask = Pixels(source.name_of(case), partial(_decode, runs[case.name]))
    return Item(case.name, case.name, image, mask, Split.test)


def _image_of(source: Source, case: Path) -> Pixels | None:
    path = case / "images" / f"{case.name}.png"
    if path.is_file():
        return source.pixels(path, read_picture)
    source.missing_file(path)
    return None


def _merge(nuclei: list[Path]) -> Labels:
    """One mask of all nuclei. Raises `DataError` naming each file that is none of this image."""
    merged: Labels | None = None
    faults = []
    for path in nuclei:
        try:
            nucleus = read_binary(path)
            if merged is not None and nucleus.shape != merged.shape:
                raise DataError("differs in size from the other masks of its image: restore it")
        except DataError as error:
            faults.append(f"{path.name} {error.message}")
            continue
        merged = nucleus if merged is None else np.maximum(merged, nucleus)
    if faults or merged is None:
        raise DataError("has masks that cannot be used:", faults)
    return merged


def _read_solution(source: Source, path: Path) -> dict[str, Runs]:
    found: dict[str, Runs] = defaultdict(list)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            absent = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if absent:
                source.fault(path, f"has no column {', '.join(absent)}: restore the file")
                return {}
            for row in reader:
                runs = row["EncodedPixels"], int(row["Height"]), int(row["Width"])
                found[row["ImageId"]].append(runs)
    except (OSError, UnicodeDecodeError, ValueError, TypeError, csv.Error) as error:
        source.fault(path, f"cannot be read ({type(error).__name__}): restore the file")
    return found


def _decode(nuclei: Runs) -> Labels:
    """Run lengths down the columns -> (height, width)."""
    _, height, width = nuclei[0]
    flat = np.zeros(height * width, np.uint8)
    for text, *size in nuclei:
        parts = text.split()
        numbers = [int(part) for part in parts if part.isdecimal()]
        starts, lengths = numbers[::2], numbers[1::2]
        whole = size == [height, width] and len(numbers) == len(parts) and len(starts) == len(lengths)
        if not whole or not all(
            0 < start <= start + length - 1 <= flat.size
            for start, length in zip(starts, lengths, strict=True)
        ):
            raise DataError(f"has run lengths in {SOLUTION} that do not fit its size: restore the file")
        for start, length in zip(starts, lengths, strict=True):
            flat[start - 1 : start - 1 + length] = FOREGROUND
    return flat.reshape((height, width), order="F")


DSB2018_SET = KnownSet(
    "dsb2018", "Data Science Bowl 2018 (BBBC038), stage 1: microscopy of cell nuclei",
    ("stage1_train/ID/images/ID.png   stage1_train/ID/masks/NUCLEUS.png",
     "stage1_test/ID/images/ID.png   stage1_solution.csv   (both or neither)"),
    "an image (the set does not tell which are tiles of one slide)", False,
    Terms(
        "CC0 1.0", "Any use; a citation is good manners.", True,
        "Caicedo et al., Nature Methods 16, 1247-1253, 2019",
        "https://bbbc.broadinstitute.org/BBBC038", "public copies of the set that name its page",
    ),
    _find, (ClassConfig(name="nucleus", label=255, like="blob"),),
)  # fmt: skip
