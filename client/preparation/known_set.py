"""What a set is, and what one of its images becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from client.patients import Split
from client.preparation.source import Pixels, Source
from common.recipe import ClassConfig

Labels = NDArray[np.uint8]


@dataclass(frozen=True)
class Terms:
    """The conditions of a set, in our words: they point at the licence and do not replace it.

    Attributes:
        commercial: whether commercial use is allowed; None where nothing clear was found.
        known_from: where we read them, so that a reader can judge how much that is worth.
        weights: what they mean for models trained on the set, where that is more than a citation.
    """

    licence: str
    conditions: str
    commercial: bool | None
    citation: str
    url: str
    known_from: str
    weights: str = ""


@dataclass(frozen=True)
class Item:
    """One image of a set.

    Attributes:
        name: unique in the set; the stem of the PNG files.
        image: (H, W) or (H, W, 3), uint8 or uint16.
        mask: (H, W) uint8, label values as in the set's `KnownSet.classes`; None for an unlabelled image.
        split: the set's own, in every item or in none.
        spacing_mm: (row, column) of a pixel.
    """

    name: str
    patient: str
    image: Pixels
    mask: Pixels | None
    split: Split | None = None
    spacing_mm: tuple[float, float] | None = None
    group: str = ""


@dataclass(frozen=True)
class KnownSet:
    """A public set.

    Attributes:
        layout: the folders as they are handed out, a line each.
        unit: what ``patient`` in its manifest stands for.
        patients_known: False where the set does not tell its patients apart, so that an image stands for one.
        find: every `Item`, in an order that does not depend on the file system; what is wrong with the
            folders goes to the source's ``faults``.
        whole: how many images it has, where that is known; fewer are prepared with a note.
    """

    name: str
    title: str
    layout: tuple[str, ...]
    unit: str
    patients_known: bool
    terms: Terms
    find: Callable[[Source], list[Item]]
    classes: tuple[ClassConfig, ...]
    whole: int | None = None
