"""What every pre-training on procedural scenes shares: the scenes as tensors, the loop, the card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from client.style import style_vector
from common import checkpoints, progress
from common.seeding import derive_seed
from simulations.scenes import KINDS, scene_bank
from simulations.tissues import tissue_bank

SIZE = 96
REAL_LOOKING = "procedural scenes only (simulations/scenes.py, simulations/tissues.py); no real image"
LICENCE = "Apache-2.0"


@dataclass(frozen=True)
class Bank:
    """Scenes as tensors: ``images`` (N, 3, S, S) uint8, ``targets`` (N, 5, S, S) bool, ``kinds`` (N,)."""

    images: Tensor
    targets: Tensor
    kinds: np.ndarray

    @classmethod
    def make(
        cls, seed: int, count: int, distractors: float = 0.3, tissues: int = 0, size: int = SIZE
    ) -> Bank:
        """``count`` plain scenes, and ``tissues`` of those closer to cameras and microscopes."""
        images, targets, kinds = scene_bank(seed, count, size, distractors)
        if tissues:
            more = tissue_bank(derive_seed(seed, "tissues"), tissues, size)
            images, targets = np.concatenate([images, more[0]]), np.concatenate([targets, more[1]])
            kinds = np.concatenate([kinds, more[2]])
        return cls(torch.from_numpy(images), torch.from_numpy(targets), kinds)

    def draw(
        self, rng: np.random.Generator, size: int, shares: tuple[float, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A batch with kinds in ``shares``, under a random symmetry, channel order and gamma."""
        wanted = rng.choice(len(KINDS), size, p=np.array(shares) / sum(shares))
        index = torch.tensor([int(rng.choice(np.flatnonzero(self.kinds == kind))) for kind in wanted])
        image, target = turned(self.images[index].float() / 255, self.targets[index].float(), rng)
        return image, target, torch.from_numpy(wanted)


def turned(image: Tensor, target: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A batch (B, 3, S, S) with its targets, under one random symmetry, channel order and gamma."""
    if rng.random() < 0.5:
        image, target = image.transpose(2, 3), target.transpose(2, 3)
    flips = [axis for axis in (2, 3) if rng.random() < 0.5]
    image, target = image.flip(flips), target.flip(flips)
    image = image[:, torch.from_numpy(rng.permutation(3))]
    image = image ** float(np.exp(rng.normal(0, 0.15)))
    return image.contiguous(), target.contiguous()


def dim(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Half of the batches without their stretch: a tile of a large image spans no full range."""
    if rng.random() < 0.5:
        return image
    low = torch.from_numpy(rng.uniform(0, 0.3, (len(image), 3, 1, 1))).float()
    high = torch.from_numpy(rng.uniform(0.45, 1, (len(image), 3, 1, 1))).float()
    return low + (high - low) * image


@dataclass(frozen=True)
class Styled:
    """Scenes that have a style: ``images`` (N, 3, S, S), ``masks`` (N, 1, S, S), ``styles`` (N, 14)."""

    images: Tensor
    masks: Tensor
    styles: Tensor

    @classmethod
    def of(cls, image: Tensor, target: Tensor, kinds: Tensor) -> Styled | None:
        """Of the batch those that show both foreground and background; None: none does."""
        found = []
        for one, planes, kind in zip(image, target, kinds.tolist(), strict=True):
            style = style_vector(one, planes[kind], torch.ones(one.shape[1:], dtype=torch.bool))
            if style is not None:
                found.append((one, planes[kind][None], torch.from_numpy(style).float()))
        return cls(*(torch.stack(part) for part in zip(*found, strict=True))) if found else None


def fit(
    network: nn.Module,
    steps: int,
    rates: dict[str, float],
    loss_at: Callable[[int], Tensor],
    every: int = 100,
    kept: Path | None = None,
) -> list[float]:
    """AdamW with warm-up and a cosine; ``loss_at(step)`` builds the loss. Returns smoothed losses.

    Args:
        rates: beginning of a parameter's name -> learning rate; each trained parameter has exactly one.
        kept: where the training is written down every so many steps, and taken up again. It ends as one
            without a break does if ``loss_at`` depends on the step and the network alone.
    """
    named = dict(network.named_parameters())
    groups = [
        {"params": [p for name, p in named.items() if name.startswith(start)], "lr": rate}
        for start, rate in rates.items()
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(  # plain floats: numpy's would not be read back
        optimiser,
        lambda step: float(min(1.0, (step + 1) / 60) * (0.5 * (1 + np.cos(np.pi * step / steps)) + 0.01)),
    )
    training = _Training(network, optimiser, schedule)
    first, losses = training.load(kept)
    recent: list[float] = []
    progress.stage(type(network).__name__, steps // every)
    for step in range(first, steps):
        loss = loss_at(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        recent.append(loss.item())
        if (step + 1) % every == 0:
            losses.append(float(np.mean(recent)))
            recent.clear()
            training.save(kept, step + 1, losses)
            progress.step(f"step {step + 1}: loss {losses[-1]:.4f}")
    progress.end()
    return losses


@dataclass(frozen=True)
class _Training:
    """What a training needs to be taken up again."""

    network: nn.Module
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler

    def load(self, file: Path | None) -> tuple[int, list[float]]:
        """The step to go on with, and the losses so far."""
        if file is None or not file.exists():
            return 0, []
        state: dict[str, Any] = torch.load(file, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        return state["step"], state["losses"]

    def save(self, file: Path | None, step: int, losses: list[float]) -> None:
        if file is None:
            return
        parts = {name: getattr(self, name).state_dict() for name in ("network", "optimiser", "schedule")}
        write_down({"step": step, "losses": losses, **parts}, file)


def write_down(state: dict[str, Any], file: Path) -> None:
    """Save with torch, never by half."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.part")
    torch.save(state, temporary)
    temporary.replace(file)


def ship(
    name: str, network: nn.Module, made: tuple[str, int, int], more: dict[str, object],
    folder: Path | None = None,
) -> None:  # fmt: skip
    """Write weights and card as ``name``, into ``folder`` or among those that ship.

    Args:
        made: what `simulations.pretrain` is asked for to make them; seed; steps.
        more: of the card, its kind among it.
    """
    maker, seed, steps = made
    about = {
        "kind": more["kind"],
        "params": sum(parameter.numel() for parameter in network.parameters()),
        "image_size": SIZE,
        "seed": seed,
        "steps": steps,
        "trained_on": "procedural scenes only (simulations/scenes.py); no real image",
        "licence": LICENCE,
        "reproduce": f"python -m simulations.pretrain {maker} --seed {seed} --steps {steps}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "intended_use": "a starting point for training; not a medical device and not useful as it is",
        **more,
    }
    checkpoints.save(name, network.state_dict(), about, folder)
