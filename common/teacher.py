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

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SamVisionConfig, SamVisionModel

from common import checkpoints
from common.adapter import Adapter
from common.decoder import MaskDecoder
from common.errors import ArtefactError
from common.lora import AdapterSlots
from common.recipe import DataConfig, TeacherConfig
from common.seeding import derive_seed

HEADS = ("vessel", "blob", "region", "bright", "dark")  # the shipped decoder's heads, in order
PRESETS: dict[str, tuple[str, ...]] = {"base": ("attn.qkv", "attn.proj"), "lite": ("attn.qkv",)}
PATCH = 8

teachers_built = 0  # how many networks this process has built: tests assert that it stays at one


@dataclass(frozen=True)
class TeacherOutput:
    """``logits`` (B, C, S, S); ``tokens`` (B, 96, S/8, S/8) and ``feature`` (B, 32, S/2, S/2)."""

    logits: Tensor
    tokens: Tensor
    feature: Tensor


class Teacher(nn.Module):
    """Image (B, 3, S, S) in [0, 1] -> `TeacherOutput`."""

    def __init__(self, config: SamVisionConfig, classes: int) -> None:
        super().__init__()
        self.encoder = SamVisionModel(config)
        self.decoder = MaskDecoder(config.output_channels, classes)

    def forward(self, image: Tensor) -> TeacherOutput:
        image = (image - 0.45) / 0.25
        tokens = self.encoder(image).last_hidden_state
        logits, feature = self.decoder(tokens, image)
        return TeacherOutput(logits, tokens, feature)


def tiny_config(image_size: int) -> SamVisionConfig:
    """``ward-sam-tiny``: 4 blocks of width 128 on 8 x 8 patches, every second block global.

    ``initializer_range`` matters: the library's default is 1e-10, which leaves a new network dead.
    """
    return SamVisionConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, mlp_dim=512, output_channels=96,
        image_size=image_size, patch_size=PATCH, window_size=4, global_attn_indexes=[1, 3],
        initializer_range=0.02,
    )  # fmt: skip


def resize_position_tables(encoder: SamVisionModel, image_size: int) -> None:
    """Interpolate the absolute and the global layers' relative position tables for another image size."""
    inner = encoder.vision_encoder
    grid = image_size // PATCH
    table = F.interpolate(
        inner.pos_embed.permute(0, 3, 1, 2), (grid, grid), mode="bicubic", align_corners=False
    )
    inner.pos_embed = nn.Parameter(table.permute(0, 2, 3, 1).contiguous())
    for layer in inner.layers:
        if layer.window_size == 0:
            for name in ("rel_pos_h", "rel_pos_w"):
                old = getattr(layer.attn, name)
                new = F.interpolate(old.T[None], size=2 * grid - 1, mode="linear")[0].T.contiguous()
                setattr(layer.attn, name, nn.Parameter(new))
    inner.patch_embed.image_size = (image_size, image_size)
    inner.config.image_size = inner.image_size = image_size


def shipped_teacher(name: str, image_size: int) -> Teacher:
    """The pre-trained teacher with all its shipped heads, for images of ``image_size`` pixels a side."""
    card = checkpoints.card(name)
    if card.get("kind") != "teacher":
        raise ArtefactError(f"{name} is a {card.get('kind')}, not a teacher; see `wardround teacher list`")
    if image_size % (4 * PATCH):
        raise ArtefactError(f"{name} takes image sizes that are multiples of {4 * PATCH}, not {image_size}")
    teacher = Teacher(tiny_config(card["image_size"]), len(card["heads"]))
    teacher.load_state_dict(checkpoints.load_tensors(name))
    if image_size != card["image_size"]:
        resize_position_tables(teacher.encoder, image_size)
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
    width = tiny_config(card["image_size"])
    per_layer = {"attn.qkv": 4 * width.hidden_size, "attn.proj": 2 * width.hidden_size}  # in + out a rank
    card["presets"] = {
        preset: {"targets": list(targets), "elements_at_rank_8": 8 * width.num_hidden_layers
                 * sum(per_layer[target] for target in targets)}
        for preset, targets in PRESETS.items()
    }  # fmt: skip
    return card


def list_teachers() -> list[dict[str, Any]]:
    """Name, parameters and licence of each shipped teacher."""
    cards = [checkpoints.card(name) for name in checkpoints.names()]
    return [card for card in cards if card.get("kind") == "teacher"]
