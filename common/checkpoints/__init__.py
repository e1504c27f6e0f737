"""Initial weights that ship with Wardround, each a safetensors file with a model card and a digest.

All were trained on procedural images alone (``python -m simulations.pretrain`` makes them again). A card
is ``NAME.json`` beside ``NAME.safetensors``; loading refuses weights whose digest is not the card's.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from common.canonical import sha256_of_file
from common.errors import ArtefactError

FOLDER = Path(__file__).parent


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


@lru_cache(maxsize=16)
def card(name: str) -> dict[str, Any]:
    """The model card. Raises ``ArtefactError`` for an unknown name or weights that are not the card's."""
    path = FOLDER / f"{name}.json"
    weights = path.with_suffix(".safetensors")
    if not path.exists() or not weights.exists():
        raise ArtefactError(f"no shipped model {name!r}; there are: {', '.join(names()) or 'none'}")
    found: dict[str, Any] = json.loads(path.read_text())
    digest = sha256_of_file(weights)
    if digest != found["sha256"]:
        raise ArtefactError(
            f"the weights of {name} are not those of its card (sha256 {digest[:12]} instead of "
            f"{found['sha256'][:12]}): restore {weights} from the repository"
        )
    return found


def base_sha256(name: str) -> str:
    """Digest of the shipped weights, checked against the file."""
    return str(card(name)["sha256"])


def load_tensors(name: str) -> dict[str, Any]:
    """Name -> float32 tensor of the shipped weights."""
    from safetensors.torch import load_file

    card(name)
    return {key: value.float() for key, value in load_file(FOLDER / f"{name}.safetensors").items()}


def save(name: str, tensors: dict[str, Any], about: dict[str, Any]) -> None:
    """Write weights and card; ``about`` is the card without its digest."""
    from safetensors.torch import save_file

    path = FOLDER / f"{name}.safetensors"
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, path)
    body = {"name": name, **about, "sha256": sha256_of_file(path), "bytes": path.stat().st_size}
    path.with_suffix(".json").write_text(json.dumps(body, indent=2) + "\n")
