"""The adapter presets by name: what a site trains of the frozen encoder, and at what rank.

Names and numbers only: this module loads no network, so that a recipe is checked without one. Where a
preset's tensors sit in a network is `common.tuning.placement`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from common.names import ALTERNATING_RULES, FIXED_A_RULES, MIXED_PRESET_RULES, MIXED_RANK_RULES
from common.recipe import DecoderTraining, TeacherConfig

GENERATOR = "generator"  # the preset of the generator's adapters, which are no teacher's
DECODER_RANK = 8  # of factors on the decoder, beside a preset that has no rank of its own


class Kind(StrEnum):
    lora = "lora"  # low-rank factors on linear layers (Hu et al. 2021)
    bottleneck = "bottleneck"  # small networks after attention and beside the MLP (Wu et al. 2023, Med-SA)
    norm = "norm"  # biases and normalisation weights (Ben Zaken et al. 2021, BitFit)
    decoder = "decoder"  # nothing of the encoder
    full = "full"  # every weight of the encoder: a baseline, not an adapter


@dataclass(frozen=True)
class Preset:
    """One member of the family.

    Attributes:
        roles: the layers of a block that carry factors (`Backbone.LAYERS`).
        rank: of the factors, unless a recipe says otherwise; 0 for kinds without factors.
        last_blocks: only that many blocks at the end of the encoder; None: all.
        train_a: False: the factor A is fixed during a round and the same for all sites (FFA-LoRA, Sun et
            al. 2024). B alone is trained and sent up.
    """

    kind: Kind
    roles: tuple[str, ...] = ()
    rank: int = 0
    last_blocks: int | None = None
    train_a: bool = True


PRESETS: dict[str, Preset] = {
    "lite": Preset(Kind.lora, ("q", "v"), 4),
    "base": Preset(Kind.lora, ("q", "v"), 8),
    "wide": Preset(Kind.lora, ("q", "k", "v", "out"), 16),
    "dp": Preset(Kind.lora, ("q", "v"), 4, last_blocks=6, train_a=False),
    "fused": Preset(Kind.lora, ("qkv", "out"), 8),
    "last3": Preset(Kind.lora, ("q", "v"), 8, last_blocks=3),
    "bottleneck": Preset(Kind.bottleneck),
    "norm": Preset(Kind.norm),
    "decoder": Preset(Kind.decoder),
    "full": Preset(Kind.full),
}


def sends_a(preset: str) -> bool:
    """Whether a site that trains by ``preset`` trains the factor A too, and sends it up."""
    return preset not in PRESETS or PRESETS[preset].train_a


def rank_of(teacher: TeacherConfig) -> int:
    """The rank of the factors that ``teacher`` trains; 0 where it trains none."""
    preset = PRESETS[teacher.adapter]
    if preset.kind is not Kind.lora and teacher.decoder is not DecoderTraining.lora:
        return 0
    return teacher.rank or preset.rank or DECODER_RANK


def site_teacher(teacher: TeacherConfig, adapter: str | None, rank: int | None) -> TeacherConfig:
    """The settings of a site that says ``adapter`` and ``rank`` of itself; None: the recipe's."""
    return replace(teacher, adapter=adapter or teacher.adapter, rank=rank or teacher.rank)


def settings_faults(teacher: TeacherConfig) -> list[str]:
    """Why these settings train nothing, or name a rank that nothing has; in words for a recipe's author."""
    faults = []
    kind = PRESETS[teacher.adapter].kind
    if kind is Kind.decoder and teacher.decoder is DecoderTraining.frozen:
        faults.append("with adapter decoder and decoder frozen nothing is trained")
    if teacher.rank is not None and rank_of(teacher) == 0:
        faults.append(f"adapter {teacher.adapter} has no factors, so it has no rank")
    if teacher.cached_views and PRESETS[teacher.adapter].last_blocks is None and kind is not Kind.decoder:
        faults.append(f"adapter {teacher.adapter} trains the first blocks: cached_views has nothing to keep")
    return faults


def halves_fault(preset: str, rule: str) -> str:
    """Why ``rule`` cannot average the factors that ``preset`` trains; empty: it can."""
    both = sends_a(preset)
    fitting = ", ".join(n for n, one in PRESETS.items() if one.kind is Kind.lora and one.train_a != both)
    if rule in FIXED_A_RULES and both:
        return f"{preset}, which trains the factor A too; rule {rule} averages B alone (preset {fitting})"
    if rule in ALTERNATING_RULES and not both:
        return f"{preset}, which keeps the factor A fixed; rule {rule} trains it in turns (preset {fitting})"
    return ""


def mix_faults(first: tuple[str, int], others: Mapping[str, tuple[str, int]], rule: str) -> dict[str, str]:
    """Site -> why it cannot train its (preset, rank) in a run whose own is ``first``; empty: all can."""
    return {
        site: fault for site, chosen in sorted(others.items()) if (fault := _mix_fault(first, chosen, rule))
    }


def _mix_fault(first: tuple[str, int], chosen: tuple[str, int], rule: str) -> str:
    if chosen == first:
        return ""
    if rule not in MIXED_RANK_RULES:
        return f"rule {rule} takes one preset and rank for all sites; exact_split takes a mixture"
    if chosen[0] != first[0] and rule not in MIXED_PRESET_RULES:
        return f"rule {rule} takes several ranks of one preset; exact_split takes a mixture"
    ours, theirs = PRESETS[first[0]], PRESETS[chosen[0]]
    if chosen[0] != first[0] and {ours.kind, theirs.kind} != {Kind.lora}:
        return f"{chosen[0]} and {first[0]} train different tensors, and only presets of factors can be mixed"
    if ("qkv" in ours.roles) != ("qkv" in theirs.roles):
        return f"{chosen[0]} and {first[0]} see query, key and value differently (one fused layer, or three)"
    return ""
