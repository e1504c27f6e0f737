"""One round of a student that all sites train: from the common weights, some steps on the site's own labels.

``fedavg`` (McMahan et al., AISTATS 2017), ``fedprox`` (Li et al., MLSys 2020: the loss gains mu/2 times the
squared distance from what was sent) and ``fedbn`` (Li et al., ICLR 2021: scales and shifts of normalisations
stay at the site). The optimiser starts afresh in every round; the learning rate runs over all rounds as one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from client.deadline import Deadline
from client.fitting import Schedule, fit
from client.losses import segmentation_loss
from client.patients import Patient
from client.sampling import PatchSampler
from client.students import Student, build_student
from common.adapter import Adapter
from common.durable import write_atomic
from common.errors import ArtefactError
from common.plan import RunPlan
from common.recipe import Federation
from common.shared_student import federated_steps, round_steps, travelling

KEPT = "student_norms"


def write_weights(student: Student, weights: Mapping[str, Tensor]) -> None:
    """Replace the parameters that ``weights`` names; the others stay.

    Raises ``ValueError`` for a name or shape that the student has not; nothing is changed then.
    """
    own = dict(student.named_parameters())
    faults = [name for name in weights if name not in own or own[name].shape != weights[name].shape]
    if faults:
        raise ValueError(f"{len(faults)} tensors that this student has not")
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)


def read_weights(student: Student, names: Sequence[str]) -> dict[str, Tensor]:
    """Copies of the parameters of those names."""
    own = dict(student.named_parameters())
    return {name: own[name].detach().clone() for name in names}


def train_round(
    student: Student, patients: Sequence[Patient], plan: RunPlan, order: tuple[int, int], deadline: Deadline
) -> list[float]:
    """Train ``student`` in place for the steps of one round; the loss of each, without the proximal term.

    Args:
        order: (round index, seed of the batches).

    Raises:
        DataError: a loss is not finite, or nobody has a mask.
        DeadlinePassed: between two steps.
    """
    settings, (index, seed) = plan.student, order
    first, last = round_steps(settings, index)
    sampler = PatchSampler(patients, plan.data.image_size, seed, labelled=True)
    parameters = list(student.parameters())
    sent = [parameter.detach().clone() for parameter in parameters]
    found: list[float] = []

    def loss_at() -> Tensor:
        batch = sampler.batch(settings.batch_size)
        loss = segmentation_loss(student(batch.images), batch.masks, plan.data.exclusive)
        found.append(loss.item())
        if settings.federation is not Federation.fedprox:
            return loss
        return loss + settings.proximal / 2 * _squared_distance(parameters, sent)

    student.train()
    schedule = Schedule(settings.learning_rate, last - first, first, settings.steps)
    fit(parameters, schedule, loss_at, deadline, "training the shared student")
    student.eval()
    return found


def shared_student(sent: Adapter, plan: RunPlan, own: Mapping[str, Tensor]) -> Student:
    """The student with what was ``sent``, and of the site's ``own`` what does not travel.

    Raises ``ArtefactError`` if those are not all of its parameters, or of other shapes.
    """
    student = build_student(plan.student.name, plan.data, True, plan.seed)
    weights = dict(student.named_parameters())
    if set(sent.tensors) != set(travelling(weights, plan.student.federation)):
        raise ArtefactError("what was sent is no whole student of the plan")
    try:
        write_weights(student, {**own, **sent.tensors})
    except ValueError as error:
        raise ArtefactError(f"what was sent does not fit {plan.student.name}: {error}") from error
    return student


@dataclass(frozen=True)
class NormKeeper:
    """Under FedBN, a site's own scales and shifts between the rounds of one plan; otherwise nothing.

    One file a round, so that a round that is asked for again starts from where it started. Below the site's
    folder, and never sent.
    """

    folder: Path
    plan: RunPlan

    @property
    def _files(self) -> Path:
        return self.folder / KEPT / self.plan.digest[:16]

    def before(self, index: int) -> dict[str, Tensor]:
        """As the last round before ``index`` that this site trained in left them; empty: as shipped."""
        for earlier in range(index - 1, -1, -1):
            path = self._files / f"{earlier}.safetensors"
            if path.exists():
                return load_file(path)
        return {}

    def keep(self, index: int, student: Student) -> None:
        weights = dict(student.named_parameters())
        travel = set(travelling(weights, self.plan.student.federation))
        own = read_weights(student, [name for name in weights if name not in travel])
        if own:
            write_atomic(self._files / f"{index}.safetensors", save(own))


def plan_at_home(plan: RunPlan) -> RunPlan:
    """``plan`` with what the rounds have left of a student's steps, at the rate where they ended."""
    settings, done = plan.student, federated_steps(plan.student)
    if not done:
        return plan
    rate = settings.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done / settings.steps)))
    left = replace(settings, steps=settings.steps - done, learning_rate=rate)
    return replace(plan, student=left)


def _squared_distance(parameters: Sequence[Tensor], sent: Sequence[Tensor]) -> Tensor:
    squares = [(now - then).square().sum() for now, then in zip(parameters, sent, strict=True)]
    return torch.stack(squares).sum()
