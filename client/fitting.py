"""The one training loop of a site: adapters, the generator's adapter and students all go through `fit`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from client.deadline import Deadline
from common.errors import DataError


@dataclass(frozen=True)
class Schedule:
    """Learning rate over a training of ``steps`` steps that is the part from ``first`` of ``total`` steps.

    A cosine from ``learning_rate`` to a tenth of it over the whole, so that late rounds settle;
    a linear warm-up over ``warm_up`` steps of each part, because the optimiser starts afresh.
    """

    learning_rate: float
    steps: int
    first: int = 0
    total: int = 0
    warm_up: int = 5

    def rate(self, step: int) -> float:
        whole = max(self.total or self.steps, 1)
        share = 0.1 + 0.45 * (1 + math.cos(math.pi * (self.first + step) / whole))
        return self.learning_rate * share * min(1.0, (step + 1) / self.warm_up)


def fit(
    parameters: Sequence[nn.Parameter],
    schedule: Schedule,
    loss_at: Callable[[], Tensor],
    deadline: Deadline,
    doing: str,
) -> list[float]:
    """AdamW with clipped gradients; returns the loss of each step.

    Args:
        loss_at: draws a batch and returns its loss.
        doing: what the deadline's error says was going on.

    Raises:
        DataError: a loss is not finite.
        DeadlinePassed: between two steps.
    """
    optimiser = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=0.01)
    losses: list[float] = []
    for step in range(schedule.steps):
        deadline.check(doing)
        optimiser.param_groups[0]["lr"] = schedule.rate(step)
        loss = loss_at()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        losses.append(loss.item())
    if not all(math.isfinite(loss) for loss in losses):
        raise DataError(f"the loss is not finite while {doing}: lower the learning rate or check the images")
    return losses


def ends(losses: Sequence[float]) -> tuple[float, float]:
    """Mean of the first and of the last tenth."""
    tenth = max(1, len(losses) // 10)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
