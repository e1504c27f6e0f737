"""Learning from images by telling two views of one image from views of others: MoCo v3 (Chen et al. 2021).

The paper's batch is 4096 views and its encoders have batch norms in their heads. A hospital's processor
holds 24: a view is told from 23 others, most of which are easy, so what is learned is coarser, and the
paper's own figures fall with the batch. A batch of one site may hold two crops of one patient; they are no
opposites and are left out of each other's negatives. LayerNorm stands for the heads' batch norm, whose
statistics over so few images are noise.

Only what comes before ``StudentOutput.deep`` is trained: the way up to the mask keeps its random weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from client.selfsupervision.views import view
from client.students import Student

TEMPERATURE = 0.2
MOMENTUM = 0.99  # of the second encoder at the first step; 1 at the last, by half a cosine
HIDDEN, OUT = 256, 128


def contrast(queries: Tensor, keys: Tensor, alike: Tensor) -> Tensor:
    """InfoNCE (van den Oord et al. 2018), in MoCo v3's scale, of queries and keys (B, D), row by row.

    Args:
        alike: (B, B) bool, pairs that are no negatives of each other; the diagonal is the positives'.
    """
    scores = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / TEMPERATURE
    others = alike & ~torch.eye(len(alike), dtype=torch.bool)
    scores = scores.masked_fill(others, -math.inf)
    return 2 * TEMPERATURE * F.cross_entropy(scores, torch.arange(len(scores)))


def _perceptron(inside: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inside, HIDDEN), nn.LayerNorm(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUT))


class _Encoder(nn.Module):
    """Image -> (B, 128): the mean of the student's deep features, projected."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student
        self.project = _perceptron(student.deep_channels)

    def forward(self, image: Tensor) -> Tensor:
        told: Tensor = self.project(self.student.encode(image).mean((2, 3)))
        return told


class MomentumContrast(nn.Module):
    """The student's encoder with projector and predictor, and the slow copy that makes the keys."""

    def __init__(self, student: Student, seed: int, steps: int) -> None:
        super().__init__()
        self.quick = _Encoder(student)
        self.predict = _perceptron(OUT)
        self.slow = deepcopy(self.quick).requires_grad_(False)
        self.steps, self.step = steps, 0
        self.rng = np.random.default_rng(seed)

    def trained(self) -> list[nn.Parameter]:
        return [*self.quick.parameters(), *self.predict.parameters()]

    def finish(self) -> None:
        """Nothing of the student was lent."""

    def loss(self, images: Tensor, patients: Sequence[int]) -> Tensor:
        """Both views as queries, once each; ``patients`` says whose the images are."""
        if self.step:
            self.follow()
        self.step += 1
        first, second = view(images, self.rng), view(images, self.rng)
        with torch.no_grad():
            keys = [self.slow(seen) for seen in (first, second)]
        whose = torch.tensor(patients)
        alike = whose[:, None] == whose[None]
        queries = [self.predict(self.quick(seen)) for seen in (first, second)]
        return contrast(queries[0], keys[1], alike) + contrast(queries[1], keys[0], alike)

    @torch.no_grad()
    def follow(self) -> None:
        """One step of the slow encoder towards the quick one."""
        momentum = 1 - (1 - MOMENTUM) * (1 + math.cos(math.pi * self.step / self.steps)) / 2
        for mine, other in zip(self.slow.parameters(), self.quick.parameters(), strict=True):
            mine.lerp_(other, 1 - momentum)
