"""TorchScript: one file that runs in torch or libtorch without this package."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from client.export.embedded import EXTRA_FILE, embed, unembed
from client.export.probing import Fidelity, compare, probe_tiles, takes_other_sizes
from client.students import LoadedStudent
from common.errors import ArtefactError


def export_torchscript(student: LoadedStudent, path: Path) -> Fidelity:
    """Trace the student and write ``path``. Raises `ArtefactError` if its logits are not the student's."""
    tile = student.card.image_size
    with warnings.catch_warnings():
        # Traces are deprecated in torch, and constants in them are found by the comparison below.
        warnings.simplefilter("ignore")
        with torch.no_grad():
            traced: Any = torch.jit.trace(student.module.eval(), probe_tiles(2, tile, tile))
        torch.jit.save(traced, str(path), _extra_files={EXTRA_FILE: embed(student.card, "torchscript")})
    exported = load_torchscript(path).module
    if takes_other_sizes(student.module, tile):
        try:
            return compare(student.module, exported, tile, any_size=True)
        except (ArtefactError, RuntimeError):
            pass  # right at its own size or not at all
    return compare(student.module, exported, tile, any_size=False)


def load_torchscript(path: Path) -> LoadedStudent:
    """Raises `ArtefactError` if ``path`` cannot be loaded or carries no card."""
    extra = {EXTRA_FILE: ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch.jit is deprecated
            module: Any = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
    except (RuntimeError, ValueError, OSError) as error:
        raise ArtefactError(f"{path} is no TorchScript file that can be run") from error
    text = extra[EXTRA_FILE]
    card = unembed(text.decode() if isinstance(text, bytes) else text, path.name)
    return LoadedStudent(module.eval(), card)
