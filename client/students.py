"""The students: small networks that a hospital keeps and runs on any machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import UNet
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common import checkpoints
from common.canonical import sha256_of_file
from common.errors import ArtefactError
from common.plan import rebuild
from common.recipe import ClassConfig, DataConfig
from common.teacher import select_head


@dataclass(frozen=True)
class StudentOutput:
    """``logits`` (B, C, S, S); ``deep`` (B, D, S/8, S/8) and ``late`` (B, L, S/2, S/2) to align."""

    logits: Tensor
    deep: Tensor
    late: Tensor


class UNetXS(nn.Module):
    """A 0.18 M parameter residual U-Net: image (B, 3, S, S) in [0, 1] -> logits (B, C, S, S).

    MONAI normalises a U-Net's own output channels an image, which with one output channel fixes the share of
    foreground whatever the image shows. So the body ends with eight channels and a plain 1 x 1 head follows:
    an empty mask can be represented. InstanceNorm keeps no statistics: nothing to average wrongly.
    """

    deep_channels, late_channels = 96, 16

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = UNet(
            spatial_dims=2, in_channels=3, out_channels=8, channels=(16, 32, 64, 96), strides=(2, 2, 2),
            num_res_units=1, norm="INSTANCE",
        )  # fmt: skip
        self.head = nn.Conv2d(8, classes, 1)

    def _body(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three levels of MONAI's nested U-Net, unrolled so that two features can be read on the way."""
        top_down, top_skip, top_up = self.body.model
        second_down, second_skip, second_up = top_skip.submodule
        third_down, third_skip, third_up = second_skip.submodule
        first = top_down((image - 0.45) / 0.25)
        second = second_down(first)
        third = third_down(second)
        deep = third_skip.submodule(third)
        rising = third_up(torch.cat([third, deep], 1))
        late = second_up(torch.cat([second, rising], 1))
        return top_up(torch.cat([first, late], 1)), deep, late

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self._body(image)[0])
        return logits

    def outputs(self, image: Tensor) -> StudentOutput:
        body, deep, late = self._body(image)
        return StudentOutput(self.head(body), deep, late)


STUDENTS: dict[str, Callable[[int], UNetXS]] = {"unet-xs": UNetXS}


def build_student(name: str, data: DataConfig, pretrained: bool, seed: int) -> UNetXS:
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
    module: UNetXS
    card: StudentCard


def save_student(
    student: UNetXS, path: Path, name: str, data: DataConfig, about: dict[str, Any]
) -> StudentCard:
    """Write ``path`` (safetensors) and its card beside it. ``about`` has ``run_id`` and ``model``."""
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
