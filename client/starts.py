"""What a site's students start from; a start that has to be trained is trained once for all variants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from client.deadline import Deadline
from client.patients import Patient
from client.selfsupervision import pretrain
from client.selfsupervision.pretraining import Course
from client.site import Site
from client.students import Student, build_student, start_of
from common.plan import RunPlan
from common.recipe import Start


@dataclass(frozen=True)
class Starts:
    """First weights of one site's students, all of one kind.

    Attributes:
        train: the site's training patients, labelled or not.
    """

    site: Site
    plan: RunPlan
    train: Sequence[Patient]
    deadline: Deadline
    _learned: dict[Start, dict[str, Any]] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.site.student or self.plan.student.name

    def resolve(self, wanted: Start | None) -> Start:
        """The start that a variant which asks for ``wanted`` has; None asks for the plan's."""
        return start_of(self.kind, wanted or self.plan.student.start)

    def student(self, wanted: Start | None) -> Student:
        """A student of its own with these weights. All but the shipped begin with the same random ones.

        A site without any image, which only a private run lets go on, pre-trains nothing.
        """
        start = self.resolve(wanted)
        seed = self.site.draw_seed(self.plan, "student")
        student = build_student(self.kind, self.plan.data, start is Start.shipped, seed)
        if start in (Start.mae, Start.moco) and self.train:
            if start not in self._learned:
                course = Course(
                    start,
                    self.plan.student.pretraining_steps,
                    self.plan.data.image_size,
                    self.site.draw_seed(self.plan, "start", start),
                )
                pretrain(student, self.train, course, self.deadline)
                self._learned[start] = {key: value.clone() for key, value in student.state_dict().items()}
            student.load_state_dict(self._learned[start])
        return student
