"""What many tests share: the smoke recipe, its plan, and small patients."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings

from client.patients import Patient, Sample, Split
from common import checkpoints
from common.config import load_recipe
from common.plan import RunPlan
from common.recipe import Recipe

torch.set_num_threads(1)
settings.register_profile("wardround", deadline=None)  # a busy machine is no fault
settings.load_profile("wardround")


@pytest.fixture(scope="session")
def smoke_recipe() -> Recipe:
    return load_recipe("smoke")


@pytest.fixture(scope="session")
def smoke_plan(smoke_recipe: Recipe) -> RunPlan:
    from server.planning import build_plan

    return build_plan(smoke_recipe, "test-run")


@pytest.fixture
def patients() -> list[Patient]:
    """Six labelled training patients of two images: a bright square on grey noise."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(6):
        samples = []
        for _ in range(2):
            image = torch.from_numpy(rng.uniform(0.2, 0.4, (3, 64, 64)).astype(np.float32))
            mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
            top, left = rng.integers(4, 40, 2)
            mask[0, top : top + 14, left : left + 14] = 1
            image[:, mask[0] > 0] += 0.5
            samples.append(Sample(image, mask, torch.ones(64, 64, dtype=torch.bool)))
        found.append(Patient(f"patient-{number}", Split.train, tuple(samples)))
    return found


@pytest.fixture
def teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder into which teachers are imported, and where they are looked for."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(checkpoints.VARIABLE, str(tmp_path / "teachers"))
    checkpoints.card.cache_clear()
    yield tmp_path / "teachers"
    checkpoints.card.cache_clear()


@pytest.fixture
def small_sam(monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalogue whose only SAM models are the small one and the small MedSAM."""
    from common.foundation import importing
    from common.foundation.catalogue import CATALOGUE
    from tests.foundation_checkpoints import SAM_USUAL, SIDE

    changed = {}
    for name in ("sam-vit-b", "medsam-vit-b"):
        fields = {**vars(CATALOGUE[name]), "config": SAM_USUAL, "image_size": SIDE}
        changed[name] = type(CATALOGUE[name])(**fields)
    monkeypatch.setattr(importing, "CATALOGUE", changed)
