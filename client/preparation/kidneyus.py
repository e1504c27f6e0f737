"""KidneyUS, the Open Kidney Ultrasound Data Set: B-mode images, polygons of two sonographers.

Layout: a folder of PNG images, handed out after registration, and ``reviewed_labels_1.csv`` and
``reviewed_labels_2.csv`` of its repository (``labels/``), tables of the VGG Image Annotator. Known from
that repository: its README, its tables, and its script ``create_masks.py``, which paints the regions in
the order that is kept here. A row is one polygon: ``region_shape_attributes`` holds its corners,
``region_attributes`` its ``Anatomy``. Sonographer 1's are taken.

The capsule is the whole kidney and the other three lie in it. In one mask a pixel has one value, so that
the class ``kidney`` has four: its own and those of its parts.

Its authors say that no two images are of one patient, yet some names begin with the same number: those
are taken as one patient, which can only keep together what belongs together.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from client.preparation.known_set import Item, KnownSet, Labels, Terms
from client.preparation.pictures import read_picture
from client.preparation.source import Pixels, Source
from common.recipe import ClassConfig

TABLES = ("labels/reviewed_labels_1.csv", "reviewed_labels_1.csv")
NAME = r"(\d+_IM-[\d-]+_anon)\.png"
EXAMPLE = "1_IM-0001-0059_anon.png"
VALUES = {"Capsule": 1, "Central Echo Complex": 2, "Medulla": 3, "Cortex": 4}  # painted in this order
JSON_COLUMNS = ("region_shape_attributes", "region_attributes", "file_attributes")
COLUMNS = ("filename", *JSON_COLUMNS)
FEWEST_CORNERS = 3

Polygon = tuple[str, list[tuple[float, float]]]  # anatomy, (x, y) of each corner


def _find(source: Source) -> list[Item]:
    folder = _image_folder(source)
    images = source.files(folder, NAME, EXAMPLE)
    table = next((source.root / name for name in TABLES if (source.root / name).is_file()), None)
    if table is None:
        source.fault(source.root / TABLES[0], "is missing: take it from the set's repository")
        source.also_read += [source.pixels(path, read_picture) for path in images.values()]
        return []
    polygons, views = _read_table(source, table)
    for name in sorted(polygons.keys() - images.keys()) if folder is not None else ():
        source.fault(table, f"has polygons of {name}.png, which is not there: restore the image")
    bare = [name for name in images if not polygons.get(name)]
    if bare:
        source.notes.append(f"{len(bare)} images have no polygon of sonographer 1: they are unlabelled.")
    items = []
    for name, path in images.items():
        image = source.pixels(path, read_picture)
        mask = None
        if polygons.get(name):
            mask = Pixels(f"the mask of {image.where}", partial(_paint, path, polygons[name]))
        items.append(Item(name, name.split("_")[0], image, mask, group=views.get(name, "")))
    return items


def _image_folder(source: Source) -> Path | None:
    """``images``, or whatever folder the archive made, or the root itself."""
    made = [path.name for path in source.subfolders(source.root) if path.name.startswith("kidneyUS_images")]
    choices = ["images", "labels/images", *made]
    if not any((source.root / name).is_dir() for name in choices) and any(source.root.glob("*.png")):
        return source.root
    return source.folder(*choices)


def _read_table(source: Source, table: Path) -> tuple[dict[str, list[Polygon]], dict[str, str]]:
    """Polygons and view of each image, by its name without suffix; faults and notes go to ``source``."""
    polygons: dict[str, list[Polygon]] = defaultdict(list)
    views: dict[str, str] = {}
    skipped: Counter[str] = Counter()
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            absent = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if absent:
                source.fault(table, f"has no column {', '.join(absent)}: take it from the set's repository")
                return {}, {}
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        source.fault(table, f"cannot be read ({type(error).__name__}): take it from the set's repository")
        return {}, {}
    for line, row in rows:
        name = re.sub(r"\.png$", "", row["filename"] or "", flags=re.IGNORECASE)
        try:
            shape, what, about = (json.loads(row[column] or "{}") for column in JSON_COLUMNS)
            views.setdefault(name, str(about.get("View", "")).lower())
            polygon = _polygon(shape, what, skipped)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            source.fault(table, f"line {line}: {_reason(error)}: take the table from the set's repository")
            continue
        polygons[name] += [polygon] if polygon else []
    source.notes += [f"{count} regions {why} are left out." for why, count in skipped.items()]
    return polygons, views


class _UnknownAnatomy(ValueError):
    """A region of a kind that the set does not have."""


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, _UnknownAnatomy) else "is no region as the annotator writes them"


def _polygon(shape: dict[str, Any], what: dict[str, Any], skipped: Counter[str]) -> Polygon | None:
    """None for what is no polygon of an anatomy, counted by its reason; the set has some of each kind."""
    anatomy = what.get("Anatomy")
    if anatomy is None or not shape:
        if shape:
            skipped["without an anatomy"] += 1
        return None
    if anatomy not in VALUES:
        raise _UnknownAnatomy(f"the anatomy {anatomy!r} is none of {', '.join(VALUES)}")
    if shape.get("name") != "polygon":
        skipped["that are no polygon"] += 1
        return None
    corners = list(zip(map(float, shape["all_points_x"]), map(float, shape["all_points_y"]), strict=True))
    if len(corners) < FEWEST_CORNERS:
        skipped[f"of fewer than {FEWEST_CORNERS} corners"] += 1
        return None
    return anatomy, corners


def _paint(path: Path, polygons: list[Polygon]) -> Labels:
    """(H, W): the regions over the capsule, borders included."""
    height, width = read_picture(path).shape[:2]
    canvas = Image.new("L", (width, height))
    brush = ImageDraw.Draw(canvas)
    for anatomy, value in VALUES.items():
        for corners in (corners for painted, corners in polygons if painted == anatomy):
            brush.polygon(corners, fill=value, outline=value)
    return np.array(canvas)


KIDNEYUS_SET = KnownSet(
    "kidneyus", "KidneyUS: 500 and more B-mode images of kidneys, capsule and three regions",
    ("images/1_IM-0001-0059_anon.png   (or a folder kidneyUS_images..., or beside the table)",
     "labels/reviewed_labels_1.csv     (or without labels/)"),
    "the number that a name begins with (its authors: no two images of one patient)", True,
    Terms(
        "CC BY-NC-SA", "No commercial use; what is made from it is shared alike; images need a registration.",
        False, "Singla et al., The Open Kidney Ultrasound Data Set, ASMUS 2023 (arXiv 2206.06657)",
        "https://github.com/rsingla92/kidneyUS", "the README of the set's repository",
        "Whether weights are made from the images in the sense of the licence is not settled: keep them to "
        "non-commercial use.",
    ),
    _find,
    (
        ClassConfig(name="kidney", label=1, like="region", also=[2, 3, 4]),
        ClassConfig(name="central-echo-complex", label=2, like="region"),
        ClassConfig(name="medulla", label=3, like="region"),
        ClassConfig(name="cortex", label=4, like="region"),
    ),
)  # fmt: skip
