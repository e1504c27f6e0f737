"""Where a checkpoint comes from: a folder, a file, or a repository of the Hugging Face hub.

Nothing in a checkpoint is run: pickles are read for tensors alone. Tensors stay in their file (memory-mapped)
until they are written, so that a large model is never held twice.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.canonical import sha256_of_file
from common.errors import ArtefactError, UsageError
from common.foundation.catalogue import CATALOGUE, of_hub

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = (".safetensors", ".pth", ".pt", ".bin")
# What a folder may hold its weights in, in the order in which they are looked for.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_PICKLE_FAULT = (
    "holds objects other than tensors, or is damaged; nothing in it was run. Take a plain state dict"
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was found.

    Attributes:
        origin: what a card says of it: a hub id with its revision, or a file's or folder's name. No path:
            a card travels.
        tensors: name -> tensor, still in its file where the format allows.
        config: config.json; None if there is none.
        processor: preprocessor_config.json; None if there is none.
        files: name -> SHA-256 of every file that was read for tensors.
        hub_id: of the repository, None for local files.
    """

    origin: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None
    processor: Mapping[str, Any] | None
    files: Mapping[str, str]
    hub_id: str | None = None


def open_checkpoint(source: str, download: bool) -> Checkpoint:
    """The checkpoint at ``source``: a folder, a file, a hub id, or a name of the catalogue.

    Guarantees: nothing is downloaded unless ``download`` is True.

    Raises:
        ArtefactError: it is not there, not readable, or holds anything but tensors.
        UsageError: ``source`` is none of these.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(path, path.resolve().name)
    if path.is_file():
        return Checkpoint(path.name, _read(path), None, None, {path.name: sha256_of_file(path)})
    hub_id = hub_id_of(source)
    if hub_id is None:
        raise UsageError(
            f"there is no file or folder {source}; name one, a hub id such as facebook/dinov2-small, or one "
            f"of {', '.join(CATALOGUE)}"
        )
    folder = _hub_folder(hub_id, download)
    found = _from_folder(folder, f"{hub_id} at {folder.name}")
    return Checkpoint(found.origin, found.tensors, found.config, found.processor, found.files, hub_id)


def hub_id_of(source: str) -> str | None:
    """The hub's repository that ``source`` means; None if it is a local path or nothing at all."""
    if Path(source).expanduser().exists():
        return None
    if source in CATALOGUE:
        return CATALOGUE[source].hub_id
    is_id = _HUB_ID.fullmatch(source) and not source.startswith(".") and not source.endswith(_FILES)
    return source if is_id else None


def _hub_folder(hub_id: str, download: bool) -> Path:
    """The repository's files in the local cache, or fetched into it."""
    if download:
        os.environ["HF_HUB_OFFLINE"] = "0"  # the command line is offline by default; the user has asked
    import huggingface_hub

    text = ["config.json", "preprocessor_config.json", "*.index.json"]

    def fetch(weights: str) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id, allow_patterns=[*text, weights], local_files_only=not download
            )
        )

    try:
        folder = fetch("model*.safetensors")
        if not any((folder / name).exists() for name in _WEIGHTS):
            folder = fetch("pytorch_model*.bin")
    except Exception as error:  # httpx, the hub's own errors, and those of the disk
        if not download:
            raise ArtefactError(
                f"{hub_id} is neither a local file or folder nor in this machine's Hugging Face cache. Add "
                "--download to fetch it, or name the folder or file where you have it"
            ) from error
        terms = "" if of_hub(hub_id) is None else f". Its terms: https://huggingface.co/{hub_id}"
        raise ArtefactError(
            f"{hub_id} could not be fetched ({type(error).__name__}: {_first_line(error)}). Check the name "
            f"and the connection, and log in with `hf auth login` if the repository asks for it{terms}"
        ) from error
    return folder


def _from_folder(folder: Path, origin: str) -> Checkpoint:
    first = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        raise ArtefactError(
            f"{origin} holds no weights: there is none of {', '.join(_WEIGHTS)}. Name the folder that has "
            "one, or the weights' file itself"
        )
    files = _shards(first) if first.name.endswith(".index.json") else [first]
    tensors: dict[str, Tensor] = {}
    faults = []
    for file in files:
        part = _read(file)
        faults += [f"{key} is in {file.name} and in another file" for key in part if key in tensors]
        tensors |= part
    if faults:
        raise ArtefactError(f"{origin} names tensors twice; fetch it again", faults)
    digests = {file.name: sha256_of_file(file) for file in files}
    config, processor = (_json(folder / name) for name in ("config.json", "preprocessor_config.json"))
    return Checkpoint(origin, tensors, config, processor, digests)


def _shards(index: Path) -> list[Path]:
    """The files that an index names, which all lie beside it."""
    table = (_json(index) or {}).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise ArtefactError(f"{index.name} has no weight_map; fetch it again")
    names = sorted(set(table.values()))
    faults = [
        f"{name} is not there" if Path(name).name == name else f"{name} lies elsewhere"
        for name in names
        if Path(name).name != name or not (index.parent / name).is_file()
    ]
    if faults:
        raise ArtefactError(f"files that {index.name} names cannot be read; fetch them again", faults)
    return [index.parent / name for name in names]


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path.name} is not JSON ({_first_line(error)}); fetch it again") from error
    if not isinstance(found, dict):
        raise ArtefactError(f"{path.name} is no JSON object; fetch it again")
    return found


def _read(path: Path) -> dict[str, Tensor]:
    reader: Callable[[Path], Any] = _safetensors if path.suffix == ".safetensors" else _pickle
    found = reader(path)
    # Trainers wrap the state dict of their model in one of these.
    for wrapper in ("model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict) or not found:
        raise ArtefactError(f"{path.name} holds a {type(found).__name__}, not a state dict of tensors")
    strange = [
        f"{key}: {type(value).__name__}" for key, value in found.items() if not isinstance(value, Tensor)
    ]
    if strange:
        raise ArtefactError(
            f"{path.name} holds entries that are no tensors; take a plain state dict", strange
        )
    return {str(key): value for key, value in found.items()}


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtefactError(
            f"{path.name} is no safetensors file ({_first_line(error)}); fetch it again"
        ) from error


def _pickle(path: Path) -> Any:
    """What ``torch.save`` wrote, tensors and containers alone; the older format cannot be memory-mapped."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can raise anything
        raise ArtefactError(f"{path.name} {_PICKLE_FAULT} ({type(error).__name__})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
