"""The teachers that a site can ask: the federated one, and those of its own that stay here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from client.adaptation import adapt
from client.deadline import Deadline
from client.patients import Patient
from client.personal import personalises, train_personal
from client.rounds import round_visit
from client.site import Site
from common.adapter import Adapter
from common.plan import RunPlan, Stage
from common.teacher import ResidentTeacher, Teacher, initial_adapter, resident_teacher

LOCAL_TEACHER = "local_teacher"  # the baseline that is a teacher: this site's alone, same steps


@dataclass(frozen=True)
class SiteTeachers:
    """One network, and the adapters that make it a teacher; what a site trains itself is trained once.

    Attributes:
        federated: the adapter that all sites trained.
        labelled: the patients from whom the site's own adapters learn.
    """

    site: Site
    plan: RunPlan
    federated: Adapter
    labelled: Sequence[Patient]
    deadline: Deadline

    @property
    def resident(self) -> ResidentTeacher:
        return resident_teacher(self.site.teacher(self.plan), self.plan.data)

    @contextmanager
    def visit(self, adapter: Adapter) -> Iterator[Teacher]:
        """The network with ``adapter`` written into it."""
        with self.resident.visit(adapter) as network:
            yield network

    @cached_property
    def untuned(self) -> Adapter:
        """The teacher as it ships: the adapter that every run starts from changes nothing yet."""
        return initial_adapter(self.site.teacher(self.plan), self.plan.data, self.plan.seed)

    @cached_property
    def personal(self) -> Adapter | None:
        """The site's own, on top of the shared one; None where the rule has none."""
        if not personalises(self.plan):
            return None
        return train_personal(self.site, self.plan, self.federated, self.labelled, self.deadline)

    @cached_property
    def local(self) -> Adapter:
        """A teacher of this site alone: the same start, steps and batches as in the federation."""
        adapter = self.untuned
        for index in range(self.plan.rounds):
            visit = round_visit(self.site, self.plan, Stage.adapt, index)
            adapter = adapt(self.resident, adapter, self.labelled, self.plan, visit, self.deadline).adapter
        return adapter
