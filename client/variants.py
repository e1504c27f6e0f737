"""Every way in which a site trains a student, so that each ingredient can be credited on its own.

All variants take the same labelled batches for the same steps; `client.workshop` trains them.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.recipe import Start


@dataclass(frozen=True)
class Variant:
    """How one model of the benefit matrix is trained.

    Attributes:
        start: None: the student's own, as the recipe says (`client.starts`).
        teacher: whose outputs it learns from: "federated", "local" (this site's alone) or None.
        styles: whose appearance the synthetic images have: "all" sites, "own", or None for no such image.
    """

    start: Start | None = None
    teacher: str | None = None
    styles: str | None = None


VARIANTS: dict[str, Variant] = {
    "student": Variant(teacher="federated", styles="all"),
    "local_only": Variant(),
    "local_only_scratch": Variant(start=Start.random),
    "local_only_mae": Variant(start=Start.mae),
    "local_only_moco": Variant(start=Start.moco),
    "no_synthetic": Variant(teacher="federated"),
    "no_distillation": Variant(styles="all"),
    "no_federation": Variant(teacher="local", styles="own"),
}
