"""Synthetic images at the site: sampled in every site's style on procedural masks; they never leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from numpy.typing import NDArray
from torch import Tensor

from client.adaptation import Adaptation, Visit
from client.deadline import Deadline
from client.fitting import Schedule, ends, fit
from client.patients import Patient
from client.sampling import PatchSampler
from client.shapes import PRIORS
from client.style import sample_styles, style_vector
from common.adapter import Adapter
from common.errors import DataError
from common.generator import SCHEDULE, ResidentGenerator, StyleDiffusion, diffusion_loss, inverse_haar
from common.plan import RunPlan
from common.recipe import ClassConfig
from common.style import StyleSummary

BATCH = 16  # images sampled together
BANK = 6  # procedural masks drawn for each one used, so that the nearest in shape can be chosen

denoiser_calls = 0  # network evaluations times images since the process began: tests assert the bound


@dataclass(frozen=True)
class SyntheticSet:
    """``images`` (N, 3, S, S) in [0, 1] and their conditioning ``masks`` (N, C, S, S) in {0, 1}."""

    images: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.images)


def synthesise(
    generator: ResidentGenerator,
    adapter: Adapter,
    summaries: Sequence[StyleSummary],
    plan: RunPlan,
    seed: int,
) -> SyntheticSet:
    """``plan.generator.images`` images in the styles of ``summaries``, classes in turn.

    Guarantees: the masks come from the procedural prior (`client.shapes`), never from a patient; at most
    ``plan.generator.sampler_steps`` denoiser calls an image (DPM-Solver++, Lu et al. 2022).
    """
    count, size, classes = plan.generator.images, plan.data.image_size, plan.data.classes
    rng = np.random.default_rng(seed)
    styles = sample_styles(summaries, count, rng)
    planes = torch.zeros(count, len(classes), size, size)
    for index, item in enumerate(classes):
        mine = np.arange(index, count, len(classes))
        painted = torch.from_numpy(masks_for(styles[mine], item, size, rng)).float()
        # What is a part of another class (its label values are among the other's) is that class as well.
        holders = [place for place, other in enumerate(classes) if set(item.values) <= set(other.values)]
        planes[mine[:, None], holders] = painted[:, None]
    noise = torch.Generator().manual_seed(seed % 2**63)
    images = []
    with generator.visit(adapter) as network, torch.inference_mode():
        for start in range(0, count, BATCH):
            part = slice(start, start + BATCH)
            style = torch.from_numpy(styles[part]).float()
            images.append(_sample(network, planes[part].amax(1, keepdim=True), style, plan, noise))
    return SyntheticSet(torch.cat(images), planes)


def masks_for(
    styles: NDArray[np.float64], item: ClassConfig, size: int, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """For each style vector the procedural mask, of several drawn, nearest in its two shape numbers."""
    bank = [PRIORS[item.like](rng, size) for _ in range(min(BANK * len(styles), 600))]
    valid = torch.ones(size, size, dtype=torch.bool)
    blank = torch.zeros(3, size, size)
    shapes = [style_vector(blank, torch.from_numpy(mask), valid) for mask in bank]
    usable = [(mask, shape[12:]) for mask, shape in zip(bank, shapes, strict=True) if shape is not None]
    table = np.array([shape for _, shape in usable])
    chosen = []
    free = np.ones(len(usable), bool)
    for style in styles:
        distance = np.square(table - style[12:]).sum(1) + np.where(free, 0.0, 1.0)
        best = int(distance.argmin())
        free[best] = False
        chosen.append(usable[best][0])
    return np.array(chosen)


def _sample(
    network: StyleDiffusion, mask: Tensor, style: Tensor, plan: RunPlan, noise: torch.Generator
) -> Tensor:
    global denoiser_calls
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="sample", algorithm_type="dpmsolver++", **SCHEDULE
    )
    scheduler.set_timesteps(plan.generator.sampler_steps)
    half = plan.data.image_size // 2
    state = torch.randn((len(mask), 12, half, half), generator=noise)
    for time in scheduler.timesteps:
        with torch.autocast("cpu", torch.bfloat16):  # 0.6 of the time; the solver's state stays float32
            clean = network(state, time.expand(len(mask)), mask, style)
        state = scheduler.step(clean.float(), time, state).prev_sample
        denoiser_calls += len(mask)
    image = (inverse_haar(state) + 1) / 2
    grey = (style[:, 0:3].std(1) + style[:, 6:9].std(1)) < 1e-3
    image[grey] = image[grey].mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return image.clamp(0, 1)  # no stretch: the style says how bright and how strong this image is


def fine_tune(
    generator: ResidentGenerator,
    adapter: Adapter,
    patients: Sequence[Patient],
    plan: RunPlan,
    order: tuple[int, int] | Visit,
    deadline: Deadline,
) -> Adaptation:
    """Train the generator's adapter on the site's labelled crops (scopes ``local`` and ``federated``).

    Args:
        order: (round index, seed), and what is trained; see `client.adaptation.Visit`.
    """
    settings, visit = plan.generator, Visit(*order)
    sampler = PatchSampler(patients, plan.data.image_size, visit.seed, labelled=True)
    noise = torch.Generator().manual_seed(visit.seed % 2**63)
    steps = settings.steps
    schedule = Schedule(settings.learning_rate, steps, visit.round_index * steps, settings.rounds * steps)
    with generator.visit(adapter, train=True, halves=visit.halves) as network:

        def loss_at() -> Tensor:
            return diffusion_loss(network, *_styled_batch(sampler, settings.batch_size), noise)

        trained = list(generator.slots.trainable(visit.halves).values())
        losses = fit(trained, schedule, loss_at, deadline, "training the generator")
        return Adaptation(generator.slots.read(), ends(losses), visit.halves)


def _styled_batch(sampler: PatchSampler, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Crops with their masks and style vectors; crops without foreground or background are drawn again."""
    images, masks, styles = [], [], []
    for _ in range(20):
        batch = sampler.batch(size - len(images))
        for image, mask in zip(batch.images, batch.masks, strict=True):
            vector = style_vector(image, mask.amax(0), torch.ones(image.shape[1:], dtype=torch.bool))
            if vector is not None:
                images.append(image)
                masks.append(mask.amax(0, keepdim=True))
                styles.append(torch.from_numpy(vector).float())
        if len(images) == size:
            return torch.stack(images), torch.stack(masks), torch.stack(styles)
    raise DataError("the labelled crops hold too little foreground or background to describe a style")
