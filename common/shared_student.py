"""A student whose weights the sites train together: what of it travels, where it starts, whose steps.

Its weights travel as an `Adapter` of dense tensors alone, so that they pass the same exit, the same screening
and the same mean as a teacher's decoder.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from common import checkpoints
from common.adapter import Adapter
from common.recipe import DataConfig, Federation, StudentConfig

SHARED_STUDENT = "student"  # the preset of its adapters, which are no teacher's
HEAD = ("head.weight", "head.bias")  # of every student, one row a class


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


def normalising(weights: Mapping[str, Tensor]) -> set[str]:
    """The parameters that are scales and shifts of normalisations.

    Known by their shapes, so that a server needs no network: a layer whose ``weight`` is a vector with a bias
    beside it (those of convolutions and linear layers have two dimensions or more; a PReLU has no bias). A
    test holds it against every student's modules.
    """
    found = set()
    for name, tensor in weights.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and tensor.dim() == 1 and f"{layer}.bias" in weights:
            found |= {name, f"{layer}.bias"}
    return found


def travelling(weights: Mapping[str, Tensor], federation: Federation) -> list[str]:
    """The parameters that are averaged, in order.

    Under FedBN (Li et al., ICLR 2021) scales and shifts of normalisations stay at home. A student whose
    normalisations have none, such as ``unet-xs``, is then averaged whole: FedBN is FedAvg for it.
    """
    at_home = normalising(weights) if federation is Federation.fedbn else set()
    return sorted(set(weights) - at_home)


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
