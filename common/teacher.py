"""The shared teacher: a frozen SAM-architecture encoder, LoRA slots in it, and a mask decoder.

One teacher is built for a process and lives as long as it; a visit to a site writes that site's adapter
into it (`common.lora`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from common import checkpoints
from common.adapter import Adapter
from common.backbones import build_backbone
from common.backbones.base import Backbone, Features, fit_to_unit
from common.decoder import MaskDecoder
from common.errors import ArtefactError
from common.lora import AdapterSlots
from common.recipe import DataConfig, TeacherConfig
from common.seeding import derive_seed

HEADS = ("vessel", "blob", "region", "bright", "dark")  # the shipped decoder's heads, in order
PRESETS: dict[str, tuple[str, ...]] = {"base": ("attn.qkv", "attn.proj"), "lite": ("attn.qkv",)}

teachers_built = 0  # how many networks this process has built: tests assert that it stays at one


@dataclass(frozen=True)
class Preprocessing:
    """What an encoder's weights were trained with: channel order RGB, values in [0, 1] before."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


TINY = Preprocessing((0.45,) * 3, (0.25,) * 3)


@dataclass(frozen=True)
class TeacherOutput:
    """``logits`` (B, C, S, S); ``tokens`` (B, 96, S/8, S/8) and ``feature`` (B, 32, S/2, S/2)."""

    logits: Tensor
    tokens: Tensor
    feature: Tensor


class Teacher(nn.Module):
    """Image (B, 3, S, S) in [0, 1] -> `TeacherOutput`."""

    def __init__(
        self, encoder: Backbone, classes: int, multi_scale: bool = True, preprocessing: Preprocessing = TINY
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.multi_scale = multi_scale
        self.decoder = MaskDecoder(encoder.channels, encoder.tap_channels if multi_scale else (), classes)
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> TeacherOutput:
        return self.decode(self.encoder(self.prepared(image)), image)

    def prepared(self, image: Tensor) -> Tensor:
        """What the encoder takes: normalised as its card says, with sides that it can cut into patches."""
        return fit_to_unit((image - self.mean) / self.std, self.encoder.unit)

    def decode(self, features: Features, image: Tensor) -> TeacherOutput:
        """From the encoder's features to logits. The decoder sees the image normalised in one way for all."""
        taps = features.taps if self.multi_scale else ()
        logits, feature = self.decoder(features.tokens, taps, (image - TINY.mean[0]) / TINY.std[0])
        return TeacherOutput(logits, features.tokens, feature)


def shipped_teacher(name: str, image_size: int) -> Teacher:
    """The pre-trained teacher with all its shipped heads, for images of ``image_size`` pixels a side."""
    card = checkpoints.card(name)
    if card.get("kind") != "teacher":
        raise ArtefactError(f"{name} is a {card.get('kind')}, not a teacher; see `wardround teacher list`")
    encoder = build_backbone(card["encoder"]["family"], card["encoder"]["config"])
    if image_size % max(encoder.unit, 32):
        wanted = max(encoder.unit, 32)
        raise ArtefactError(f"{name} takes image sizes that are multiples of {wanted}, not {image_size}")
    preprocessing = Preprocessing(tuple(card["preprocessing"]["mean"]), tuple(card["preprocessing"]["std"]))
    teacher = Teacher(encoder, len(card["heads"]), card["multi_scale"], preprocessing)
    teacher.load_state_dict(checkpoints.load_tensors(name))
    if image_size != card["image_size"]:
        teacher.encoder.resize_positions(image_size)
    return teacher


class ResidentTeacher:
    """The one teacher of this process, with slots for adapters.

    Guarantees: ``visit`` leaves nothing of one site's adapter for the next (`AdapterSlots.write`); the base
    weights never change.
    """

    def __init__(self, config: TeacherConfig, data: DataConfig) -> None:
        global teachers_built
        self.network = shipped_teacher(config.name, data.image_size)
        heads = checkpoints.card(config.name)["heads"]
        select_head(self.network.decoder.head, [heads.index(item.like) for item in data.classes])
        dense = [f"decoder.{name}" for name, _ in self.network.decoder.named_parameters()]
        self.slots = AdapterSlots(
            self.network,
            PRESETS[config.adapter],
            config.rank,
            dense if config.train_decoder else [],
            checkpoints.base_sha256(config.name),
        )
        self.network.eval()  # there is neither dropout nor batch statistics to switch
        teachers_built += 1

    @contextmanager
    def visit(self, adapter: Adapter, train: bool = False) -> Iterator[Teacher]:
        """The teacher with ``adapter`` written into it; its tensors take gradients if ``train``."""
        with self.slots.visit(adapter, train):
            yield self.network


def select_head(head: nn.Conv2d, rows: list[int]) -> None:
    """Keep the given rows of a 1 x 1 output convolution, one a class."""
    assert head.bias is not None
    head.weight = nn.Parameter(head.weight.detach()[rows].clone())
    head.bias = nn.Parameter(head.bias.detach()[rows].clone())
    head.out_channels = len(rows)


@lru_cache(maxsize=2)
def _resident(key: str) -> ResidentTeacher:
    import json

    from common.plan import rebuild

    teacher, data = json.loads(key)
    return ResidentTeacher(rebuild(TeacherConfig, teacher), rebuild(DataConfig, data))


def resident_teacher(config: TeacherConfig, data: DataConfig) -> ResidentTeacher:
    """The process's teacher for these settings, built at the first call and kept.

    Learning rate, steps and paths do not make another network, so they are no part of the key.
    """
    from dataclasses import asdict

    from common.canonical import canonical_json

    config = replace(config, steps=0, batch_size=1, learning_rate=0.0)
    data = replace(data, root=None, longest_side=None, field_of_view=False, min_patients=0)
    return _resident(canonical_json([asdict(config), asdict(data)]))


def initial_adapter(config: TeacherConfig, data: DataConfig, seed: int) -> Adapter:
    """What round 0 starts from; the same for every site of a run."""
    return resident_teacher(config, data).slots.initial(derive_seed(seed, "teacher", "lora_A"))


def base_sha256(name: str) -> str:
    return checkpoints.base_sha256(name)


def teacher_info(name: str) -> dict[str, Any]:
    """The card of a shipped teacher, with the sizes of each adapter preset at its default rank."""
    card = dict(checkpoints.card(name))
    if card.get("kind") != "teacher":
        raise ArtefactError(f"{name} is no teacher; see `wardround teacher list`")
    width = card["encoder"]["config"]["hidden_size"]
    per_layer = {"attn.qkv": 4 * width, "attn.proj": 2 * width}  # in + out a rank
    card["presets"] = {
        preset: {"targets": list(targets), "elements_at_rank_8": 8 * card["encoder"]["config"]["num_hidden_layers"]
                 * sum(per_layer[target] for target in targets)}
        for preset, targets in PRESETS.items()
    }  # fmt: skip
    return card


def list_teachers() -> list[dict[str, Any]]:
    """Name, parameters and licence of each shipped teacher."""
    cards = [checkpoints.card(name) for name in checkpoints.names()]
    return [card for card in cards if card.get("kind") == "teacher"]
