"""Autooral: photographs of oral ulcers with masks.

Layout as a public loader reads the archive, which we have not seen: ``Train/data_train/0001.png``,
``Train/mask_train/0001.png`` of the same name, and ``Training Set disease classification.xlsx`` with the
columns ``Image Number`` and ``Patient ID``. That ``Val`` and ``Test`` follow the same pattern is an
assumption; they are used if they are there. Masks are 0 and 255: its authors' loader divides by 255.
"""

from __future__ import annotations

from pathlib import Path

from client.patients import Split
from client.preparation.known_set import Item, KnownSet, Terms
from client.preparation.pictures import read_binary, read_picture
from client.preparation.source import FileKind, Source
from client.preparation.workbook import read_rows
from common.errors import DataError
from common.recipe import ClassConfig

WORKBOOK = "{} Set disease classification.xlsx"
PARTS = {"Train": ("Training", Split.train), "Val": ("Validation", Split.val), "Test": ("Test", Split.test)}
NUMBER, PATIENT = "Image Number", "Patient ID"


def _find(source: Source) -> list[Item]:
    source.step_into("Autooral_dataset", "Autooral")
    present = [part for part in PARTS if part == "Train" or (source.root / part).is_dir()]
    official = len(present) > 1
    return [item for part in present for item in _find_part(source, part, official)]


def _find_part(source: Source, part: str, official: bool) -> list[Item]:
    word, split = PARTS[part]
    patients = _read_patients(source, source.root / WORKBOOK.format(word), part)
    folders = [f"{part}/{kind}_{part.lower()}" for kind in ("data", "mask")]
    images, masks = (
        FileKind(folder, "{}.png", r"\d+", "0001", read)
        for folder, read in zip(folders, (read_picture, read_binary), strict=True)
    )
    items = []
    for key, image, mask in source.pairs(images, masks):
        patient = patients.get(int(key), "") if patients else f"image-{key}"
        if not patient:
            source.faults.append(
                f"{image.where} has no patient in {WORKBOOK.format(word)}: restore the workbook"
            )
        names = f"{part.lower()}-{key}", f"{part.lower()}-{patient}"
        items.append(Item(*names, image, mask, split if official else None))
    return items


def _read_patients(source: Source, path: Path, part: str) -> dict[int, str]:
    """Image number -> patient; nothing where the part has no workbook, which only ``Train`` must have."""
    if not path.is_file():
        if part == "Train":
            source.fault(path, "is missing: it tells which images are of one patient")
        else:
            source.notes.append(f"{path.name} is not there: in {part} every image stands for a patient.")
        return {}
    try:
        rows = read_rows(path)
        return {int(row[NUMBER]): row[PATIENT] for row in rows}
    except DataError as error:
        source.fault(path, error.message)
    except (KeyError, ValueError):
        source.fault(path, f"has no columns {NUMBER!r} and {PATIENT!r} with a number in each row: restore it")
    return {}


AUTOORAL_SET = KnownSet(
    "autooral", "Autooral: 420 photographs of oral ulcers, ulcer",
    ("Train/data_train/0001.png   Train/mask_train/0001.png   (Val and Test likewise, if there)",
     "Training Set disease classification.xlsx"),
    "a patient, as its workbook tells", True,
    Terms(
        "academic use alone", "For academic research only, not for commercial purposes; not to be handed on.",
        False, "Jiang et al., Scientific Reports 14, s41598-024-69125-9, 2024",
        "https://github.com/wurenkai/HF-UNet-and-Autooral-dataset", "the README of the set's repository",
        "Non-commercial: keep what is trained on it (adapters, students, generators) in academic research; "
        "do not publish the weights and put them in no product. In a consortium that holds for the shared "
        "adapter and so for every site.",
    ),
    _find, (ClassConfig(name="ulcer", label=255, like="region"),),
)  # fmt: skip
