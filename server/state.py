"""The run's checkpoint: one file, replaced whole after every round and phase.

A crash at any point leaves the state after the last finished round; from it a run ends with the same
weights as one that was never stopped. A state is only ever continued with the plan that made it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from common.changes import changes
from common.durable import write_atomic
from common.errors import ArtefactError
from common.plan import RunPlan
from server.outcome import RunOutcome

CHECKPOINT = "checkpoint.safetensors"
SHOWN_DIFFERENCES = 8


@dataclass(frozen=True)
class Checkpoint:
    """The plan, what came of it so far, and each rule's tensors (``teacher/...``, ``generator/...``)."""

    plan: RunPlan
    outcome: RunOutcome
    tensors: Mapping[str, Tensor]

    def rule_state(self, rule: str) -> dict[str, Tensor]:
        """The tensors of one rule, empty if it had not started."""
        prefix = f"{rule}/"
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }


class StateStore:
    """The checkpoint in ``folder`` (``RUN/state``)."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / CHECKPOINT

    def save(self, checkpoint: Checkpoint) -> None:
        """Raises ``ArtefactError`` if the disk is full; the state before is then still there."""
        texts = {"plan": checkpoint.plan.to_json(), "outcome": checkpoint.outcome.to_json()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
        write_atomic(self.path, save(tensors, metadata=texts))

    def load(self) -> Checkpoint | None:
        """None where no round was finished yet. Raises ``ArtefactError`` for a file that is no state."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                texts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            plan, outcome = RunPlan.from_json(texts["plan"]), RunOutcome.from_json(texts["outcome"])
        except (OSError, SafetensorError, KeyError, ArtefactError) as error:
            raise ArtefactError(
                f"{self.path} is no state of this version: remove the folder {self.path.parent} to start "
                "the run from its beginning"
            ) from error
        return Checkpoint(plan, outcome, tensors)

    def load_for(self, plan: RunPlan) -> Checkpoint | None:
        """Like `load`, but raises ``ArtefactError`` for the state of another plan, naming the differences."""
        checkpoint = self.load()
        if checkpoint is None or checkpoint.plan.digest == plan.digest:
            return checkpoint
        raise ArtefactError(
            f"the state in {self.path.parent} belongs to another plan: undo these changes to resume it, "
            "or run into another folder",
            plan_changes(checkpoint.plan, plan, "in the state"),
        )


def plan_changes(old: RunPlan, new: RunPlan, where: str) -> list[str]:
    """The first differences in words: the value that ``old``, which lies ``where``, has, and the new one.

    What the rounds start from follows from the settings: it is named only where nothing else differs.
    """
    found = list(changes(*(json.loads(plan.to_json()) for plan in (old, new))))
    found = [one for one in found if not one[0].startswith("starts")] or found
    faults = [f"{key}: {_short(before)} {where}, {_short(now)} now" for key, before, now in found]
    if len(faults) > SHOWN_DIFFERENCES:
        faults = [*faults[:SHOWN_DIFFERENCES], f"and {len(faults) - SHOWN_DIFFERENCES} more"]
    return faults


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."
