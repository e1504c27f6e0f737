"""One round at the site: of the teacher's adapter, noised or not, the generator's, or the shared student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from client.adaptation import Adaptation, Visit, adapt
from client.charges import Reservation
from client.deadline import Deadline
from client.federated_student import NormKeeper, read_weights, shared_student, train_round
from client.fitting import ends
from client.generation import fine_tune
from client.patients import Patient
from client.private_adaptation import PrivateStep, private_step
from client.site import Site
from common.adapter import Adapter
from common.generator import generator_of
from common.plan import Round, RunPlan, Stage
from common.teacher import resident_teacher
from common.tuning.halves import trained_halves
from common.tuning.presets import GENERATOR


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
    visit = round_visit(site, plan, Stage.generator, order.index)
    generator = generator_of(plan.generator)
    return fine_tune(generator, adapter, train, plan, visit, Deadline(order.deadline_s))


def train_shared_student(
    site: Site, plan: RunPlan, student: Adapter, train: Sequence[Patient], order: Round
) -> Adaptation:
    seed = site.draw_seed(plan, str(Stage.shared_student), order.index)
    keeper = NormKeeper(site.folder, plan)
    network = shared_student(student, plan, keeper.before(order.index))
    losses = train_round(network, train, plan, (order.index, seed), Deadline(order.deadline_s))
    keeper.keep(order.index, network)
    return Adaptation(replace(student, tensors=read_weights(network, list(student.tensors))), ends(losses))


def round_visit(site: Site, plan: RunPlan, stage: Stage, index: int) -> Visit:
    """One round of ``stage`` at ``site``: its own seed, and the factors whose turn it is."""
    preset = site.teacher(plan).adapter if stage is Stage.adapt else GENERATOR
    halves = trained_halves(preset, plan.aggregation.rule, index)
    return Visit(index, site.draw_seed(plan, str(stage), index), site.folder, halves, site.name)
