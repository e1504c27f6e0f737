"""A student in any of its formats, ready to run: prediction and evaluation treat them alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from client.export.model_card import CARD_JSON
from client.export.onnx_file import load_onnx
from client.export.torchscript import load_torchscript
from client.students import LoadedStudent, load_student
from common.canonical import sha256_of_file
from common.errors import ArtefactError

BUNDLED = Path("models/model.ts")  # in a MONAI bundle
LOADERS: dict[str, Callable[[Path], LoadedStudent]] = {
    ".safetensors": load_student,
    ".onnx": load_onnx,
    ".ts": load_torchscript,
}


def load_runnable(path: Path) -> LoadedStudent:
    """The weights of a student (.safetensors), or an export of one: .onnx, .ts, or the folder of a bundle.

    A bundle's configuration is never evaluated: it may hold any code.
    Raises `ArtefactError` if it is missing, of another kind, or not the file that its model card lists.
    """
    file = path / BUNDLED if path.is_dir() else path
    if file.suffix not in LOADERS:
        raise ArtefactError(
            f"{path} is no student: give a file ending in {', '.join(LOADERS)} or the folder of a bundle"
        )
    if file.suffix != ".safetensors":
        if not file.is_file():
            raise ArtefactError(f"{file} is missing: correct the path, or export the student again")
        _check_listed(file, path if path.is_dir() else path.parent)
    return LOADERS[file.suffix](file)


def _check_listed(file: Path, folder: Path) -> None:
    card = folder / CARD_JSON
    if not card.is_file():
        return
    try:
        listed = {entry["file"]: entry["sha256"] for entry in json.loads(card.read_text())["exports"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{card} is no model card of this version: export the student again") from error
    expected = listed.get(file.relative_to(folder).as_posix())
    if expected is not None and expected != sha256_of_file(file):
        raise ArtefactError(f"{file} is not the file that {card.name} lists (sha256 differs)")
