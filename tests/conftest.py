"""What many tests share: the smoke recipe, its plan, and small patients."""

from __future__ import annotations

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch

from client.patients import Patient, Sample, Split
from common.config import load_recipe
from common.plan import RunPlan
from common.recipe import Recipe

torch.set_num_threads(1)


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
