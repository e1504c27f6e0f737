"""PH2: dermoscopic photographs of melanocytic lesions, each with the lesion's mask.

Layout as in the archive of the University of Porto (``PH2Dataset``), known from its description in
several public loaders: a folder a lesion, ``IMD002``, with ``IMD002_Dermoscopic_Image/IMD002.bmp`` and
``IMD002_lesion/IMD002_lesion.bmp``, a black-and-white picture; some also have masks of single colours
(``IMD002_roi``), which are not read. The folder of folders is called ``PH2 Dataset images``.
"""

from __future__ import annotations

import re
from pathlib import Path

from client.preparation.known_set import Item, KnownSet, Terms
from client.preparation.pictures import read_binary, read_picture
from client.preparation.source import Source
from common.recipe import ClassConfig

IMAGES = ("PH2 Dataset images", "PH2_Dataset_images")  # unpackers replace the blanks


def _find(source: Source) -> list[Item]:
    source.step_into("PH2Dataset")
    items = []
    for case in source.subfolders(source.folder(*IMAGES)):
        if not re.fullmatch(r"IMD\d+", case.name):
            source.fault(case, "is not named as the set names its lesions (like IMD002): restore its name")
            continue
        image = _file(source, case / f"{case.name}_Dermoscopic_Image" / f"{case.name}.bmp")
        mask = _file(source, case / f"{case.name}_lesion" / f"{case.name}_lesion.bmp")
        read = [source.pixels(image, read_picture)] if image else []
        read += [source.pixels(mask, read_binary)] if mask else []
        if len(read) == 2:
            items.append(Item(case.name, case.name, *read))
        else:
            source.also_read += read
    return items


def _file(source: Source, path: Path) -> Path | None:
    """``path`` if it is there; else None and a fault."""
    if path.is_file():
        return path
    if path.parent.is_dir():
        source.missing_file(path)
    else:
        source.fault(path.parent, "is missing: unpack the whole set again")
    return None


PH2_SET = KnownSet(
    "ph2", "PH2: 200 dermoscopic photographs of melanocytic lesions, lesion",
    ("PH2 Dataset images/IMD002/IMD002_Dermoscopic_Image/IMD002.bmp",
     "PH2 Dataset images/IMD002/IMD002_lesion/IMD002_lesion.bmp"),
    "an image (the set does not tell whether two lesions are of one person)", False,
    Terms(
        "research", "Handed out for research and benchmarking: read its page before any other use.", False,
        "Mendonça et al., IEEE EMBC 2013, 5437-5440",
        "https://www.fc.up.pt/addi/ph2%20database.html", "the abstract of its paper",
    ),
    _find, (ClassConfig(name="lesion", label=255, like="region"),), 200,
)  # fmt: skip
