"""The shared teacher: a frozen SAM-architecture encoder, LoRA slots in it, and a mask decoder.

One teacher a preset and rank is built for a process and lives as long as it; a visit to a site writes that
site's adapter into it (`common.tuning.slots`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from common import checkpoints, public_factors
from common.adapter import Adapter
from common.backbones import build_backbone
from common.backbones.base import Backbone, Features, fit_to_unit
from common.canonical import canonical_json
from common.decoder import MaskDecoder
from common.errors import ArtefactError, ConfigError
from common.plan import RunPlan, rebuild
from common.public_factors import with_public_rows
from common.recipe import DataConfig, DecoderTraining, TeacherConfig
from common.seeding import derive_seed
from common.tuning.halves import BOTH, Halves
from common.tuning.placement import needs_split, place
from common.tuning.presets import PRESETS, rank_of, sends_a, settings_faults
from common.tuning.slots import AdapterSlots, SlotPlan, sharing_copy

HEADS = ("vessel", "blob", "region", "bright", "dark")  # the shipped decoder's heads, in order

teachers_built = 0  # how many networks this process has built: tests assert that it is one a preset and rank


@dataclass(frozen=True)
class Preprocessing:
    """What an encoder's weights were trained with: channel order RGB, values in [0, 1] before."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


TINY = Preprocessing((0.45,) * 3, (0.25,) * 3)


@dataclass(frozen=True)
class TeacherOutput:
    """``logits`` (B, C, S, S); ``tokens`` (B, T, h, w), the encoder's, and ``feature`` (B, 32, S/2, S/2)."""

    logits: Tensor
    tokens: Tensor
    feature: Tensor


class Teacher(nn.Module):
    """Image (B, 3, S, S) in [0, 1] -> `TeacherOutput`."""

    mean: Tensor
    std: Tensor

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
    teacher = bare_teacher(name)
    if image_size % max(teacher.encoder.unit, 32):
        wanted = max(teacher.encoder.unit, 32)
        raise ArtefactError(f"{name} takes image sizes that are multiples of {wanted}, not {image_size}")
    teacher.load_state_dict(checkpoints.load_tensors(name))
    if image_size != checkpoints.card(name)["image_size"]:
        teacher.encoder.resize_positions(image_size)
    return teacher


def bare_teacher(name: str) -> Teacher:
    """The network of the teacher ``name``, with random weights. Raises ``ArtefactError`` if it is none."""
    card = checkpoints.card(name)
    if card.get("kind") != "teacher":
        raise ArtefactError(f"{name} is a {card.get('kind')}, not a teacher; see `wardround teacher list`")
    encoder = build_backbone(card["encoder"]["family"], card["encoder"]["config"])
    preprocessing = Preprocessing(tuple(card["preprocessing"]["mean"]), tuple(card["preprocessing"]["std"]))
    return Teacher(encoder, len(card["heads"]), card["multi_scale"], preprocessing)


class ResidentTeacher:
    """The teacher of this process for one preset and rank, with slots for adapters.

    All of them share the tensors of the base (`_base_network`); of its own a teacher has the adapter's
    tensors, and the weights of layers with folded factors during a visit.

    Guarantees: ``visit`` leaves nothing of one site's adapter for the next (`AdapterSlots.write`); the base
    weights never change.
    """

    def __init__(self, config: TeacherConfig, data: DataConfig) -> None:
        global teachers_built
        self.network = untrained_teacher(config, data)
        self.slots = teacher_slots(self.network, config)
        self.network.eval()  # there is neither dropout nor batch statistics to switch
        teachers_built += 1

    @contextmanager
    def visit(self, adapter: Adapter, train: bool = False, halves: Halves = BOTH) -> Iterator[Teacher]:
        """The teacher with ``adapter`` written into it; if ``train``, what a site trains takes gradients."""
        with self.slots.visit(adapter, train, halves):
            yield self.network


def untrained_teacher(config: TeacherConfig, data: DataConfig) -> Teacher:
    """The teacher as it was shipped, in the memory that every teacher of this process shares."""
    heads = checkpoints.card(config.name)["heads"]
    rows = tuple(heads.index(item.like) for item in data.classes)
    digest = checkpoints.base_sha256(config.name)
    base = _base_network((config.name, digest), data.image_size, rows, needs_split(config))
    return sharing_copy(base)


def teacher_slots(network: Teacher, config: TeacherConfig) -> AdapterSlots:
    """Slots in ``network`` for the preset, rank and decoder training of ``config``."""
    if faults := settings_faults(config):
        raise ConfigError("this teacher cannot be trained so", faults)
    return _slots(network, config)


def _slots(network: Teacher, config: TeacherConfig) -> AdapterSlots:
    placement = place(network.encoder, network.decoder, config)
    plan = SlotPlan(
        base_sha256=checkpoints.base_sha256(config.name),
        preset=config.adapter,
        rank=rank_of(config),
        layers=placement.layers,
        dense=placement.dense,
        train_a=sends_a(config.adapter),
    )
    return AdapterSlots(network, plan)


@lru_cache(maxsize=2)
def _base_network(model: tuple[str, str], image_size: int, rows: tuple[int, ...], split: bool) -> Teacher:
    """The teacher with the output rows of a job's classes; only ever copied, never trained.

    ``model`` is its name and digest: an imported name may mean other weights later.
    """
    network = shipped_teacher(model[0], image_size)
    select_head(network.decoder.head, list(rows))
    if split:
        network.encoder.split_qkv()
    return network


def select_head(head: nn.Conv2d, rows: list[int]) -> None:
    """Keep the given rows of a 1 x 1 output convolution, one a class."""
    assert head.bias is not None
    head.weight = nn.Parameter(head.weight.detach()[rows].clone())
    head.bias = nn.Parameter(head.bias.detach()[rows].clone())
    head.out_channels = len(rows)


@lru_cache(maxsize=8)
def _resident(key: str) -> ResidentTeacher:
    _, teacher, data = json.loads(key)
    return ResidentTeacher(rebuild(TeacherConfig, teacher), rebuild(DataConfig, data))


def resident_teacher(config: TeacherConfig, data: DataConfig) -> ResidentTeacher:
    """The process's teacher for these settings, built at the first call and kept.

    Learning rate, steps and paths do not make another network, so they are no part of the key.
    """
    same = TeacherConfig(config.name, config.adapter, rank_of(config) or None, config.decoder)
    data = DataConfig(image_size=data.image_size, classes=data.classes)
    digest = checkpoints.base_sha256(config.name)
    return _resident(canonical_json([digest, asdict(same), asdict(data)]))


def teacher_for(adapter: Adapter, plan: RunPlan) -> ResidentTeacher:
    """The teacher that ``adapter`` belongs to. Raises ``ArtefactError`` if the plan has none such."""
    if plan.variant(adapter.preset, adapter.rank) is None:
        listed = ", ".join(f"{one.preset} of rank {one.rank}" for one in plan.variants)
        raise ArtefactError(
            f"the adapter is {adapter.preset} of rank {adapter.rank}, and the plan has {listed}: "
            "use one of its own"
        )
    config = replace(plan.teacher, adapter=adapter.preset, rank=adapter.rank or None)
    return resident_teacher(config, plan.data)


def initial_adapter(config: TeacherConfig, data: DataConfig, seed: int) -> Adapter:
    """What round 0 starts from; the same for every site of a run that trains by these settings."""
    return resident_teacher(config, data).slots.initial(derive_seed(seed, "teacher", "lora_A"))


def private_initial_adapter(config: TeacherConfig, data: DataConfig, seed: int) -> Adapter:
    """What a run under differential privacy starts from: `initial_adapter`, with public rows for A.

    Raises ``ArtefactError`` if it has factors and the teacher has no public ones; A is never left random.
    """
    start = initial_adapter(config, data, seed)
    return with_public_rows(start, public_factors.load(config.name)) if start.layers() else start


def teacher_info(name: str) -> dict[str, Any]:
    """The card of a teacher, with what each adapter preset trains of its encoder at its default rank.

    Of a preset that trains B alone also the digest of its public A at each rank. A preset of layers that the
    encoder does not have (``fused`` on DINO) is left out.
    """
    card = dict(checkpoints.card(name))
    with torch.device("meta"):
        roles = set(bare_teacher(name).encoder.LAYERS)
    fitting = [preset for preset, about in PRESETS.items() if set(about.roles) <= roles]
    card["presets"] = {preset: _preset_info(name, preset) for preset in fitting}
    card["decoder"] = {str(kind): _decoder_elements(name, kind) for kind in DecoderTraining}
    return card


def _preset_info(name: str, preset: str) -> dict[str, Any]:
    """What a preset trains of the encoder, counted in the network itself, built without any memory."""
    slots = _slots_without_memory(TeacherConfig(name, preset, decoder=DecoderTraining.frozen))
    info = {
        "kind": str(PRESETS[preset].kind),
        "rank": slots.plan.rank,
        "targets": _endings(slots.network, [*slots.plan.layers, *slots.plan.dense]),
        "elements": sum(parameter.numel() for parameter in slots.trainable().values()),
    }
    return info if sends_a(preset) else {**info, "a_matrix_sha256": _public_digests(name, slots.plan)}


def _public_digests(name: str, plan: SlotPlan) -> dict[str, str]:
    """Rank -> digest of the public A of ``plan``'s layers, as a policy lists it; empty without public A."""
    if public_factors.missing(name):
        return {}
    rows = public_factors.load(name)
    digests = {}
    for rank in range(1, public_factors.MOST_ROWS + 1):
        factors = {f"{layer}.lora_A": rows[layer][:rank] for layer in plan.layers}
        digests[str(rank)] = Adapter(factors, plan.base_sha256, rank, plan.preset).a_sha256
    return digests


def _decoder_elements(name: str, training: DecoderTraining) -> int:
    """What travels of the decoder, beside a preset without factors."""
    slots = _slots_without_memory(TeacherConfig(name, "decoder", decoder=training))
    return sum(parameter.numel() for parameter in slots.trainable().values())


def _slots_without_memory(settings: TeacherConfig) -> AdapterSlots:
    with torch.device("meta"):
        return _slots(bare_teacher(settings.name), settings)


def _endings(network: nn.Module, names: Sequence[str]) -> list[str]:
    """``names`` without the blocks' numbers, each once: ``attn.qkv.q``."""
    assert isinstance(network, Teacher)
    prefix = f"encoder.{network.encoder.blocks_name}."
    found = [
        name.removeprefix(prefix).partition(".")[2] if name.startswith(prefix) else name for name in names
    ]
    return list(dict.fromkeys(found))


def list_teachers() -> list[dict[str, Any]]:
    """Name, parameters and licence of each shipped teacher."""
    cards = [checkpoints.card(name) for name in checkpoints.names()]
    return [card for card in cards if card.get("kind") == "teacher"]
