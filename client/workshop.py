"""What the guard does with opened data: the site's own training, its students, its evaluation.

Files written here stay in the site's folder: ``student.safetensors``, ``personal.safetensors``,
``baselines/``, ``synthetic/``.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from client.account import Reservation
from client.adaptation import Adaptation, Visit, adapt
from client.curation import Curated, drop_inconsistent, synthetic_part
from client.deadline import Deadline
from client.distillation import VARIANTS, TransferSet, assemble_transfer_set, distil, join, real_crops
from client.dp.bench import forget
from client.evaluation import THRESHOLD, evaluate_patients, release_metrics
from client.generation import SyntheticSet, fine_tune, synthesise
from client.patients import Patient
from client.personal import PERSONAL_FILE, PERSONAL_TEACHER, personalises, train_personal
from client.prediction import label_image
from client.prefix_cache import PrefixCache
from client.private_adaptation import PrivateStep, private_step
from client.site import Site
from client.students import build_student, load_student, save_student
from client.style import summarise_style
from common.adapter import Adapter
from common.generator import initial_adapter as initial_generator_adapter
from common.generator import resident_generator
from common.guard_api import Metric, StudentNote
from common.plan import Round, RunPlan, Stage
from common.recipe import GeneratorScope
from common.style import StyleSummary
from common.teacher import ResidentTeacher, Teacher, initial_adapter, resident_teacher, teacher_for
from common.tuning.halves import trained_halves
from common.tuning.presets import GENERATOR

LOCAL_TEACHER = "local_teacher"  # the baseline that is a teacher: this site's alone, same steps
Forward = Callable[[Tensor], Tensor]
_Labelling = tuple[Adapter, tuple[Tensor, Tensor] | None, SyntheticSet | None]


def adapt_teacher(
    site: Site, plan: RunPlan, adapter: Adapter, train: Sequence[Patient], order: Round
) -> Adaptation:
    teacher = resident_teacher(site.teacher(plan), plan.data)
    visit = round_visit(site, plan, Stage.adapt, order.index)
    return adapt(teacher, adapter, train, plan, visit, Deadline(order.deadline_s))


def private_teacher_step(
    site: Site, plan: RunPlan, adapter: Adapter, train: Sequence[Patient], order: Round, paid: Reservation
) -> PrivateStep:
    """The noised step of a private round, in place of `adapt_teacher`."""
    teacher = resident_teacher(site.teacher(plan), plan.data)
    return private_step(teacher, adapter, train, plan, (order.index, paid, site.folder))


def adapt_generator(
    site: Site, plan: RunPlan, adapter: Adapter, train: Sequence[Patient], order: Round
) -> Adaptation:
    generator = resident_generator(plan.generator.name, plan.generator.rank)
    visit = round_visit(site, plan, Stage.generator, order.index)
    return fine_tune(generator, adapter, train, plan, visit, Deadline(order.deadline_s))


def round_visit(site: Site, plan: RunPlan, stage: Stage, index: int) -> Visit:
    """One round of ``stage`` at ``site``: its own seed, and the factors whose turn it is."""
    preset = site.teacher(plan).adapter if stage is Stage.adapt else GENERATOR
    halves = trained_halves(preset, plan.aggregation.rule, index)
    return Visit(index, site.draw_seed(plan, str(stage), index), site.folder, halves)


@dataclass(frozen=True)
class Workshop:
    """Everything that one site does between the last adapter and its students.

    ``adapter`` is the federated teacher's; ``generator`` the federated generator's, if that scope ran.
    """

    site: Site
    plan: RunPlan
    adapter: Adapter
    styles: Mapping[str, StyleSummary]
    generator: Adapter | None
    train: Sequence[Patient]
    deadline: Deadline

    def run(self) -> StudentNote:
        """Train the student and the recipe's baselines; the note says sizes and counts, no weights.

        Guarantee: no frozen prefix is left in the site's folder afterwards, and no crop of a private round
        in memory, whatever happened.
        """
        try:
            return self._train_all()
        finally:
            forget(self.site.folder)
            PrefixCache(self.site.folder).forget()

    def _train_all(self) -> StudentNote:
        if self.personal_adapter is not None:
            self.personal_adapter.save(model_path(self.site, PERSONAL_TEACHER))
        names = ["student", *(name for name in self.plan.baselines if name in VARIANTS)]
        curated = self._curated("federated", "all")
        for name in names:
            self._train(name, curated)
        if LOCAL_TEACHER in self.plan.baselines:
            path = self.site.folder / "baselines" / f"{LOCAL_TEACHER}.safetensors"
            path.parent.mkdir(exist_ok=True)
            self.local_adapter.save(path)
        if curated is not None and curated.generated:
            save_synthetic(synthetic_part(curated.transfer), self.site.folder / "synthetic", self.plan)
        return self._note(curated)

    @property
    def _teacher(self) -> ResidentTeacher:
        return resident_teacher(self.site.teacher(self.plan), self.plan.data)

    def _train(self, name: str, curated: Curated | None) -> None:
        variant, kind = VARIANTS[name], self.site.student or self.plan.student.name
        # The same start, batches and order for every variant: a difference is the ingredient's.
        seed = self.site.draw_seed(self.plan, "student")
        student = build_student(kind, self.plan.data, variant.pretrained, seed)
        if name != "student":
            curated = self._curated(variant.teacher, variant.styles)
        transfer = None if curated is None else curated.transfer
        distil(student, self._labelled, transfer, self.plan, seed, self.deadline)
        about = {"run_id": self.plan.run_id, "model": name}
        save_student(student, model_path(self.site, name), kind, self.plan.data, about)

    @property
    def _labelled(self) -> list[Patient]:
        return [patient for patient in self.train if patient.labelled]

    def _curated(self, teacher: str | None, styles: str | None) -> Curated | None:
        """The transfer set of one variant, labelled by its teacher, without inconsistent images."""
        synthetic = None if styles is None else self._synthetic(styles)
        if teacher is None:
            transfer = assemble_transfer_set(None, synthetic, None, self.plan.data.exclusive)
        else:
            transfer = join([self._labelled_by(*part) for part in self._labelling(teacher, synthetic)])
        return (
            None
            if transfer is None
            else drop_inconsistent(transfer, self.plan.generator.keep_dice, self.plan.data.exclusive)
        )

    def _labelling(self, teacher: str, synthetic: SyntheticSet | None) -> list[_Labelling]:
        """Whose adapter labels which images."""
        if teacher == "local":
            return [(self.local_adapter, self._real, synthetic)]
        if self.personal_adapter is None:
            return [(self.adapter, self._real, synthetic)]
        # The personal teacher knows this site's own look; the synthetic images have that of all sites.
        return [(self.personal_adapter, self._real, None), (self.adapter, None, synthetic)]

    def _labelled_by(
        self, adapter: Adapter, real: tuple[Tensor, Tensor] | None, synthetic: SyntheticSet | None
    ) -> TransferSet | None:
        with self._teacher.visit(adapter) as network:
            return assemble_transfer_set(real, synthetic, network, self.plan.data.exclusive)

    @cached_property
    def _real(self) -> tuple[Tensor, Tensor]:
        return real_crops(self.train, self.plan, self.site.draw_seed(self.plan, "crops"))

    def _synthetic(self, styles: str) -> SyntheticSet | None:
        """Images in "all" sites' styles or in this site's "own"; None where the scope has none."""
        scope = self.plan.generator.scope
        if scope == GeneratorScope.none:
            return None
        return self._own_images if styles == "own" or scope == GeneratorScope.local else self._all_images

    @cached_property
    def _all_images(self) -> SyntheticSet:
        return self._paint([self.styles[name] for name in sorted(self.styles)])

    @cached_property
    def _own_images(self) -> SyntheticSet:
        return self._paint([self._own_style])

    def _paint(self, styles: Sequence[StyleSummary]) -> SyntheticSet:
        self.deadline.check("sampling synthetic images")
        generator = resident_generator(self.plan.generator.name, self.plan.generator.rank)
        seed = self.site.draw_seed(self.plan, "synthetic")
        return synthesise(generator, self._generator_adapter(), styles, self.plan, seed)

    @cached_property
    def _own_style(self) -> StyleSummary:
        """Made afresh, for this one stays here: groups may be as small as they are."""
        seed = self.site.draw_seed(self.plan, "style")
        settings = self.plan.generator
        return summarise_style(self._labelled, self.plan.data.image_size, settings.style_groups, 1, seed)

    def _generator_adapter(self) -> Adapter:
        start = initial_generator_adapter(self.plan.generator, self.plan.seed)
        if self.plan.generator.scope != GeneratorScope.local:
            return self.generator or start
        generator = resident_generator(self.plan.generator.name, self.plan.generator.rank)
        seed = self.site.draw_seed(self.plan, "generator", 0)
        return fine_tune(generator, start, self._labelled, self.plan, (0, seed), self.deadline).adapter

    @cached_property
    def personal_adapter(self) -> Adapter | None:
        """The site's own, on top of the shared one; None where the rule has none."""
        if not personalises(self.plan):
            return None
        return train_personal(self.site, self.plan, self.adapter, self._labelled, self.deadline)

    @cached_property
    def local_adapter(self) -> Adapter:
        """A teacher of this site alone: the same start, steps and batches as in the federation."""
        adapter = initial_adapter(self.site.teacher(self.plan), self.plan.data, self.plan.seed)
        for index in range(self.plan.rounds):
            visit = round_visit(self.site, self.plan, Stage.adapt, index)
            adapter = adapt(self._teacher, adapter, self._labelled, self.plan, visit, self.deadline).adapter
        return adapter

    def _note(self, curated: Curated | None) -> StudentNote:
        student = load_student(model_path(self.site, "student"))
        image = torch.zeros(1, 3, self.plan.data.image_size, self.plan.data.image_size)
        with self._teacher.visit(self.adapter) as network:
            teacher_ms = latency_ms(network, image)
        return StudentNote(
            site=self.site.name,
            name=student.card.name,
            params=student.card.params,
            sha256=student.card.sha256,
            latency_ms=latency_ms(student.module, image),
            teacher_latency_ms=teacher_ms,
            generated=0 if curated is None else curated.generated,
            kept=0 if curated is None else curated.kept,
            dropped_inconsistent=0 if curated is None else curated.dropped_inconsistent,
        )


def model_path(site: Site, name: str) -> Path:
    """Where a site keeps the model ``name``."""
    at_top = {"student": "student.safetensors", PERSONAL_TEACHER: PERSONAL_FILE}
    return site.folder / at_top.get(name, f"baselines/{name}.safetensors")


@torch.inference_mode()
def latency_ms(network: torch.nn.Module, image: Tensor, repeats: int = 7) -> float:
    """Median wall time of one image through ``network``, milliseconds; one warm-up call first."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        network(image)
        times.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(times[1:]), 3)


def save_synthetic(images: TransferSet, folder: Path, plan: RunPlan) -> None:
    """The kept synthetic images and masks as PNG, with their provenance; the folder never leaves the site."""
    folder.mkdir(exist_ok=True)
    for index, (image, mask) in enumerate(zip(images.images, images.masks, strict=True)):
        pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:04d}.png")
        values = label_image(mask, plan.data, THRESHOLD)
        Image.fromarray(values).save(folder / f"{index:04d}_mask.png")
    provenance = {
        "images": len(images),
        "plan_sha256": plan.digest,
        "generator_sha256": plan.models[plan.generator.name],
        "scope": str(plan.generator.scope),
        "masks": "procedural shape prior (client.shapes); no patient's mask",
    }
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")


@contextmanager
def opened_models(site: Site, plan: RunPlan, adapter: Adapter) -> Iterator[dict[str, Callable[[], Forward]]]:
    """Name -> a function that makes the model ready: teachers may share one network, so use one at a time.

    Raises ``ArtefactError``, when the model is made ready, for an adapter that is none of the plan's.
    """

    def with_adapter(teacher: ResidentTeacher, given: Adapter) -> Forward:
        teacher.slots.write(given)
        network: Teacher = teacher.network
        return lambda image: network(image).logits

    own = resident_teacher(site.teacher(plan), plan.data)
    ready: dict[str, Callable[[], Forward]] = {
        "teacher": lambda: with_adapter(teacher_for(adapter, plan), adapter)
    }
    personal = [PERSONAL_TEACHER] if personalises(plan) else []
    for name in (*personal, "student", *plan.baselines):
        path = model_path(site, name)
        if not path.exists():
            continue
        if name in (LOCAL_TEACHER, PERSONAL_TEACHER):
            ready[name] = lambda path=path: with_adapter(own, Adapter.load(path))
        else:
            ready[name] = lambda path=path: load_student(path).module
    yield ready


def evaluate_models(
    site: Site, plan: RunPlan, adapter: Adapter, test: Sequence[Patient], deadline: Deadline
) -> list[Metric]:
    """Each model on this site's own test patients; the policy's smallest cell decides what is released."""
    seed = site.draw_seed(plan, "bootstrap")
    released: list[Metric] = []
    with opened_models(site, plan, adapter) as models:
        for name, make_ready in models.items():
            deadline.check("evaluating")
            values = evaluate_patients(make_ready(), test, plan.data, plan.evaluation)
            released += release_metrics(name, values, plan.evaluation, site.policy, seed)
    return released
