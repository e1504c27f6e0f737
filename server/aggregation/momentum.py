"""The server's momentum: a tensor moves by the running mean of the rounds' mean steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from common.errors import ArtefactError

ROUNDS = "rounds"
VELOCITY = "velocity/"


class Momentum:
    """Without its bias towards zero, as in Adam's first moment (Kingma and Ba 2015, algorithm 1)::

        v <- b v + (1 - b) step        move = v / (1 - b^t) in round t

    With b = 0 the move is the step and there is no state. A fixed schedule: it looks at no value.
    """

    def __init__(self, factor: float = 0.0) -> None:
        self.factor = factor
        self._rounds = 0
        self._velocity: dict[str, Tensor] = {}

    def next_round(self) -> Momentum:
        """What it is in the next round, in which every tensor moves once; itself stays as it was."""
        after = Momentum(self.factor)
        after._rounds, after._velocity = self._rounds + 1, dict(self._velocity)
        return after

    def move(self, name: str, step: Tensor) -> Tensor:
        """By how much ``name`` moves, whose mean step (float64) is ``step``; once a round."""
        if not self.factor:
            return step
        before = self._velocity.get(name, torch.zeros_like(step))
        self._velocity[name] = before.lerp(step, 1 - self.factor)
        return self._velocity[name] / (1 - self.factor**self._rounds)

    def state(self) -> dict[str, Tensor]:
        if not self.factor:
            return {}
        velocity = {f"{VELOCITY}{name}": tensor.clone() for name, tensor in self._velocity.items()}
        return {ROUNDS: torch.tensor(self._rounds), **velocity}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Raises ``ArtefactError`` if only one of the two, the saved run and this one, has momentum."""
        if (ROUNDS in state) != bool(self.factor):
            raise ArtefactError("the state is of a run with another momentum: set privacy.momentum as it was")
        self._rounds = int(state.get(ROUNDS, torch.tensor(0)))
        self._velocity = {
            name.removeprefix(VELOCITY): tensor for name, tensor in state.items() if name != ROUNDS
        }
