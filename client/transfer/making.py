"""The transfer set of each variant: which images, labelled by which teacher, without those not worth it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from client.curation import Curated, drop_inconsistent
from client.generation import SyntheticSet
from client.patients import Patient
from client.teachers import SiteTeachers
from client.transfer.labelling import gather, label_with_ensemble, label_with_teacher
from client.transfer.painting import Painter
from client.transfer.sets import TransferSet, join, real_crops
from client.variants import Variant
from common.adapter import Adapter
from common.plan import RunPlan


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
        """The transfer set of ``variant``, labelled by its teacher, without inconsistent images."""
        synthetic = None if variant.styles is None else self.painter.images(variant.styles)
        teacher = variant.taught_by(self.plan.student.distillation)
        transfer = gather(None, synthetic) if teacher is None else self._labelled(teacher, synthetic)
        if transfer is None:
            return None
        if not variant.features:
            transfer = replace(transfer, tokens=None, features=None)
        return drop_inconsistent(transfer, self.plan.generator.keep_dice, self.plan.data.exclusive)

    def _labelled(self, teacher: str, synthetic: SyntheticSet | None) -> TransferSet | None:
        """Real crops and ``synthetic`` images with what ``teacher`` (see `Variant`) says of them."""
        everything, teachers = gather(self._real, synthetic), self.teachers
        if teacher == "local":
            return self._labelled_by(teachers.local, everything)
        if teacher == "untuned":
            known = self._labelled_by(teachers.untuned, everything)
            return None if known is None else replace(known, logits=None)
        if teacher == "ensemble":
            return self._labelled_by_all([teachers.federated, teachers.local], everything)
        if teachers.personal is None:
            return self._labelled_by(teachers.federated, everything)
        # The personal teacher knows this site's own look; the synthetic images have that of all sites.
        own = self._labelled_by(teachers.personal, gather(self._real, None))
        return join([own, self._labelled_by(teachers.federated, gather(None, synthetic))])

    def _labelled_by(self, adapter: Adapter, images: TransferSet | None) -> TransferSet | None:
        if images is None:
            return None
        with self.teachers.visit(adapter) as network:
            return label_with_teacher(network, images, self.plan.data.exclusive)

    def _labelled_by_all(self, adapters: Sequence[Adapter], images: TransferSet | None) -> TransferSet | None:
        if images is None:
            return None
        visits = [self.teachers.visit(adapter) for adapter in adapters]
        return label_with_ensemble(visits, images, self.plan.data.exclusive)

    @cached_property
    def _real(self) -> tuple[Tensor, Tensor] | None:
        if not self.train:
            return None
        return real_crops(self.train, self.plan, self.teachers.site.draw_seed(self.plan, "crops"))
