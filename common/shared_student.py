"""A student whose weights the sites train together: what of it travels, where it starts, whose steps.

Its weights travel as an `Adapter` of dense tensors alone, so that they pass the same exit, the same screening
and the same mean as a teacher's decoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from common import checkpoints
from common.adapter import Adapter
from common.recipe import DataConfig, Federation, StudentConfig

SHARED_STUDENT = "student"  # the preset of its adapters, which are no teacher's
HEAD = ("head.weight", "head.bias")  # of every student, one row a class
NORMALISING = ("norm", "bn", "ln", "layernorm", "groupnorm", "batchnorm", "N")  # N: MONAI's name for it


def federated_steps(settings: StudentConfig) -> int:
    """Of ``settings.steps``, how many a site makes in rounds; 0 where no student's weights travel."""
    return round(settings.federated_share * settings.steps) if settings.federated else 0


def round_steps(settings: StudentConfig, index: int) -> tuple[int, int]:
    """The first of the steps that round ``index`` (0-based) makes, and the one after its last.

    Guarantee: the rounds together make `federated_steps`, each once, and differ by one step at most.
    """
    each, left = divmod(federated_steps(settings), settings.rounds)
    first = index * each + min(index, left)
    return first, first + each + (index < left)


def normalising(name: str) -> bool:
    """Whether parameter ``name`` is the scale or shift of a normalisation.

    By its name alone, so that a server knows it without the network: a layer called ``norm``, ``norm2``,
    ``bn1``, ``N`` ... A test holds it against every student's modules.
    """
    layer = name.split(".")[-2] if "." in name else ""
    return layer.rstrip("0123456789").rstrip("_") in NORMALISING or layer.endswith("_norm")


def travelling(names: Iterable[str], federation: Federation) -> list[str]:
    """The parameters that are averaged, in order.

    Under FedBN (Li et al., ICLR 2021) scales and shifts of normalisations stay at home. A student whose
    normalisations have none, such as ``unet-xs``, is then averaged whole: FedBN is FedAvg for it.
    """
    return sorted(name for name in names if federation is not Federation.fedbn or not normalising(name))


def first_student(settings: StudentConfig, data: DataConfig) -> Adapter:
    """What the rounds start from: the shipped weights, one head a class, and of them what travels.

    Raises ``ArtefactError`` if the student ships without weights.
    """
    heads = checkpoints.card(settings.name)["heads"]
    rows = torch.tensor([heads.index(item.like) for item in data.classes])
    tensors: Mapping[str, Tensor] = checkpoints.load_tensors(settings.name)
    chosen = {name: tensor[rows] if name in HEAD else tensor for name, tensor in tensors.items()}
    names = travelling(chosen, settings.federation)
    base = checkpoints.base_sha256(settings.name)
    return Adapter({name: chosen[name].clone() for name in names}, base, 0, SHARED_STUDENT)
