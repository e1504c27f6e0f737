"""What a site does between the last round and its students: the transfer set, the students, the note.

Files written here stay in the site's folder: ``student.safetensors``, ``personal.safetensors``,
``baselines/``, ``synthetic/``, ``quarantine/``, ``generator.safetensors``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from torch import Tensor

from client.curation import Curated, synthetic_part
from client.curation.quarantine import keep_quarantine, told_counts
from client.deadline import Deadline
from client.distillation import distil
from client.dp.bench import forget
from client.federated_student import NormKeeper, plan_at_home, shared_student
from client.measuring import model_path
from client.patients import Patient
from client.personal import PERSONAL_TEACHER
from client.prefix_cache import PrefixCache
from client.site import Site
from client.starts import Starts
from client.students import Student, load_student, save_student
from client.teachers import LOCAL_TEACHER, SiteTeachers
from client.transfer.gallery import GENERATOR_FILE, SYNTHETIC, save_synthetic
from client.transfer.kept import remove as remove_outputs
from client.transfer.making import TransferMaker
from client.transfer.painting import Painter
from client.variants import VARIANTS
from common.adapter import Adapter
from common.guard_api import StudentNote
from common.plan import RunPlan
from common.style import StyleSummary


@dataclass(frozen=True)
class Workshop:
    """Everything that one site does between the last adapter and its students.

    ``adapter`` is the federated teacher's; ``generator`` the federated generator's, if that scope ran;
    ``common`` the weights of the federated student, if its scope ran.
    """

    site: Site
    plan: RunPlan
    adapter: Adapter
    styles: Mapping[str, StyleSummary]
    generator: Adapter | None
    train: Sequence[Patient]
    deadline: Deadline
    common: Adapter | None = None

    def run(self) -> StudentNote:
        """Train the student and the recipe's baselines; the note says sizes and counts, no weights.

        Guarantee: no frozen prefix and no teacher's output is left in the site's folder afterwards, and no
        crop of a private round in memory, whatever happened.
        """
        try:
            return self._train_all()
        finally:
            forget(self.site.folder)
            PrefixCache(self.site.folder).forget()
            remove_outputs(self.site.folder)

    def _train_all(self) -> StudentNote:
        if self.teachers.personal is not None:
            self.teachers.personal.save(model_path(self.site, PERSONAL_TEACHER))
        names = ["student", *(name for name in self.plan.baselines if name in VARIANTS)]
        curated = self._transfer.curated(VARIANTS["student"])
        for name in names:
            self._train(name, curated)
        if LOCAL_TEACHER in self.plan.baselines:
            path = self.site.folder / "baselines" / f"{LOCAL_TEACHER}.safetensors"
            path.parent.mkdir(exist_ok=True)
            self.teachers.local.save(path)
        self._keep_images(curated)
        return self._note(curated)

    @property
    def _labelled(self) -> list[Patient]:
        return [patient for patient in self.train if patient.labelled]

    @cached_property
    def teachers(self) -> SiteTeachers:
        return SiteTeachers(self.site, self.plan, self.adapter, self._labelled, self.deadline)

    @cached_property
    def _painter(self) -> Painter:
        return Painter(self.site, self.plan, self.styles, self.generator, self._labelled, self.deadline)

    @cached_property
    def _transfer(self) -> TransferMaker:
        return TransferMaker(self.teachers, self._painter, self.train, self._starts)

    def _keep_images(self, curated: Curated | None) -> None:
        """The student's synthetic images, those that were taken out as copies, and who painted them."""
        screened = self._painter.images("all")
        if curated is None or screened is None:
            return
        keep_quarantine(screened, self.site.folder)
        if self._painter.trained is not None:
            self._painter.trained.save(self.site.folder / GENERATOR_FILE)
        if curated.generated:
            folder = self.site.folder / SYNTHETIC
            save_synthetic(synthetic_part(curated.transfer), folder, self.plan, self._painter.trained)

    @cached_property
    def _starts(self) -> Starts:
        return Starts(self.site, self.plan, self.train, self.deadline)

    def _train(self, name: str, curated: Curated | None) -> None:
        variant, starts = VARIANTS[name], self._starts
        # The same start, batches and order for every variant: a difference is the ingredient's.
        seed = self.site.draw_seed(self.plan, "student")
        shares = variant.shares_start and self.common is not None
        plan = plan_at_home(self.plan) if shares else self.plan
        student = self._together() if shares else starts.student(variant.start)
        if name != "student":
            curated = self._transfer.curated(variant)
        transfer = None if curated is None else curated.transfer
        if self._labelled:  # without: only a private run goes on, which tells nobody, and keeps the start
            distil(student, self._labelled, transfer, plan, seed, self.deadline)
        about = {"run_id": self.plan.run_id, "model": name, "start": starts.resolve(variant.start)}
        save_student(student, model_path(self.site, name), starts.kind, self.plan.data, about)

    def _together(self) -> Student:
        """The student as the rounds left it, with this site's own of what does not travel."""
        assert self.common is not None
        own = NormKeeper(self.site.folder, self.plan).before(self.plan.student.rounds)
        return shared_student(self.common, self.plan, own)

    def _note(self, curated: Curated | None) -> StudentNote:
        student = load_student(model_path(self.site, "student"))
        image = torch.zeros(1, 3, self.plan.data.image_size, self.plan.data.image_size)
        with self.teachers.visit(self.adapter) as network:
            teacher_ms = latency_ms(network, image)
        return StudentNote(
            site=self.site.name,
            name=student.card.name,
            params=student.card.params,
            sha256=student.card.sha256,
            latency_ms=latency_ms(student.module, image),
            teacher_latency_ms=teacher_ms,
            start=str(self._starts.resolve(VARIANTS["student"].start)),
            **asdict(told_counts(curated, self._painter.images("all"), self.plan, self.site.policy)),
        )


@torch.inference_mode()
def latency_ms(network: torch.nn.Module, image: Tensor, repeats: int = 7) -> float:
    """Median wall time of one image through ``network``, milliseconds; one warm-up call first."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        network(image)
        times.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(times[1:]), 3)
