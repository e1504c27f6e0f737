"""Can a model be used to tell whom it was trained on? The site's own attack, on its own patients.

The calibrated loss of Watson et al. 2022 (arXiv 2111.08440): how much better a model fits a patient than the
same model did before the run. It sees patients' images, so it runs at the site, and its scores stay there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from client.dp.tasks import draw_crops
from client.holdout import read_coins
from client.losses import image_losses
from client.patients import Patient, Split
from client.site import Site
from client.students import build_student, load_student
from common.adapter import Adapter
from common.errors import ArtefactError, DataError
from common.plan import RunPlan
from common.privacy.auditing import ALPHA
from common.privacy.membership import Assignment, Claim, Membership, judged
from common.recipe import Holdout, Start
from common.seeding import derive_seed
from common.teacher import initial_adapter, teacher_for

ADAPTER, STUDENT = "adapter", "student"
STUDENT_FILE = "student.safetensors"
IMAGES_AT_ONCE = 16
VIEWS = 4  # crops of an image, where no single view was trained on

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Subjects:
    """The patients whose membership is guessed; ``inside``: whether each was trained on."""

    patients: list[Patient]
    inside: list[bool]
    assignment: Assignment


def subjects_of(site: Site, plan: RunPlan) -> Subjects:
    """Those of the coins that were thrown; without ``holdout: coin`` all labelled patients, by their split.

    Raises:
        DataError: nobody was left out, or nobody was trained on, or no coin was thrown before this.
    """
    coins = read_coins(site.folder)  # before the patients are read, which throws those that are missing
    labelled = [patient for patient in site.patients(plan.data, plan.seed) if patient.labelled]
    if site.holdout is Holdout.coin:
        asked = [patient for patient in labelled if patient.id in coins]
        found = Subjects(asked, [coins[patient.id] for patient in asked], Assignment.by_coin)
    else:
        found = Subjects(labelled, [p.split is Split.train for p in labelled], Assignment.by_split)
    if len(set(found.inside)) < 2:
        raise DataError(
            "an audit wants patients that were trained on and others: label more, or run anew with "
            "holdout: coin in site.yaml"
        )
    return found


@dataclass(frozen=True)
class Views:
    """Crops of the subjects' images, the same for every model: as a private run trains on, or several."""

    images: Tensor
    masks: Tensor
    rows: list[list[int]]
    exclusive: bool

    @classmethod
    def of(cls, patients: Sequence[Patient], plan: RunPlan) -> Views:
        count = 1 if plan.privacy.asked else VIEWS
        crops = draw_crops(patients, plan.data.image_size, count, derive_seed(plan.seed, "views"))
        return cls(crops.images, crops.masks, crops.patients, plan.data.exclusive)

    @torch.inference_mode()
    def losses(self, forward: Forward) -> list[float]:
        """The mean loss of each patient's crops."""
        parts = zip(self.images.split(IMAGES_AT_ONCE), self.masks.split(IMAGES_AT_ONCE), strict=True)
        found = torch.cat([image_losses(forward(images), masks, self.exclusive) for images, masks in parts])
        return [float(found[rows].mean()) for rows in self.rows]


def scores_of(before: Sequence[float], after: Sequence[float]) -> list[tuple[float, float]]:
    """For each patient the calibrated score and the plain one: the larger, the likelier trained on."""
    return [(old - new, -new) for old, new in zip(before, after, strict=True)]


def audit_adapter(
    path: Path, plan: RunPlan, subjects: Subjects, claim: Claim, alpha: float = ALPHA
) -> Membership:
    """The teacher's adapter in ``path``, against the teacher before the run.

    Raises:
        ArtefactError: it is no adapter, or none of the plan's.
    """
    adapter = Adapter.load(path)
    teacher = teacher_for(adapter, plan)
    settings = replace(plan.teacher, adapter=adapter.preset, rank=adapter.rank or None)
    first = initial_adapter(settings, plan.data, plan.seed)

    def losses(given: Adapter) -> list[float]:
        with teacher.visit(given) as network:
            return views.losses(lambda images: network(images).logits)

    views = Views.of(subjects.patients, plan)
    name = (ADAPTER, adapter.digest)
    scores = scores_of(losses(first), losses(adapter))
    return judged(name, scores, subjects.inside, subjects.assignment, claim, alpha)


def audit_student(site: Site, plan: RunPlan, subjects: Subjects, alpha: float = ALPHA) -> Membership:
    """The site's student, against what it started from. It is trained without noise: nothing is claimed.

    Raises:
        ArtefactError: there is none, or it is of another run.
    """
    student = load_student(site.folder / STUDENT_FILE)
    if student.card.run_id != plan.run_id:
        raise ArtefactError(f"{site.folder / STUDENT_FILE} is of another run than plan.json: run again")
    seed = site.draw_seed(plan, "student")
    # Before the run: a start that was learned from the site's own images is a part of it.
    shipped = student.card.start in (None, Start.shipped)
    start = build_student(student.card.name, plan.data, shipped, seed).eval()
    views, name = Views.of(subjects.patients, plan), (STUDENT, student.card.sha256)
    scores = scores_of(views.losses(start), views.losses(student.module))
    return judged(name, scores, subjects.inside, subjects.assignment, Claim(None, plan.privacy.delta), alpha)
