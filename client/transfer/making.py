"""The transfer set of each variant: which images, labelled by which teacher, without those not worth it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from client.curation import Curated, drop_inconsistent
from client.curation.learnability import keep_learnable
from client.painters import SyntheticSet
from client.patients import Patient
from client.starts import Starts
from client.students import Student
from client.teachers import SiteTeachers
from client.transfer.kept import OutputCache, row_keys
from client.transfer.labelling import Outputs, gather, mean_logits, teacher_outputs
from client.transfer.painting import Painter
from client.transfer.sets import TransferSet, join, real_crops
from client.transfer.views import with_views
from client.variants import Variant
from common.adapter import Adapter
from common.plan import RunPlan


@dataclass(frozen=True)
class TransferMaker:
    """Makes transfer sets of the site's own crops and of what ``painter`` has."""

    teachers: SiteTeachers
    painter: Painter
    train: Sequence[Patient]
    starts: Starts | None = None  # of the site's students, where they are made already

    @property
    def plan(self) -> RunPlan:
        return self.teachers.plan

    def curated(self, variant: Variant) -> Curated | None:
        """The transfer set of ``variant``, labelled by its teacher, without those that are not worth it."""
        painted = None if variant.styles is None else self.painter.images(variant.styles, variant.painter)
        synthetic = None if painted is None else painted.kept
        teacher = variant.taught_by(self.plan.student.distillation)
        transfer = gather(None, synthetic) if teacher is None else self._labelled(teacher, synthetic)
        if transfer is None:
            return None
        if not variant.features:
            transfer = replace(transfer, tokens=None, features=None)
        settings, exclusive = self.plan.generator, self.plan.data.exclusive
        # A person drew the masks of the site's own crops; and how many are kept is told elsewhere.
        judged = synthetic is not None and not synthetic.own_pixels
        curated = drop_inconsistent(transfer, settings.keep_dice if judged else 0.0, exclusive)
        if settings.keep_learnable == 1 or not judged:
            return curated
        return keep_learnable(curated, self._beginner, settings.keep_learnable, exclusive)

    @cached_property
    def _beginner(self) -> Student:
        """The student before it has learned anything from labels."""
        starts = self.starts or Starts(self.teachers.site, self.plan, self.train, self.teachers.deadline)
        return starts.student(None)

    def _labelled(self, teacher: str, synthetic: SyntheticSet | None) -> TransferSet | None:
        """Real crops and ``synthetic`` images with what ``teacher`` (see `Variant`) says of them."""
        teachers = self.teachers
        everything = self._viewed(self._real, synthetic)
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
        own = self._labelled_by(teachers.personal, self._viewed(self._real, None))
        return join([own, self._labelled_by(teachers.federated, self._viewed(None, synthetic))])

    def _viewed(
        self, real: tuple[Tensor, Tensor] | None, synthetic: SyntheticSet | None
    ) -> TransferSet | None:
        """Real crops and ``synthetic`` images in as many views as the recipe wants."""
        images, views = gather(real, synthetic), self.plan.student.transfer_views
        if images is None or views == 1:
            return images
        return with_views(images, views, self.teachers.site.draw_seed(self.plan, "views"))

    def _said(self, adapter: Adapter, images: TransferSet) -> Outputs:
        """What the teacher with ``adapter`` says of ``images``: asked once, then read."""

        def ask(missing: Tensor) -> Outputs:
            with self.teachers.visit(adapter) as network:
                return teacher_outputs(network, images.images[missing], self.plan.data.exclusive)

        return self._kept.fetch(row_keys(images, adapter, self.plan), ask)

    def _labelled_by(self, adapter: Adapter, images: TransferSet | None) -> TransferSet | None:
        return None if images is None else replace(images, **vars(self._said(adapter, images)))

    def _labelled_by_all(self, adapters: Sequence[Adapter], images: TransferSet | None) -> TransferSet | None:
        if images is None:
            return None
        said = [self._said(adapter, images).logits for adapter in adapters]
        return replace(images, logits=mean_logits(said, self.plan.data.exclusive))

    @cached_property
    def _kept(self) -> OutputCache:
        form = self.plan.student.teacher_cache
        return OutputCache(self.teachers.site.folder, form, self.plan.data.exclusive)

    @cached_property
    def _real(self) -> tuple[Tensor, Tensor] | None:
        if not self.train:
            return None
        return real_crops(self.train, self.plan, self.teachers.site.draw_seed(self.plan, "crops"))
