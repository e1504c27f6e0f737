"""Image encoders behind one interface (`base.Backbone`), one file and one line in `FAMILIES` a family."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from common.backbones.base import Backbone
from common.errors import ArtefactError

# family -> the module that knows it; imported at its first use, so that nobody pays for the others.
FAMILIES = {"sam": "common.backbones.sam"}


def build_backbone(family: str, config: Mapping[str, Any]) -> Backbone:
    """A network of ``family`` with random weights; ``config`` is what its transformers config class takes."""
    if family not in FAMILIES:
        raise ArtefactError(f"there is no encoder family {family!r}; there are: {', '.join(FAMILIES)}")
    built: Backbone = importlib.import_module(FAMILIES[family]).build(config)
    return built
