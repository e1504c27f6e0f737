"""What every exported file carries inside itself: the student's card, so that the file alone can be run."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from client.students import StudentCard
from common.errors import ArtefactError
from common.plan import rebuild

KEY = "wardround"  # of the ONNX metadata
EXTRA_FILE = "wardround.json"  # in a TorchScript archive
SCHEMA = 1
INPUT, OUTPUT = "image", "logits"


def embed(card: StudentCard, kind: str) -> str:
    """``kind``: the format's name."""
    return json.dumps({"schema": SCHEMA, "format": kind, "card": asdict(card)}, sort_keys=True)


def unembed(text: str, name: str) -> StudentCard:
    """The card in the file called ``name``. Raises `ArtefactError` if there is none of this version."""
    try:
        found: dict[str, Any] = json.loads(text)
        if found["schema"] != SCHEMA:
            raise ValueError(f"schema {found['schema']!r}, this version reads {SCHEMA}")
        card: StudentCard = rebuild(StudentCard, found["card"])
    except (ValueError, TypeError, KeyError) as error:
        raise ArtefactError(
            f"{name} carries no student's card ({error}): export it with `wardround student export`"
        ) from error
    return card
