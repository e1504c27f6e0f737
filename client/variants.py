"""Every way in which a site trains a student, so that each ingredient can be credited on its own.

All variants take the same labelled batches for the same steps; `client.workshop` trains them.
"""

from __future__ import annotations

from dataclasses import dataclass

from client.painters import PAINTERS
from common.recipe import Distillation, Start


@dataclass(frozen=True)
class Variant:
    """How one model of the benefit matrix is trained.

    Attributes:
        start: None: the student's own, as the recipe says (`client.starts`).
        teacher: whom it learns from: "federated" (or whom ``student.distillation`` puts in its place),
            "local" (this site's alone), "untuned" (as it ships, by its features alone), "ensemble" (the
            federated and this site's, by their mean output alone), or None.
        styles: whose appearance the synthetic images have: "all" sites, "own", or None for no such image.
        painter: of `client.painters.PAINTERS`, who makes them; None: whoever the plan's scope names.
        features: whether it learns the teacher's features beside its outputs.
        shares_start: where the student's weights are trained in rounds first, it starts from those, and takes
            the steps that are left.
    """

    start: Start | None = None
    teacher: str | None = None
    styles: str | None = None
    painter: str | None = None
    features: bool = True
    shares_start: bool = False

    def taught_by(self, asked: Distillation) -> str | None:
        """The teacher of this variant in a recipe that asks for ``asked``."""
        return _INSTEAD[asked] if self.teacher == "federated" else self.teacher


_INSTEAD = {
    Distillation.task: "federated",
    Distillation.agnostic: "untuned",
    Distillation.ensemble: "ensemble",
    Distillation.none: None,
}


def painted_by(painter: str) -> Variant:
    """The student of the same run, whose images another painter made: as many, for as many steps."""
    return Variant(teacher="federated", styles="all", painter=painter, shares_start=True)


VARIANTS: dict[str, Variant] = {
    "student": Variant(teacher="federated", styles="all", shares_start=True),
    "local_only": Variant(),
    "local_only_scratch": Variant(start=Start.random),
    "local_only_mae": Variant(start=Start.mae),
    "local_only_moco": Variant(start=Start.moco),
    "no_synthetic": Variant(teacher="federated", shares_start=True),
    "no_distillation": Variant(styles="all", shares_start=True),
    "no_federation": Variant(teacher="local", styles="own"),
    "no_features": Variant(teacher="federated", styles="all", features=False, shares_start=True),
    "task_agnostic": Variant(teacher="untuned", styles="all", shares_start=True),
    **{painter: painted_by(painter) for painter in PAINTERS},
}
