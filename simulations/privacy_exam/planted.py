"""Made-up patients whom a model can only know by heart, and adapters that do, or that must not.

Their outlines can hardly be seen, so a segmentation that is right was remembered.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from client.data import load_patients
from client.deadline import Deadline
from client.dp.mechanism import PrivateGradient
from client.dp.randomness import SystemRandomness
from client.dp.tasks import SegmentationTask, segmentation_task
from client.fitting import Schedule, fit
from client.membership import Subjects, audit_adapter
from client.patients import Patient
from common.adapter import Adapter
from common.config import load_recipe
from common.plan import RunPlan
from common.privacy.events import Event
from common.privacy.membership import Assignment, Claim, Membership
from common.privacy.plan import PlanSettings, PrivacyPlan
from common.seeding import derive_rng
from common.teacher import ResidentTeacher, initial_adapter, resident_teacher
from server.planning import build_plan
from simulations.phantoms import write_site

SIDE = 32  # pixels: the smallest that the teacher takes
SETTINGS = (
    f"data.image_size={SIDE}", "teacher.adapter=decoder", "privacy.noise_multiplier=1.5",
    "privacy.release_metrics=false", "generator.scope=none",
)  # fmt: skip
STEPS, BATCH, RATE = 100, 16, 4e-3  # of the training without noise: far too many
NOISED_STEPS, NOISED_RATE, SPREAD = 20, 0.7, 1.5


@dataclass(frozen=True)
class Cohort:
    """Patients of one made-up site, and whom a coin put into training."""

    folder: Path
    plan: RunPlan
    subjects: Subjects

    @classmethod
    def draw(cls, folder: Path, patients: int, seed: int) -> Cohort:
        """``patients`` with one image each, below ``folder``."""
        recipe = load_recipe("smoke", SETTINGS)
        base = recipe.sites[0].phantom
        assert base is not None
        scanner = replace(base.scanner, contrast=0.02, noise=0.2, speckle=0.5)
        phantom = replace(
            base, train_patients=patients, val_patients=0, test_patients=0, images_per_patient=1,
            image_size=SIDE, object_size=[0.1, 0.3], scanner=scanner,
        )  # fmt: skip
        plan = build_plan(recipe, f"exam-{seed}")
        everyone = load_patients(write_site(phantom, folder, seed, "exam"), plan.data, seed)
        coins = (derive_rng(seed, "coins").random(patients) < 0.5).tolist()
        return cls(folder, plan, Subjects(everyone, coins, Assignment.by_coin))

    @property
    def members(self) -> list[Patient]:
        pairs = zip(self.subjects.patients, self.subjects.inside, strict=True)
        return [patient for patient, coin in pairs if coin]

    @property
    def teacher(self) -> ResidentTeacher:
        return resident_teacher(self.plan.teacher, self.plan.data)

    @property
    def first(self) -> Adapter:
        return initial_adapter(self.plan.teacher, self.plan.data, self.plan.seed)

    def audited(self, adapter: Adapter, claim: Claim) -> Membership:
        """As a site audits the teacher of a run."""
        path = self.folder / "adapter.safetensors"
        adapter.save(path)
        return audit_adapter(path, self.plan, self.subjects, claim)


def remembering_adapter(cohort: Cohort) -> Adapter:
    """Trained without noise until it knows the members' masks by heart."""
    draw = torch.Generator().manual_seed(cohort.plan.seed)
    with cohort.teacher.visit(cohort.first, train=True) as network:
        task = segmentation_task(network, cohort.first, cohort.members, cohort.plan, None)

        def loss() -> torch.Tensor:
            rows = torch.randint(len(cohort.members), (BATCH,), generator=draw)
            return _loss(task, rows)

        trained = list(cohort.teacher.slots.trainable().values())
        fit(trained, Schedule(RATE, STEPS), loss, Deadline(1e9), "learning by heart")
        return cohort.teacher.slots.read()


def _loss(task: SegmentationTask, rows: torch.Tensor) -> torch.Tensor:
    losses: torch.Tensor = task(*task.inputs(rows))
    return losses.mean()


def private_adapter(cohort: Cohort) -> tuple[Adapter, list[Event]]:
    """Trained by the real mechanism on the same members; and what that costs them."""
    terms = PrivacyPlan.make(PlanSettings(len(cohort.members), 0.5, NOISED_STEPS), SPREAD)
    adapter = cohort.first
    with cohort.teacher.visit(adapter, train=True) as network:
        task = segmentation_task(network, adapter, cohort.members, cohort.plan, None)
        trained = cohort.teacher.slots.trainable()
        mechanism = PrivateGradient(task, trained, terms, SystemRandomness())
        for index in range(terms.steps):
            noised = mechanism.step(index)
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter -= NOISED_RATE * noised[name]
        return cohort.teacher.slots.read(), [terms.event()]
