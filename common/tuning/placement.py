"""Where a preset's tensors sit in a teacher: `place` prepares the network and names what is trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from common.backbones.base import Backbone
from common.recipe import DecoderTraining, TeacherConfig
from common.tuning.bottleneck import insert_bottlenecks
from common.tuning.presets import PRESETS, Kind, Preset

HEAD = "head"  # the decoder's output layer
INTAKE = ("project.", "laterals.", "joins.")  # what of the decoder takes the encoder's maps in


@dataclass(frozen=True)
class Placement:
    """Names below the teacher: ``layers`` that carry factors, ``dense`` parameters trained as they are."""

    layers: tuple[str, ...]
    dense: tuple[str, ...]


def needs_split(teacher: TeacherConfig) -> bool:
    """Whether the preset looks at query, key and value apart (`Backbone.split_qkv`)."""
    return bool({"q", "k", "v"} & set(PRESETS[teacher.adapter].roles))


def place(encoder: Backbone, decoder: nn.Module, settings: TeacherConfig) -> Placement:
    """Split or insert in ``encoder``, in place, what the preset of ``settings`` needs; name the tensors."""
    preset = PRESETS[settings.adapter]
    if needs_split(settings):
        encoder.split_qkv()
    layers = encoder.layers(preset.roles, preset.last_blocks) if preset.kind is Kind.lora else []
    decoder_layers, decoder_dense = _in_decoder(decoder, settings.decoder)
    return Placement(
        layers=(*(f"encoder.{name}" for name in layers), *(f"decoder.{name}" for name in decoder_layers)),
        dense=(
            *(f"encoder.{name}" for name in _dense_in_encoder(encoder, preset)),
            *(f"decoder.{name}" for name in decoder_dense),
        ),
    )


def _dense_in_encoder(encoder: Backbone, preset: Preset) -> list[str]:
    if preset.kind is Kind.bottleneck:
        return insert_bottlenecks(encoder)
    if preset.kind is Kind.norm:
        return _norms_and_biases(encoder)
    if preset.kind is Kind.full:
        return [name for name, _ in encoder.named_parameters()]
    return []


def _norms_and_biases(encoder: nn.Module) -> list[str]:
    """Every bias, and the weights of modules that call themselves a norm (each family has its own class)."""
    norms = {name for name, module in encoder.named_modules() if "Norm" in type(module).__name__}
    return [
        name
        for name, _ in encoder.named_parameters()
        if name.endswith("bias") or name.rpartition(".")[0] in norms
    ]


def _in_decoder(decoder: nn.Module, training: DecoderTraining) -> tuple[list[str], list[str]]:
    """Layers with factors and dense parameters of the decoder.

    A depthwise convolution keeps its weights under ``lora``: each of its kernels is of one channel, so a
    low-rank change of it is no smaller than the kernel.
    """
    names = [name for name, _ in decoder.named_parameters()]
    head = [name for name in names if name.startswith(f"{HEAD}.")]
    if training is DecoderTraining.frozen:
        return [], []
    if training is DecoderTraining.full:
        return [], names
    if training is DecoderTraining.shallow:
        return [], [name for name in names if not name.startswith(INTAKE)]
    if training is DecoderTraining.head:
        return [], head
    layers = [
        name
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == 1 and name != HEAD
    ]
    return layers, head
