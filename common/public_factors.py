"""Public factors: rows of A taken from the gradients of public images, for runs under differential privacy.

A private run trains the factor B alone (FFA-LoRA, Sun et al. 2024), so all that it can learn lies in the
rows of A. Random rows miss nearly all of a layer's gradient; the leading right-singular vectors of the
gradients of public images hold most of it. They lie beside a teacher's weights, in
``public_factors/TEACHER.safetensors`` with a card: for each layer (out, in) that a preset may name at most
`MOST_ROWS` rows (n, in), the strongest first, so that one file serves every rank. ``python -m
simulations.public_factors TEACHER`` makes them.

Every row has the length `ROW_NORM`, which is that of a row of `AdapterSlots.initial` in the mean: a step of B
then moves a layer's weight as far as it does from there, and so does noise. The values are bfloat16's, so
that none of them changes on the wire, and A has one digest for every wire dtype.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import checkpoints
from common.canonical import sha256_of_file
from common.errors import ArtefactError

if TYPE_CHECKING:
    from torch import Tensor

    from common.adapter import Adapter

FOLDER = "public_factors"
KIND = "public_factors"
MOST_ROWS = 16
ROW_NORM = 3**-0.5  # entries uniform in +-1/sqrt(in) have the variance 1 / (3 in)


def making(teacher: str) -> str:
    """The command that makes the factors of ``teacher``."""
    return f"python -m simulations.public_factors {teacher}"


def missing(teacher: str) -> bool:
    """Whether ``teacher`` is there and its public factors are not."""
    try:
        return not _weights(teacher).is_file()
    except ArtefactError:
        return False


def card(teacher: str) -> dict[str, Any]:
    """How the factors of ``teacher`` were made.

    Raises ``ArtefactError`` if there are none, if they are not their card's or if they are of other weights.
    """
    weights = _weights(teacher)
    again = f"make them with `{making(teacher)}`"
    if not weights.is_file():
        raise ArtefactError(f"{teacher} has no public factors, and A is never random under noise: {again}")
    try:
        found: dict[str, Any] = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
        expected, base = str(found["sha256"]), str(found["base_sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"the public factors of {teacher} have no card: {again}") from error
    if sha256_of_file(weights) != expected:
        raise ArtefactError(f"the public factors of {teacher} are not those of their card: {again}")
    if base != checkpoints.base_sha256(teacher):
        raise ArtefactError(f"the public factors of {teacher} are of other weights of that name: {again}")
    return found


def load(teacher: str) -> dict[str, Tensor]:
    """Layer -> rows (n, in), float32. Raises as `card` does."""
    from safetensors.torch import load_file

    card(teacher)
    return {layer: rows.float() for layer, rows in load_file(_weights(teacher)).items()}


def save(teacher: str, rows: Mapping[str, Tensor], about: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``rows`` (orthonormal, the strongest first), scaled, and their card; return the card.

    Raises ``ArtefactError`` if the disk does not take them.
    """
    scaled = {layer: (ROW_NORM * part[:MOST_ROWS]).bfloat16() for layer, part in rows.items()}
    described = {"kind": KIND, "base_sha256": checkpoints.base_sha256(teacher), **about}
    return checkpoints.save(teacher, scaled, described, _weights(teacher).parent)


def with_public_rows(adapter: Adapter, rows: Mapping[str, Tensor]) -> Adapter:
    """``adapter`` with the first of ``rows`` in place of every A.

    Raises ``ArtefactError`` naming each layer for which there are too few.
    """
    tensors, faults = dict(adapter.tensors), []
    for layer in adapter.layers():
        name = f"{layer}.lora_A"
        found = rows.get(layer, tensors[name][:0])
        if found[: adapter.rank].shape != tensors[name].shape:
            faults.append(f"{layer} has {len(found)} public rows, and rank {adapter.rank} is asked for")
        else:
            tensors[name] = found[: adapter.rank].clone()
    if faults:
        raise ArtefactError("the public factors do not serve this adapter: lower teacher.rank", faults)
    return replace(adapter, tensors=tensors)


def _weights(teacher: str) -> Path:
    return checkpoints.folder_of(teacher) / FOLDER / f"{teacher}.safetensors"
