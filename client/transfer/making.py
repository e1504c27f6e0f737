"""The transfer set of each variant: which images, labelled by which teacher, without those not worth it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from client.curation import Curated, drop_inconsistent
from client.curation.learnability import keep_learnable
from client.painters import SyntheticSet
from client.patients import Patient
from client.students import Student, build_student
from client.teachers import SiteTeachers
from client.transfer.labelling import assemble_transfer_set
from client.transfer.painting import Painter
from client.transfer.sets import TransferSet, join, real_crops
from client.variants import Variant
from common.adapter import Adapter
from common.plan import RunPlan

_Labelling = tuple[Adapter, tuple[Tensor, Tensor] | None, SyntheticSet | None]


@dataclass(frozen=True)
class TransferMaker:
    """Makes transfer sets of the site's own crops and of what ``painter`` has."""

    teachers: SiteTeachers
    painter: Painter
    train: Sequence[Patient]

    @property
    def plan(self) -> RunPlan:
        return self.teachers.plan

    def curated(self, variant: Variant) -> Curated | None:
        """The transfer set of ``variant``, labelled by its teacher, without those that are not worth it."""
        painted = None if variant.styles is None else self.painter.images(variant.styles, variant.painter)
        synthetic = None if painted is None else painted.kept
        if variant.teacher is None:
            transfer = assemble_transfer_set(None, synthetic, None, self.plan.data.exclusive)
        else:
            parts = self._labelling(variant.teacher, synthetic)
            transfer = join([self._labelled_by(*part) for part in parts])
        if transfer is None:
            return None
        settings, exclusive = self.plan.generator, self.plan.data.exclusive
        # A person drew the masks of the site's own crops; and how many are kept is told elsewhere.
        judged = synthetic is not None and not synthetic.own_pixels
        curated = drop_inconsistent(transfer, settings.keep_dice if judged else 0.0, exclusive)
        if settings.keep_learnable == 1 or not judged:
            return curated
        return keep_learnable(curated, self._beginner, settings.keep_learnable, exclusive)

    @cached_property
    def _beginner(self) -> Student:
        """The student before it has learned anything at this site."""
        kind, seed = self.teachers.site.student or self.plan.student.name, self.teachers.site.draw_seed
        return build_student(kind, self.plan.data, True, seed(self.plan, "student"))

    def _labelling(self, teacher: str, synthetic: SyntheticSet | None) -> list[_Labelling]:
        """Whose adapter labels which images."""
        if teacher == "local":
            return [(self.teachers.local, self._real, synthetic)]
        if self.teachers.personal is None:
            return [(self.teachers.federated, self._real, synthetic)]
        # The personal teacher knows this site's own look; the synthetic images have that of all sites.
        return [(self.teachers.personal, self._real, None), (self.teachers.federated, None, synthetic)]

    def _labelled_by(
        self, adapter: Adapter, real: tuple[Tensor, Tensor] | None, synthetic: SyntheticSet | None
    ) -> TransferSet | None:
        with self.teachers.visit(adapter) as network:
            return assemble_transfer_set(real, synthetic, network, self.plan.data.exclusive)

    @cached_property
    def _real(self) -> tuple[Tensor, Tensor] | None:
        if not self.train:
            return None
        return real_crops(self.train, self.plan, self.teachers.site.draw_seed(self.plan, "crops"))
