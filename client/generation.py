"""Synthetic images at the site: sampled in every site's style on procedural masks; they never leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from numpy.typing import NDArray
from torch import Tensor

from client.adaptation import Adaptation, Visit
from client.conditioning import conditioning_masks
from client.deadline import Deadline
from client.fitting import Schedule, ends, fit
from client.painters.base import SyntheticSet
from client.painters.colours import greyed
from client.patients import Patient
from client.sampling import PatchSampler
from client.style import sample_styles, style_vector
from client.texture import impose_texture
from common.adapter import Adapter
from common.errors import DataError
from common.generator import (
    SCHEDULE,
    ResidentGenerator,
    StyleDiffusion,
    diffusion_loss,
    with_code,
)
from common.plan import RunPlan
from common.style import STYLE_FIELDS, TEXTURE, TEXTURE_PARTS, StyleSummary

BATCH = 16  # images sampled together

Solver = Callable[[], Any]  # makes a scheduler of diffusers, its steps set; anew for each batch

denoiser_calls = 0  # network evaluations times images since the process began: tests assert the bound


@dataclass(frozen=True)
class Sampling:
    """How images are sampled, beside what the plan says.

    Attributes:
        solver: in place of the plan's; measurements alone have one.
        sites: whose each summary is, for a generator that tells sites apart.
    """

    solver: Solver | None = None
    sites: tuple[str, ...] = ()


def synthesise(
    generator: ResidentGenerator,
    adapter: Adapter,
    summaries: Sequence[StyleSummary],
    plan: RunPlan,
    seed: int,
    how: Sampling | None = None,
) -> SyntheticSet:
    """``plan.generator.images`` images in the styles of ``summaries``, classes in turn.

    Guarantees: the masks come from the procedural prior (`client.shapes`), never from a patient; at most
    ``plan.generator.sampler_steps`` denoiser calls an image (DPM-Solver++, Lu et al. 2022). Where the styles
    hold texture, which the network was not trained to paint, it is imposed on what was sampled.

    Args:
        how: what differs from a sampling by the plan alone.
    """
    how = how or Sampling()
    count = plan.generator.images
    rng = np.random.default_rng(seed)
    styles = sample_styles(summaries, count, rng)
    planes = conditioning_masks(styles, plan.data, rng)
    noise = torch.Generator().manual_seed(seed % 2**63)
    images = []
    with generator.visit(adapter) as network, torch.inference_mode():
        for start in range(0, count, BATCH):
            part = slice(start, start + BATCH)
            style = torch.from_numpy(styles[part, : len(STYLE_FIELDS)]).float()
            if how.sites:
                style = with_code(style, [how.sites[place % len(how.sites)] for place in range(count)[part]])
            mask = planes[part].amax(1, keepdim=True)
            images.append(_sample(network, mask, style, how.solver or plans_solver(plan), noise))
    sampled = torch.cat(images)
    if styles.shape[1] >= TEXTURE.stop:
        sampled = _textured(sampled, planes, styles, rng)
    return SyntheticSet(sampled, planes)


def _textured(
    images: Tensor, planes: Tensor, styles: NDArray[np.float64], rng: np.random.Generator
) -> Tensor:
    """``images`` with the grain and shading of their ``styles`` in foreground and background."""
    made = []
    for image, mask, style in zip(images.numpy(), planes.amax(1).numpy() > 0, styles, strict=True):
        numbers = style[TEXTURE].reshape(2, len(TEXTURE_PARTS))
        for region, wanted in zip((mask, ~mask), numbers, strict=True):
            image = impose_texture(image, region, wanted, rng)
        made.append(greyed(image.clip(0, 1), style))
    return torch.from_numpy(np.stack(made))


def plans_solver(plan: RunPlan) -> Solver:
    """DPM-Solver++ of the second order with ``plan.generator.sampler_steps`` calls."""

    def make() -> Any:
        scheduler = DPMSolverMultistepScheduler(
            prediction_type="sample", algorithm_type="dpmsolver++", **SCHEDULE
        )
        scheduler.set_timesteps(plan.generator.sampler_steps)
        return scheduler

    return make


def _sample(
    network: StyleDiffusion, mask: Tensor, style: Tensor, solver: Solver, noise: torch.Generator
) -> Tensor:
    global denoiser_calls
    scheduler = solver()
    space = network.space
    state = torch.randn(space.shape(len(mask), mask.shape[-1]), generator=noise)
    with torch.autocast("cpu", torch.bfloat16):
        given = network.condition(mask, style)
    for time in scheduler.timesteps:
        with torch.autocast("cpu", torch.bfloat16):  # 0.6 of the time; the solver's state stays float32
            clean = network.denoise(state, time.expand(len(mask)), given)
        state = scheduler.step(clean.float(), time, state).prev_sample
        denoiser_calls += len(mask)
    image = (space.decode(state) + 1) / 2
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
            image, mask, style = _styled_batch(sampler, settings.batch_size)
            if settings.site_token and visit.site:
                style = with_code(style, [visit.site] * len(style))
            return diffusion_loss(network, image, mask, style, noise)

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
