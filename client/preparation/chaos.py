"""CHAOS: abdominal CT (liver) and MR (liver, kidneys, spleen) as DICOM series with PNG masks.

Layout of ``CHAOS_Train_Sets.zip`` (Zenodo 3431873), known from the challenge's evaluation repository,
which holds one CT case, and from several public loaders::

    Train_Sets/CT/1/DICOM_anon/i0000,0000b.dcm      (or IMG-0002-00001.dcm)
    Train_Sets/CT/1/Ground/liver_GT_000.png         0 and 255
    Train_Sets/MR/1/T1DUAL/DICOM_anon/InPhase/IMG-0004-00002.dcm, OutPhase/...
    Train_Sets/MR/1/T1DUAL/Ground/IMG-0004-00002.png
    Train_Sets/MR/1/T2SPIR/DICOM_anon/IMG-0002-00001.dcm, Ground/IMG-0002-00001.png

MR masks hold 63 (read as 55 to 70) liver, 126 (110 to 135) right kidney, 189 (175 to 200) left kidney,
252 (240 to 255) spleen. In-phase and out-of-phase images share their masks. The test half has no masks.

A mask belongs to the slice of the same place in the order of file numbers; the rows are in the order of
the slices' places in the patient, which is another matter. Both kinds of masks come out as 1 liver, 2 right
kidney, 3 left kidney, 4 spleen, so that CT and MR sites can be of one consortium. CT is windowed to
-160 ... 240 HU (level 40, width 400: soft tissue) and stored with 8 bits; MR keeps its numbers (16 bits).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd
from pathlib import Path

import numpy as np

from client.preparation.dicom_series import Slice, read_slice, read_stored, series_fault
from client.preparation.known_set import Item, KnownSet, Labels, Terms
from client.preparation.pictures import read_binary, read_labels, refuse_values
from client.preparation.source import Array, Source
from common.errors import DataError
from common.recipe import ClassConfig

CT_WINDOW_HU = (-160.0, 240.0)
LIVER, RIGHT_KIDNEY, LEFT_KIDNEY, SPLEEN = 1, 2, 3, 4
MR_CODES = {LIVER: (55, 70), RIGHT_KIDNEY: (110, 135), LEFT_KIDNEY: (175, 200), SPLEEN: (240, 255)}
CT_DICOM, CT_MASK = r"(i\d+,0000b|IMG-\d+-\d+)\.dcm", r"(liver_GT_\d+)\.png"
MR_DICOM, MR_MASK = r"(IMG-\d+-\d+)\.dcm", r"(IMG-\d+-\d+)\.png"


@dataclass(frozen=True)
class Series:
    """One series of a patient: where its slices and masks lie and how they are read."""

    slices: str
    masks: str
    name: str
    read_image: Callable[[Path], Array]
    read_mask: Callable[[Path], Labels]


def read_ct(path: Path) -> Array:
    """(H, W) uint8: 0 at -160 HU and below, 255 at 240 HU and above. Raises `DataError`."""
    low, high = CT_WINDOW_HU
    return np.rint((np.clip(read_stored(path), low, high) - low) * (255 / (high - low))).astype(np.uint8)


def read_mr(path: Path) -> Array:
    """(H, W) uint16: the numbers as they are; what is below 0, which no magnitude is, becomes 0."""
    return np.rint(np.clip(read_stored(path), 0, np.iinfo(np.uint16).max)).astype(np.uint16)


def read_ct_mask(path: Path) -> Labels:
    return (read_binary(path) // 255 * LIVER).astype(np.uint8)


def read_mr_mask(path: Path) -> Labels:
    """(H, W) of 0 to 4. Raises `DataError` for a value that stands for no organ."""
    stored = read_labels(path)
    labels = np.zeros_like(stored)
    known = {0}
    for label, (low, high) in MR_CODES.items():
        labels[(stored >= low) & (stored <= high)] = label
        known |= set(range(low, high + 1))
    try:
        refuse_values(stored, known)
    except DataError as error:
        codes = "0, 63 liver, 126 right kidney, 189 left kidney, 252 spleen"
        raise DataError(f"{error.message.split(',')[0]}, none of {codes}: restore it") from None
    return labels


CT_SERIES = (Series("DICOM_anon", "Ground", "ct", read_ct, read_ct_mask),)
MR_SERIES = (
    Series("T1DUAL/DICOM_anon/InPhase", "T1DUAL/Ground", "t1-in-phase", read_mr, read_mr_mask),
    Series("T1DUAL/DICOM_anon/OutPhase", "T1DUAL/Ground", "t1-out-of-phase", read_mr, read_mr_mask),
    Series("T2SPIR/DICOM_anon", "T2SPIR/Ground", "t2-spir", read_mr, read_mr_mask),
)


def _find(source: Source, kind: str, series: Sequence[Series]) -> list[Item]:
    source.step_into("CHAOS_Train_Sets")
    source.step_into("Train_Sets")
    items = []
    for case in source.subfolders(source.folder(kind)):
        if not case.name.isdigit():
            source.fault(case, "is not named as the set names its patients (a number): restore its name")
            continue
        for one in series:
            items += _find_series(source, case, one)
    return items


def _find_series(source: Source, case: Path, series: Series) -> list[Item]:
    kind = case.parent.name
    dicom, mask = (CT_DICOM, CT_MASK) if kind == "CT" else (MR_DICOM, MR_MASK)
    examples = (
        ("i0000,0000b.dcm", "liver_GT_000.png")
        if kind == "CT"
        else ("IMG-0004-00002.dcm", "IMG-0004-00002.png")
    )
    folders = [source.folder(f"{kind}/{case.name}/{place}") for place in (series.slices, series.masks)]
    slices = source.files(folders[0], dicom, examples[0])
    masks = source.files(folders[1], mask, examples[1])
    pairs: dict[Path, Path] = {}
    if folders[0] is not None and folders[1] is not None:
        # The phases of a dual echo take turns in the numbers: 2, 4, 6 may have the masks 1, 2, 3.
        if _places(slices, in_steps=kind == "MR") == _places(masks, in_steps=kind == "MR"):
            pairs = dict(zip(slices.values(), masks.values(), strict=True))
        else:
            text = f"holds {len(masks)} masks for {len(slices)} slices, or other numbers than they have"
            source.fault(folders[1], f"{text}: restore what is missing or renamed")
    geometry = _in_order(source, folders[0], list(pairs)) if folders[0] is not None else []
    if not geometry:  # no rows, and still the faults of each file
        source.also_read += [source.pixels(path, series.read_image) for path in slices.values()]
        source.also_read += [source.pixels(path, series.read_mask) for path in masks.values()]
    patient = f"{kind.lower()}-{case.name}"
    return [
        Item(
            f"{patient}-{series.name}-{place:03d}",
            patient,
            source.pixels(one.path, series.read_image),
            source.pixels(pairs[one.path], series.read_mask),
            spacing_mm=one.spacing_mm,
            group=series.name,
        )
        for place, one in enumerate(geometry)
    ]


def _places(names: Iterable[str], in_steps: bool) -> list[int]:
    """The last numbers of the names, counted from the first; in steps of their own 2, 4, 8 are 0, 1, 3."""
    numbers = [int(re.findall(r"\d+", name.removesuffix("0000b"))[-1]) for name in names]
    distances = [number - numbers[0] for number in numbers]
    step = gcd(*distances) if in_steps else 1
    return [distance // (step or 1) for distance in distances]


def _in_order(source: Source, folder: Path, paths: list[Path]) -> list[Slice]:
    """The slices from one end of the patient to the other; nothing if they are no series."""
    found = []
    for path in paths:
        try:
            found.append(read_slice(path))
        except DataError as error:
            source.fault(path, error.message)
    if len(found) < len(paths) or not found:
        return []
    if text := series_fault(found):
        source.fault(folder, text)
        return []
    return sorted(found, key=lambda one: one.place_mm)


LIVER_CLASS = ClassConfig(name="liver", label=LIVER, like="region")
TERMS = Terms(
    "CC BY-NC-SA 4.0", "No commercial use; what is made from it is shared alike.", False,
    "Kavur et al., Medical Image Analysis 69, 101950, 2021",
    "https://chaos.grand-challenge.org/", "public loaders that name its Zenodo record, 3431873",
    "Whether weights are made from the images in the sense of the licence is not settled: keep them to "
    "non-commercial use.",
)  # fmt: skip
CHAOS_CT_SET = KnownSet(
    "chaos-ct", "CHAOS, CT half: 20 livers with their masks, a row a slice",
    ("Train_Sets/CT/1/DICOM_anon/i0000,0000b.dcm   Train_Sets/CT/1/Ground/liver_GT_000.png",),
    "a patient: every slice of a case", True, TERMS,
    partial(_find, kind="CT", series=CT_SERIES), (LIVER_CLASS,),
)  # fmt: skip
CHAOS_MR_SET = KnownSet(
    "chaos-mr", "CHAOS, MR half: 20 abdomens in three sequences, four organs, a row a slice",
    ("Train_Sets/MR/1/T1DUAL/DICOM_anon/InPhase/*.dcm   OutPhase/*.dcm   Train_Sets/MR/1/T1DUAL/Ground/*.png",
     "Train_Sets/MR/1/T2SPIR/DICOM_anon/*.dcm           Train_Sets/MR/1/T2SPIR/Ground/*.png"),
    "a patient: every slice of every sequence of a case", True, TERMS,
    partial(_find, kind="MR", series=MR_SERIES),
    (
        LIVER_CLASS,
        ClassConfig(name="right-kidney", label=RIGHT_KIDNEY, like="region"),
        ClassConfig(name="left-kidney", label=LEFT_KIDNEY, like="region"),
        ClassConfig(name="spleen", label=SPLEEN, like="region"),
    ),
)  # fmt: skip
