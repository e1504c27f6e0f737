"""The manifest's text: what its lines say, before any image is opened.

Columns ``image,mask,patient[,split][,spacing_mm][,group]``; paths are relative to the manifest, an
empty mask means unlabelled, ``spacing_mm`` is one number or ``ROWxCOLUMN`` (``0.5x0.7``).
Every text made here names lines, files or patients: it is for the site's own eyes.
"""

from __future__ import annotations

import csv
import difflib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from client.patients import Split
from common.errors import DataError

REQUIRED = ("image", "mask", "patient")
OPTIONAL = ("split", "spacing_mm", "group")


class FaultKind(StrEnum):
    unreadable_manifest = "unreadable_manifest"
    columns = "columns"
    row = "row"  # a cell is missing or has no meaning
    split_name = "split_name"  # the same, of the split
    missing_file = "missing_file"
    unreadable_file = "unreadable_file"
    size_mismatch = "size_mismatch"
    undeclared_label = "undeclared_label"
    empty_mask = "empty_mask"
    duplicate_pixels = "duplicate_pixels"
    patient_in_two_splits = "patient_in_two_splits"
    not_finite = "not_finite"
    too_few_patients = "too_few_patients"


@dataclass(frozen=True)
class Fault:
    """``line`` is the manifest's line, 1 for the header, 0 for the manifest as a whole."""

    kind: FaultKind
    line: int
    text: str
    warning: bool = False

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line else ""
        return f"{where}{self.text}"


@dataclass(frozen=True)
class ManifestRow:
    """One image; ``spacing_mm`` is (row, column) of a stored pixel. ``split`` None: not given."""

    line: int
    image: Path
    mask: Path | None
    patient: str
    split: Split | None = None
    spacing_mm: tuple[float, float] | None = None
    group: str = ""


@dataclass(frozen=True)
class Manifest:
    path: Path
    rows: tuple[ManifestRow, ...]

    @property
    def has_splits(self) -> bool:
        return any(row.split is not None for row in self.rows)

    def by_patient(self) -> dict[str, list[ManifestRow]]:
        """Rows a patient, both in the manifest's order; rows without a patient are left out."""
        found: dict[str, list[ManifestRow]] = defaultdict(list)
        for row in self.rows:
            if row.patient:
                found[row.patient].append(row)
        return dict(found)

    def labelled_patients(self, split: Split | None = None) -> list[str]:
        """Patients with a mask, of ``split`` or of all."""
        return [
            patient
            for patient, rows in self.by_patient().items()
            if any(row.mask is not None and (split is None or row.split == split) for row in rows)
        ]


def read_manifest(path: Path) -> Manifest:
    """Read the CSV; no image is opened. Raises `DataError` with every fault of its text at once."""
    manifest, faults = parse_manifest(path)
    if faults:
        raise DataError(f"{path} is not a usable manifest:", [str(fault) for fault in faults])
    return manifest


def parse_manifest(path: Path) -> tuple[Manifest, list[Fault]]:
    """The rows that have an image, and every fault of the text; raises nothing for a fault."""
    nothing = Manifest(path, ())
    lines, problem = _read_lines(path)
    if problem:
        return nothing, [Fault(FaultKind.unreadable_manifest, 0, f"{path} {problem}")]
    header = lines[0][1]
    faults = _column_faults(header)
    if "image" not in header:
        return nothing, faults
    rows = []
    for number, cells in lines[1:]:
        row, found = _parse_row(path.parent, number, header, cells)
        faults += found
        if row is not None:
            rows.append(row)
    manifest = Manifest(path, tuple(rows))
    misspelt = {fault.line for fault in faults if fault.kind is FaultKind.split_name}
    return manifest, faults + _split_faults(manifest, misspelt)


def _read_lines(path: Path) -> tuple[list[tuple[int, list[str]]], str]:
    """Numbered lines, the header first, without blank ones; and what makes the file useless, if anything."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except OSError as error:
        return [], f"cannot be opened ({error.strerror}): correct the path."
    except (UnicodeDecodeError, csv.Error) as error:
        return [], f"is not a CSV file in UTF-8 ({error}): export it again."
    lines = [(number, cells) for number, cells in lines if any(cells)]
    return lines, "" if len(lines) > 1 else "lists no image: add one row an image."


def _column_faults(header: Sequence[str]) -> list[Fault]:
    faults = []
    for column in REQUIRED:
        if column not in header:
            text = f"no column {column!r}: the columns are {','.join(REQUIRED)}[,{'][,'.join(OPTIONAL)}]."
            faults.append(Fault(FaultKind.columns, 1, text))
    for column in sorted({column for column in header if column and header.count(column) > 1}):
        faults.append(Fault(FaultKind.columns, 1, f"the column {column!r} comes twice: remove one."))
    absent = [column for column in OPTIONAL if column not in header]
    for column in header:
        # Other columns are the site's own notes, but a misspelt one would be ignored in silence.
        near = difflib.get_close_matches(column.lower(), absent, n=1, cutoff=0.75)
        if near and column not in REQUIRED + OPTIONAL:
            faults.append(
                Fault(FaultKind.columns, 1, f"unknown column {column!r}: did you mean {near[0]!r}?")
            )
    return faults


def _parse_row(
    folder: Path, line: int, header: Sequence[str], cells: Sequence[str]
) -> tuple[ManifestRow | None, list[Fault]]:
    if len(cells) != len(header):
        text = f"{len(cells)} cells where the header has {len(header)}: quote commas inside a cell."
        return None, [Fault(FaultKind.row, line, text)]
    cell = dict(zip(header, cells, strict=True))
    texts, faults = [], []
    if not cell["image"]:
        texts.append("no image: give its path relative to the manifest.")
    if "patient" in cell and not cell["patient"]:
        texts.append("no patient: give a pseudonym, the same in every row of one person.")
    split, spacing = None, None
    if name := cell.get("split"):
        split = Split(name) if name in list(Split) else None
        if split is None:
            text = f"split {name!r} is none of {', '.join(Split)}."
            faults.append(Fault(FaultKind.split_name, line, text))
    try:
        spacing = parse_spacing(cell.get("spacing_mm", ""))
    except ValueError:
        texts.append(
            f"spacing_mm {cell['spacing_mm']!r} is no number above 0 and no ROWxCOLUMN like 0.5x0.7."
        )
    faults += [Fault(FaultKind.row, line, text) for text in texts]
    if not cell["image"]:
        return None, faults
    mask = folder / cell["mask"] if cell.get("mask") else None
    image, patient, group = folder / cell["image"], cell.get("patient", ""), cell.get("group", "")
    return ManifestRow(line, image, mask, patient, split, spacing, group), faults


def parse_spacing(text: str) -> tuple[float, float] | None:
    """``""`` -> None, ``"0.5"`` -> (0.5, 0.5), ``"0.5x0.7"`` -> (0.5, 0.7). Raises ``ValueError``."""
    if not text:
        return None
    numbers = [float(part) for part in text.split("x")]
    if len(numbers) > 2 or not all(math.isfinite(number) and number > 0 for number in numbers):
        raise ValueError(text)
    return numbers[0], numbers[-1]


def _split_faults(manifest: Manifest, misspelt: set[int]) -> list[Fault]:
    """``misspelt``: lines whose split already has its fault."""
    faults = []
    if manifest.has_splits:
        for row in manifest.rows:
            if row.split is None and row.line not in misspelt:
                text = "no split where other rows have one: fill the column in every row or in none."
                faults.append(Fault(FaultKind.split_name, row.line, text))
    for patient, rows in manifest.by_patient().items():
        names = {row.split: row.line for row in reversed(rows) if row.split is not None}
        if len(names) > 1:
            where = " and ".join(sorted(names))
            text = f"patient {patient!r} is in {where}: put all images of a person in one split."
            faults.append(Fault(FaultKind.patient_in_two_splits, max(names.values()), text))
    return faults
