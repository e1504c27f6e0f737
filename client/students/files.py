"""A student on the disk: its weights and its card."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from client.students.base import Student
from client.students.catalogue import STUDENTS
from common.canonical import sha256_of_file
from common.errors import ArtefactError
from common.plan import rebuild
from common.recipe import ClassConfig, DataConfig, Start


@dataclass(frozen=True)
class StudentCard:
    """``student.json``: what is needed to run the weights beside it."""

    name: str
    classes: list[ClassConfig]
    image_size: int
    longest_side: int | None
    field_of_view: bool
    params: int
    sha256: str
    run_id: str
    model: str  # student, or the baseline's name
    exclusive: bool = False  # what its logits mean: see `common.probability`
    start: Start | None = None  # what it was trained from; None: of an earlier version, which did not say

    def data_config(self) -> DataConfig:
        return DataConfig(
            image_size=self.image_size,
            longest_side=self.longest_side,
            classes=self.classes,
            exclusive=self.exclusive,
            field_of_view=self.field_of_view,
        )


@dataclass(frozen=True)
class LoadedStudent:
    module: Student
    card: StudentCard


def save_student(
    student: Student, path: Path, name: str, data: DataConfig, about: dict[str, Any]
) -> StudentCard:
    """Write ``path`` (safetensors) and its card beside it.

    ``about`` has ``run_id`` and ``model``, and says the ``start``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.detach().cpu().contiguous() for key, value in student.state_dict().items()}, path)
    card = StudentCard(
        name=name,
        classes=list(data.classes),
        image_size=data.image_size,
        longest_side=data.longest_side,
        field_of_view=data.field_of_view,
        exclusive=data.exclusive,
        params=sum(parameter.numel() for parameter in student.parameters()),
        sha256=sha256_of_file(path),
        **about,
    )
    path.with_suffix(".json").write_text(json.dumps(asdict(card), indent=2) + "\n")
    return card


def load_student(path: Path) -> LoadedStudent:
    """Read weights and card. Raises ``ArtefactError`` if either is missing, changed or of another kind."""
    card_path = path.with_suffix(".json")
    for needed in (path, card_path):
        if not needed.exists():
            raise ArtefactError(
                f"{needed} is missing: a student is a .safetensors file with its .json beside it"
            )
    try:
        card: StudentCard = rebuild(StudentCard, json.loads(card_path.read_text()))
        if sha256_of_file(path) != card.sha256:
            raise ArtefactError(f"{path} is not the file that {card_path.name} describes (sha256 differs)")
        student = STUDENTS[card.name](len(card.classes))
        student.load_state_dict(load_file(path))
    except (ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ArtefactError(f"{path} is not a Wardround student: {error}") from error
    return LoadedStudent(student.eval(), card)
