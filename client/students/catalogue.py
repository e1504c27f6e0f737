"""The students by name, and their start."""

from __future__ import annotations

from collections.abc import Callable

import torch

from client.students.base import Student
from client.students.unet import UNetXS
from common import checkpoints
from common.errors import ArtefactError
from common.recipe import DataConfig
from common.teacher import select_head

STUDENTS: dict[str, Callable[[int], Student]] = {"unet-xs": UNetXS}


def build_student(name: str, data: DataConfig, pretrained: bool, seed: int) -> Student:
    """A student with one head a class: from the shipped weights, or random from ``seed``."""
    if name not in STUDENTS:
        raise ArtefactError(f"no student {name!r}; there are: {', '.join(STUDENTS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        if not pretrained:
            return STUDENTS[name](len(data.classes))
        heads = checkpoints.card(name)["heads"]
        student = STUDENTS[name](len(heads))
    student.load_state_dict(checkpoints.load_tensors(name))
    select_head(student.head, [heads.index(item.like) for item in data.classes])
    return student
