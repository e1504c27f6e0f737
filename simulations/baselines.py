"""Baselines that need every site's images or models in one place: only a simulation can train them.

``fedavg``, ``fedprox``, ``fedbn``
    the student's own weights, trained in ``student.rounds`` rounds on the sites' labels and averaged; no
    teacher, no synthetic image (`client.federated_student`).
``centralised``
    one student on the labelled patients of all sites.
``feddf``
    at each site, a student of the site's labels and of what all single-site teachers together, as the mean
    of their probabilities, say of the site's own crops. After ensemble distillation for federated learning
    (Lin et al., NeurIPS 2020), which distils at the server, on data that nobody owns.

All start from the shipped student and take ``student.steps`` steps on batches of the same size as every other
model. The federation is a plain loop over the sites, without messages, rounding or a server: an oracle for
the walk with ``student.scope=federated``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from client.deadline import Deadline
from client.distillation import distil
from client.federated_student import read_weights, train_round, write_weights
from client.measuring import model_path
from client.patients import Patient, Split, of_split
from client.site import Site
from client.students import Student, build_student, save_student
from client.teachers import LOCAL_TEACHER, SiteTeachers
from client.transfer.labelling import gather, label_with_ensemble
from client.transfer.sets import TransferSet, real_crops
from common import progress
from common.adapter import Adapter
from common.plan import RunPlan, Stage
from common.recipe import Federation, StudentScope
from common.seeding import derive_seed
from common.shared_student import travelling

Trained = dict[str, Student]  # site -> the model that it would have
NO_LIMIT = float("inf")


@dataclass(frozen=True)
class Hospital:
    """A site of a simulation, its images open to everybody here."""

    site: Site
    plan: RunPlan
    train: list[Patient]

    @classmethod
    def open(cls, site: Site, plan: RunPlan) -> Hospital:
        return cls(site, plan, of_split(site.patients(plan.data, plan.seed), Split.train))

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def labelled(self) -> list[Patient]:
        return [patient for patient in self.train if patient.labelled]

    @property
    def weight(self) -> float:
        """As the site declares it in a federation."""
        return float(min(len(self.labelled), self.site.policy.max_weight))

    @cached_property
    def teachers(self) -> SiteTeachers:
        start = Adapter({}, "", 0, "")  # there is no federated teacher to ask here
        return SiteTeachers(self.site, self.plan, start, self.labelled, Deadline(NO_LIMIT))

    @cached_property
    def local_teacher(self) -> Adapter:
        """The site's own teacher, as the run left it, or trained now."""
        path = model_path(self.site, LOCAL_TEACHER)
        return Adapter.load(path) if path.exists() else self.teachers.local

    def start(self) -> Student:
        seed = self.site.draw_seed(self.plan, "student")
        return build_student(self.plan.student.name, self.plan.data, True, seed)


def train_pooled(names: Sequence[str], sites: Sequence[Site], plan: RunPlan) -> None:
    """Train the pooled baselines ``names`` and leave each in the sites' folders, beside their own models.

    What lies there already, whole, is not trained again. Raises ``DataError`` for a site without labels.
    """
    hospitals = [Hospital.open(site, plan) for site in sites]
    missing = [name for name in names if not all(_is_there(model_path(site, name)) for site in sites)]
    if not missing:
        return
    progress.stage("baselines on all sites' images", len(missing))
    for name in missing:
        trained = MAKERS[name](hospitals, plan)
        for hospital in hospitals:
            about = {"run_id": plan.run_id, "model": name}
            student, path = trained[hospital.name], model_path(hospital.site, name)
            save_student(student, path, plan.student.name, plan.data, about)
        progress.step(name)
    progress.end()


def _is_there(path: Path) -> bool:
    return path.exists() and path.with_suffix(".json").exists()  # the card is written last


def federated(federation: Federation, hospitals: Sequence[Hospital], plan: RunPlan) -> Trained:
    """Every site's student after ``student.rounds`` rounds, all steps made in them."""
    settings = replace(plan.student, scope=StudentScope.federated, federation=federation, federated_share=1.0)
    return federated_loop(hospitals, replace(plan, student=settings))


def federated_loop(hospitals: Sequence[Hospital], plan: RunPlan) -> Trained:
    """The rounds that ``plan.student`` asks for, and nothing after them."""
    students = {hospital.name: hospital.start() for hospital in hospitals}
    first = students[hospitals[0].name]
    names = travelling(dict(first.named_parameters()), plan.student.federation)
    shared = read_weights(first, names)
    total = sum(hospital.weight for hospital in hospitals)
    for index in range(plan.student.rounds):
        sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in shared.items()}
        for hospital in hospitals:
            student = students[hospital.name]
            write_weights(student, shared)
            seed = hospital.site.draw_seed(plan, str(Stage.shared_student), index)
            train_round(student, hospital.labelled, plan, (index, seed), Deadline(NO_LIMIT))
            for name, tensor in read_weights(student, names).items():
                sums[name] += hospital.weight * tensor.double()
        shared = {name: (part / total).float() for name, part in sums.items()}
    for student in students.values():
        write_weights(student, shared)
    return students


def centralised(hospitals: Sequence[Hospital], plan: RunPlan) -> Trained:
    """One student on everybody's labels, for as many steps as a site makes alone."""
    together = [patient for hospital in hospitals for patient in hospital.labelled]
    student = hospitals[0].start()
    distil(student, together, None, plan, derive_seed(plan.seed, "centralised"), Deadline(NO_LIMIT))
    return {hospital.name: student for hospital in hospitals}


def feddf(hospitals: Sequence[Hospital], plan: RunPlan) -> Trained:
    """A student a site, of the ensemble's softened outputs on the site's crops; features are no one's."""
    trained = {}
    for hospital in hospitals:
        student, seed = hospital.start(), hospital.site.draw_seed(plan, "student")
        transfer = _said_by_all(hospital, hospitals, plan)
        distil(student, hospital.labelled, transfer, plan, seed, Deadline(NO_LIMIT))
        trained[hospital.name] = student
    return trained


def _said_by_all(hospital: Hospital, everyone: Sequence[Hospital], plan: RunPlan) -> TransferSet | None:
    """The site's own crops, labelled with the mean probability over all single-site teachers."""
    crops = real_crops(hospital.train, plan, hospital.site.draw_seed(plan, "crops"))
    images = gather(crops, None)
    visits = [other.teachers.visit(other.local_teacher) for other in everyone]
    return None if images is None else label_with_ensemble(visits, images, plan.data.exclusive)


def _of(federation: Federation) -> Callable[[Sequence[Hospital], RunPlan], Trained]:
    return lambda hospitals, plan: federated(federation, hospitals, plan)


MAKERS: Mapping[str, Callable[[Sequence[Hospital], RunPlan], Trained]] = {
    **{str(one): _of(one) for one in Federation},
    "centralised": centralised,
    "feddf": feddf,
}
