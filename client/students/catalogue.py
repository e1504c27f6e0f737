"""The students by name, and their start."""

from __future__ import annotations

from collections.abc import Callable

import torch

from client.students.base import Student
from client.students.mobile import Mobile
from client.students.unet import UNetS, UNetXS
from client.students.vit import ViTTiny
from common import checkpoints
from common.errors import ArtefactError, ConfigError
from common.names import SHIPPED_STUDENTS
from common.recipe import DataConfig, Start
from common.teacher import select_head

STUDENTS: dict[str, Callable[[int], Student]] = {
    "unet-xs": UNetXS,
    "unet-s": UNetS,
    "mobile": Mobile,
    "vit-tiny": ViTTiny,
}


def start_of(kind: str, asked: Start | None) -> Start:
    """What a student of ``kind`` starts from: as ``asked``, or its kind's usual start.

    Usual are the shipped weights where there are any, and else MAE on the site's own images.
    Raises ``ConfigError`` where shipped weights are asked for and there are none.
    """
    ships = kind in SHIPPED_STUDENTS
    if asked is Start.shipped and not ships:
        raise ConfigError(
            f"{kind} ships no weights, and the plan starts from them: choose another student in site.yaml, "
            "or student.start=mae, moco or random in the recipe"
        )
    return asked or (Start.shipped if ships else Start.mae)


def build_student(name: str, data: DataConfig, pretrained: bool, seed: int) -> Student:
    """A student with one head a class: from the shipped weights, or random from ``seed``.

    Raises ``ArtefactError`` for an unknown name, and for shipped weights that there are none of.
    """
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
