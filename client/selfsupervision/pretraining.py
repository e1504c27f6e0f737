"""Pre-training of one student on one site's images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from client.deadline import Deadline
from client.fitting import Schedule, fit
from client.patients import Patient
from client.sampling import PatchSampler
from client.selfsupervision.contrast import MomentumContrast
from client.selfsupervision.masking import MaskedAutoencoder, MaskedImage
from client.students import Student, ViTTiny
from common.recipe import Start
from common.seeding import derive_seed

MASKED_BATCH, CONTRAST_BATCH = 16, 24  # tiles a step; a contrasted one is seen twice
LEARNING_RATE = 1e-3
WARM_UP = 20  # steps


@dataclass(frozen=True)
class Course:
    """What kind of pre-training, for how many steps, on tiles of ``size`` pixels a side."""

    start: Start
    steps: int
    size: int
    seed: int


def unmasked(patients: Sequence[Patient]) -> list[Patient]:
    """The same patients without a mask: what is pre-trained on them cannot have seen one."""
    return [
        replace(patient, samples=tuple(replace(sample, mask=None) for sample in patient.samples))
        for patient in patients
    ]


def pretrain(
    student: Student, patients: Sequence[Patient], course: Course, deadline: Deadline
) -> list[float]:
    """Train ``student`` in place on the images of ``patients``, labelled or not; the loss of each step.

    Guarantees: no mask is read; the same patients and course give the same weights; ``student.head`` is not
    trained.

    Raises:
        ValueError: ``course.start`` is none of the two.
        DataError: there is no image, or a loss is not finite.
        DeadlinePassed: between two steps.
    """
    if course.start not in (Start.mae, Start.moco):
        raise ValueError(f"{course.start} is no pre-training")
    sampler = PatchSampler(unmasked(patients), course.size, derive_seed(course.seed, "tiles"))
    pretext = _pretext(student, course)

    def loss_at() -> Tensor:
        if isinstance(pretext, MomentumContrast):
            batch = sampler.batch(CONTRAST_BATCH)
            return pretext.loss(batch.images, [patient for patient, _ in batch.index])
        return pretext.loss(sampler.batch(MASKED_BATCH).images)

    doing = f"pre-training the student by {course.start}"
    student.train()
    schedule = Schedule(LEARNING_RATE, course.steps, warm_up=WARM_UP)
    try:
        return fit(pretext.trained(), schedule, loss_at, deadline, doing)
    finally:
        pretext.finish()
        student.eval()


def _pretext(student: Student, course: Course) -> MaskedImage | MaskedAutoencoder | MomentumContrast:
    """What ``student`` is to find out about images, with its own random weights from the course's seed."""
    seed = derive_seed(course.seed, "draws")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(course.seed, "heads") % 2**63)
        if course.start is Start.moco:
            return MomentumContrast(student, seed, course.steps)
        if isinstance(student, ViTTiny):
            return MaskedAutoencoder(student, seed)
        return MaskedImage(student, seed)
