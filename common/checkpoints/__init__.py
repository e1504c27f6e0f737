"""Model weights by name, each a safetensors file with a model card and a digest.

Those in this folder ship with Wardround; they were trained on procedural images alone (``python -m
simulations.pretrain`` makes them again). Teachers that a user imported (`common.foundation`), and generators
in the latent space of a user's own autoencoder, are found in the folders of ``WARDROUND_TEACHERS`` and in
``~/.wardround/teachers``, in that order; a shipped name always means the shipped model. A card is
``NAME.json`` beside ``NAME.safetensors``; loading refuses weights whose digest is not the card's.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from common.canonical import sha256_of_file
from common.durable import disk_fault, write_atomic
from common.errors import ArtefactError

SHIPPED = "WARDROUND_SHIPPED_MODELS"  # where they lie, told to code without them: a bundle carries none
VARIABLE = "WARDROUND_TEACHERS"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")  # a file's name on every system, and never a path


def _folder() -> Path:
    """That of this file; of a run's bundle, which has no weights, that of the coordinator's installation."""
    own, told = Path(__file__).parent, os.environ.get(SHIPPED)
    return own if told is None or any(own.glob("*.safetensors")) else Path(told)


FOLDER = _folder()


@dataclass(frozen=True)
class FoundModel:
    """A model's card as it was read, its weights not yet checked.

    ``hidden_by``: the folder of an earlier model of this name, which is the one in use; None for that one.
    """

    card: dict[str, Any]
    folder: Path
    hidden_by: Path | None


def names() -> list[str]:
    """The models that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def teacher_folders() -> list[Path]:
    """Where imported teachers are looked for, the first hit counts."""
    given = [Path(entry).expanduser() for entry in os.environ.get(VARIABLE, "").split(os.pathsep) if entry]
    return [*given, Path("~/.wardround/teachers").expanduser()]


def found_models(kind: str = "teacher") -> list[FoundModel]:
    """Every model of ``kind`` that ships or was brought, the shipped ones first; reads cards alone.

    A file in a teachers' folder that is no card of the kind is passed over.
    """
    found: list[FoundModel] = []
    first: dict[str, Path] = {}
    for folder in dict.fromkeys([FOLDER, *teacher_folders()]):
        for path in sorted(folder.glob("*.json"), key=lambda path: path.stem):
            about = _card_of(kind, path)
            if about is not None:
                found.append(FoundModel(about, folder, first.get(path.stem)))
                first.setdefault(path.stem, folder)
    return found


def _card_of(kind: str, path: Path) -> dict[str, Any] | None:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    complete = isinstance(about, dict) and about.get("kind") == kind and about.get("name") == path.stem
    return about if complete and path.with_suffix(".safetensors").is_file() else None


def imported_names(kind: str = "teacher") -> list[str]:
    """Names of the models of ``kind`` that were brought and that no shipped model hides."""
    return sorted(
        {str(entry.card["name"]) for entry in found_models(kind) if entry.folder != FOLDER} - set(names())
    )


def folder_of(name: str) -> Path:
    """Where the model lies. Raises ``ArtefactError`` for an unknown name."""
    for folder in [FOLDER, *teacher_folders()] if NAME.fullmatch(name) else []:
        if all((folder / f"{name}.{suffix}").exists() for suffix in ("json", "safetensors")):
            return folder
    imported = ", ".join(imported_names()) or "none"
    raise ArtefactError(
        f"no shipped model {name!r}; there are: {', '.join(names()) or 'none'}. Imported teachers: "
        f"{imported}. Import it with `wardround teacher import`, or set {VARIABLE} to the folder that has it"
    )


@lru_cache(maxsize=16)
def card(name: str) -> dict[str, Any]:
    """The model card. Raises ``ArtefactError`` for an unknown name or weights that are not the card's."""
    folder = folder_of(name)
    weights = folder / f"{name}.safetensors"
    try:
        found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
        expected = str(found["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{folder / name}.json is no model card; {_restore(folder, weights)}") from error
    digest = sha256_of_file(weights)
    if digest != expected:
        raise ArtefactError(
            f"the weights of {name} are not those of its card (sha256 {digest[:12]} instead of "
            f"{expected[:12]}): {_restore(folder, weights)}"
        )
    return found


def _restore(folder: Path, weights: Path) -> str:
    if folder == FOLDER:
        return f"restore {weights} from the repository"
    return "import it again with --replace"


def base_sha256(name: str) -> str:
    """Digest of the model's weights, checked against the file."""
    return str(card(name)["sha256"])


def load_tensors(name: str) -> dict[str, Any]:
    """Name -> float32 tensor of the model's weights."""
    from safetensors.torch import load_file

    card(name)
    weights = folder_of(name) / f"{name}.safetensors"
    return {key: value.float() for key, value in load_file(weights).items()}


def save(
    name: str, tensors: dict[str, Any], about: dict[str, Any], folder: Path | None = None
) -> dict[str, Any]:
    """Write weights and card into ``folder``, the shipped one by default; return the card.

    ``about`` is the card without its digest. Neither file is ever half written: the weights come first, and a
    card that is not theirs is refused by `card`.

    Raises ``ArtefactError`` if the disk does not take them.
    """
    from safetensors.torch import save_file

    path = (folder or FOLDER) / f"{name}.safetensors"
    temporary = path.with_name(f".{path.name}.part")
    ready = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(ready, temporary)
        temporary.chmod(0o644)  # safetensors writes it for its owner alone
        temporary.replace(path)
    except OSError as error:
        raise disk_fault(path.parent, error, sum(value.nbytes for value in ready.values())) from error
    finally:
        temporary.unlink(missing_ok=True)
    body = {"name": name, **about, "sha256": sha256_of_file(path), "bytes": path.stat().st_size}
    write_atomic(path.with_suffix(".json"), (json.dumps(body, indent=2) + "\n").encode())
    card.cache_clear()
    return body
