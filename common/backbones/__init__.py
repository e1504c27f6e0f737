"""Image encoders behind one interface (`base.Backbone`), one file and one line in `FAMILIES` a family."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from common.backbones.base import Backbone
from common.errors import ArtefactError

# family -> the module that knows it and what builds it there; imported at its first use, so that nobody
# pays for the others.
FAMILIES = {
    "sam": ("common.backbones.sam", "build"),
    "sam2": ("common.backbones.sam2", "build"),
    "dinov2": ("common.backbones.dino", "build_dinov2"),
    "dinov2_registers": ("common.backbones.dino", "build_dinov2_registers"),
    "dinov3": ("common.backbones.dino", "build_dinov3"),
}


def build_backbone(family: str, config: Mapping[str, Any]) -> Backbone:
    """A network of ``family`` with random weights; ``config`` is what its transformers config class takes."""
    if family not in FAMILIES:
        raise ArtefactError(f"there is no encoder family {family!r}; there are: {', '.join(FAMILIES)}")
    module, builder = FAMILIES[family]
    built: Backbone = getattr(importlib.import_module(module), builder)(config)
    return built
