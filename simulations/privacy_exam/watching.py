"""A private run that is watched: every byte of its messages, and what the sites computed behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

import client.distillation as distillation
import client.dp.clipping as clipping
from client.app import app as courier
from client.dp.mechanism import ClippedSum, PrivateGradient
from client.dp.randomness import Randomness
from client.dp.tasks import SegmentationTask
from client.evaluation import evaluate_patients
from client.measuring import opened_models
from client.patients import Patient, Split, of_split
from client.site import Site
from common import wire
from common.adapter import Adapter
from common.config import save_run_config
from common.plan import RunPlan
from common.recipe import Recipe
from server.phases import TEACHER_FILE
from simulations.loopback import LoopbackGrid, drive
from simulations.simulate import prepare_sites

FEW = 8  # neighbouring numbers of a tensor that are looked for together
PERSON = "MRN-88417"  # every patient's id begins so


class RecordingGrid(LoopbackGrid):
    """Keeps the bytes of every message: what a wire tap at the server would hold."""

    def __init__(self, nodes: int) -> None:
        super().__init__(courier, nodes)
        self.down: list[bytes] = []
        self.up: list[bytes] = []

    def push_messages(self, messages: Iterable[wire.Message]) -> list[str]:
        sent = list(messages)
        numbers = super().push_messages(sent)
        self.down += [wire.pack_message(message) for message in sent]
        self.up += [self._replies[number] for number in numbers]
        return numbers


REHEARSED = {"weight"}  # what a step of the rehearsal before a run is of: made up, and sent nowhere


@dataclass
class Inside:
    """What stays at the sites of a run, as the code had it in its hands.

    Attributes:
        losses, dice, norms: numbers of single patients or images, and the student's losses.
        keys: of the keystreams that noise and draws came from.
        rows: neighbouring numbers of sums before noise, of noise, optimisers and students.
        made: what the mechanism returned, a step each, in the order in which it was sent.
    """

    losses: list[float] = field(default_factory=list)
    dice: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    made: list[dict[str, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class Watched:
    """A run that has ended: its folder, its plan, its sites by node, its messages and its insides."""

    folder: Path
    plan: RunPlan
    sites: list[Site]
    grid: RecordingGrid
    inside: Inside

    def patients(self, site: Site) -> list[Patient]:
        return site.patients(self.plan.data, self.plan.seed)


def watched_run(recipe: Recipe, folder: Path) -> Watched:
    """Run ``recipe``, whose sites are phantoms with patients' ids that can be told from anything else."""
    run, sites = folder / "run", folder / "sites"
    names = prepare_sites(recipe, sites)
    for name in names:
        manifest = sites / name / "data" / "manifest.csv"
        manifest.write_text(manifest.read_text().replace(",p0", f",{PERSON}-0"))
    save_run_config(recipe, run / "config.yaml")
    grid, inside = RecordingGrid(len(names)), Inside()
    with watching(inside):
        drive(grid, run, sites)
    opened = [Site.open(sites / name) for name in names]
    plan = RunPlan.from_json((opened[0].folder / "plan.json").read_text())
    watched = Watched(run, plan, opened, grid, inside)
    for site in opened:
        _measure(watched, site)
    return watched


def _measure(watched: Watched, site: Site) -> None:
    """Dice of teacher and student on every test patient, and the student's weights."""
    adapter, test = Adapter.load(watched.folder / TEACHER_FILE), of_split(watched.patients(site), Split.test)
    with opened_models(site, watched.plan, adapter) as models:
        for ready in models.values():
            values = evaluate_patients(ready(), test, watched.plan.data, watched.plan.evaluation)["dice"]
            for column in values.values():
                watched.inside.dice += [float(column.mean()), *column.tolist()]
    weights = load_file(site.folder / "student.safetensors")
    watched.inside.rows += [row for part in weights.values() if (row := _row(part)) is not None]


@contextmanager
def watching(inside: Inside) -> Iterator[None]:
    """While it lasts, what the sites of this process compute is also written to ``inside``."""

    def note(owner: Any, name: str, keep: Callable[..., None], before: bool = False) -> None:
        whole = getattr(owner, name)

        def noted(*given: Any, **named: Any) -> Any:
            if before:
                keep(*given)
            found = whole(*given, **named)
            if not before:
                keep(found)
            return found

        stack.enter_context(patch.object(owner, name, noted))

    def keep_step(found: dict[str, Tensor]) -> None:
        if found.keys() != REHEARSED:
            inside.made.append(found)

    def keep_rows(*tensors: Tensor) -> None:
        inside.rows += [row for tensor in tensors if (row := _row(tensor)) is not None]

    def keep_state(optimiser: torch.optim.Optimizer, *_: Any) -> None:
        states = [part for state in optimiser.state.values() for part in state.values()]
        keep_rows(*(part for part in states[:FEW] if part.numel() >= FEW))

    with ExitStack() as stack:
        note(SegmentationTask, "forward", lambda found: inside.losses.extend(found.detach().tolist()))
        note(distillation, "fit", inside.losses.extend)
        note(clipping, "clip_factors", lambda found: inside.norms.extend(found.tolist()))
        note(Randomness, "__init__", lambda _, key: inside.keys.append(key), before=True)
        note(Randomness, "normals", keep_rows)
        note(ClippedSum, "__call__", keep_rows)
        note(PrivateGradient, "step", keep_step)
        hook = register_optimizer_step_post_hook(keep_state)
        stack.callback(hook.remove)
        yield


def _row(tensor: Tensor) -> Tensor | None:
    """The first `FEW` neighbours none of which is zero; None: there are none."""
    flat = tensor.detach().flatten()
    flat = flat[: len(flat) // FEW * FEW].reshape(-1, FEW)
    whole = flat[(flat != 0).all(1)]
    return whole[0].clone() if len(whole) else None


def crowd(recipe: Recipe, train: int, declared: int) -> Recipe:
    """``recipe`` with ``train`` training patients a site, of which it declares ``declared``."""
    sites = []
    for site in recipe.sites:
        assert site.phantom is not None
        sites.append(replace(site, phantom=replace(site.phantom, train_patients=train), patients=declared))
    return replace(recipe, sites=sites)
