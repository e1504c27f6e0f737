"""Every way in which a site trains a student, so that each ingredient can be credited on its own.

All variants take the same labelled batches for the same steps; `client.workshop` trains them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Start(StrEnum):
    """The weights that a student starts from."""

    shipped = "shipped"  # pre-trained on procedural images
    random = "random"


@dataclass(frozen=True)
class Variant:
    """How one model of the benefit matrix is trained.

    Attributes:
        teacher: whose outputs it learns from: "federated", "local" (this site's alone) or None.
        shares_start: where the student's weights are trained in rounds first, it starts from those, and takes
            the steps that are left.
        styles: whose appearance the synthetic images have: "all" sites, "own", or None for no such image.
    """

    start: Start = Start.shipped
    teacher: str | None = None
    styles: str | None = None
    shares_start: bool = False


VARIANTS: dict[str, Variant] = {
    "student": Variant(teacher="federated", styles="all", shares_start=True),
    "local_only": Variant(),
    "local_only_scratch": Variant(start=Start.random),
    "no_synthetic": Variant(teacher="federated", shares_start=True),
    "no_distillation": Variant(styles="all", shares_start=True),
    "no_federation": Variant(teacher="local", styles="own"),
}
