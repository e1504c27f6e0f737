"""Make the shipped initial weights again: ``python -m simulations.pretrain [MODEL ...]``.

A model is ``teacher``, ``generator`` or a student by its name. ``vit-tiny`` is not among those that ship: it
would be 12 MB in the repository, and MAE on a site's own images is its usual start. Who wants it makes it
here and adds its name to ``SHIPPED_STUDENTS`` (common/recipe.py), at every site of the consortium.

Every image is procedural (`simulations.scenes`). Steps, not seconds, decide when a training ends, and all
randomness comes from one seed, so the same machine and thread count give the same weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from client.students import STUDENTS
from common.backbones import build_backbone
from common.backbones.base import Backbone
from common.errors import WardroundError
from common.generator import StyleDiffusion, diffusion_loss
from common.names import SHIPPED_STUDENTS
from common.seeding import derive_rng, derive_seed
from common.teacher import HEADS, TINY, Teacher
from simulations import latent_pretraining
from simulations.latent_pretraining import NAME as LATENT
from simulations.scene_training import REAL_LOOKING, SIZE, Bank, Styled, dim, fit, ship
from simulations.scenes import TARGETS

# 4 blocks of width 128 on 8 x 8 patches, every second block global. `initializer_range` matters: the
# library's default is 1e-10, which leaves a new network dead.
TINY_SAM: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_dim": 512,
    "output_channels": 96, "image_size": SIZE, "patch_size": 8, "window_size": 4,
    "global_attn_indexes": [1, 3], "initializer_range": 0.02,
}  # fmt: skip
SCENES = 6000
TISSUES = 9000
VALIDATION = 120
HEAD_WEIGHT = torch.tensor([2.0, 1.0, 1.0, 0.5, 0.5])  # thin structures first: they are the last to start
SHIPPED = {  # by what makes them; a student is called as its kind
    "teacher": "ward-sam-tiny",
    "generator": "ward-diffusion-tiny",
    LATENT: latent_pretraining.SHIPS,
}


def segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Weighted BCE over all heads plus batch Dice over the heads that occur; both (B, 5, S, S)."""
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((0, 2, 3))
    weight = HEAD_WEIGHT.to(logits.device)
    probability = logits.sigmoid()
    both = (probability * target).sum((0, 2, 3))
    total = probability.sum((0, 2, 3)) + target.sum((0, 2, 3))
    dice = (1 - (2 * both + 1) / (total + 1)) * (target.sum((0, 2, 3)) > 0)
    return ((entropy + dice) * weight).sum() / weight.sum()


@torch.no_grad()
def head_dice(forward: Callable[[Tensor], Tensor], bank: Bank) -> dict[str, float]:
    """Mean Dice a head over the validation scenes in which the head's structure occurs."""
    logits = torch.cat([forward(part.float() / 255) for part in bank.images.split(20)])
    found, truth = logits > 0, bank.targets
    scores = (2 * (found & truth).sum((2, 3)) + 1) / (found.sum((2, 3)) + truth.sum((2, 3)) + 1)
    return {
        name: round(float(scores[truth[:, head].any(2).any(1), head].mean()), 3)
        for head, name in enumerate(TARGETS)
    }


def curriculum(step: int, steps: int) -> tuple[float, float, float]:
    """Shares of vessels, cells and regions: vessels alone first, or their head never starts."""
    return (0.9, 0.05, 0.05) if step < 0.15 * steps else (0.4, 0.35, 0.25)


class MaskedPatches(nn.Module):
    """The masked-image term (after MAE, He et al. 2022): patches are greyed, and the tokens must tell them.

    A patch predicts its own pixels by one linear layer, which is thrown away after pre-training.
    """

    def __init__(self, encoder: Backbone, share: float, seed: int) -> None:
        super().__init__()
        self.patch, self.share = encoder.stride, share
        self.pixels = nn.Conv2d(encoder.channels, 3 * self.patch**2, 1)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, image: Tensor) -> Tensor:
        """(B, 1, h, w): 1 where a patch of ``image`` is to be hidden."""
        grid = (len(image), 1, image.shape[2] // self.patch, image.shape[3] // self.patch)
        return (torch.rand(grid, generator=self.generator) < self.share).float().to(image.device)

    def hide(self, image: Tensor, hidden: Tensor) -> Tensor:
        covered = F.interpolate(hidden, scale_factor=float(self.patch))
        return image * (1 - covered) + 0.45 * covered

    def loss(self, tokens: Tensor, image: Tensor, hidden: Tensor) -> Tensor:
        """Mean absolute error over the pixels of the hidden patches."""
        error = (self.pixels(tokens).float() - F.pixel_unshuffle(image, self.patch)).abs() * hidden
        return error.sum() / (hidden.sum() * error.shape[1] + 1)


class TeacherTraining(nn.Module):
    """The teacher and what is only needed to pre-train it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(derive_seed(seed, "teacher", "init"))
        self.teacher = Teacher(build_backbone("sam", TINY_SAM), len(HEADS))
        nn.init.normal_(self.teacher.encoder.get_parameter("vision_encoder.pos_embed"), std=0.02)
        self.masked = MaskedPatches(self.teacher.encoder, 0.3, derive_seed(seed, "teacher", "masked"))

    def loss(self, image: Tensor, target: Tensor, masked: bool) -> Tensor:
        """Segmentation, hidden parts included, and with ``masked`` also the masked-image term."""
        shown, hidden = image, self.masked.draw(image)
        if masked:
            shown = self.masked.hide(image, hidden)
        with torch.autocast(image.device.type, torch.bfloat16):  # 0.6 of the time; weights stay float32
            output = self.teacher(shown)
            extra = self.masked.loss(output.tokens, image, hidden) if masked else torch.zeros(())
        return segmentation_loss(output.logits.float(), target) + extra


def pretrain_teacher(seed: int, steps: int, device: str = "cpu") -> None:
    """On ``device``; on another than the processor the same seed need not give the same bits."""
    training = TeacherTraining(seed).to(device)
    bank = Bank.make(derive_seed(seed, "scenes"), SCENES, tissues=TISSUES)
    rng = derive_rng(seed, "teacher", "batches")

    def loss_at(step: int) -> Tensor:
        image, target, _ = bank.draw(rng, 16, curriculum(step, steps))
        return training.loss(image.to(device), target.to(device), masked=step % 2 == 1)

    rates = {"teacher.encoder": 1.2e-3, "teacher.decoder": 3e-3, "masked": 1.2e-3}
    losses = fit(training, steps, rates, loss_at)
    network = training.teacher.cpu().half().float()  # as it ships
    held_out = Bank.make(seed + 1, VALIDATION, tissues=VALIDATION)
    dice = head_dice(lambda image: network(image).logits, held_out)
    more = {
        "encoder": {"family": "sam", "config": TINY_SAM},
        "preprocessing": {"mean": TINY.mean, "std": TINY.std, "channel_order": "RGB", "range": [0, 1]},
        "multi_scale": network.multi_scale,
        "trained_on": REAL_LOOKING,
        "device": device,
    }
    measured = {"heads": list(HEADS), "validation_dice": dice, "losses": losses}
    _ship("teacher", "teacher", network.half(), (seed, steps), {**more, **measured})


@dataclass(frozen=True)
class StudentCourse:
    """How one kind of student is pre-trained.

    Attributes:
        rate: learning rate. steps: as shipped.
        tissues: also scenes closer to cameras and microscopes, and half precision on the disk and, where the
            processor can, in training. Not for the first student, which shipped before there were any.
    """

    rate: float
    steps: int
    tissues: bool = True


COURSES = {
    "unet-xs": StudentCourse(3e-3, 2000, tissues=False),
    "unet-s": StudentCourse(2e-3, 1500),
    "mobile": StudentCourse(3e-3, 2000),
    "vit-tiny": StudentCourse(1e-3, 2000),
}


def pretrain_student(kind: str, seed: int, steps: int) -> None:
    """One student of ``kind``, a name in `STUDENTS`."""
    course = COURSES[kind]
    # "student" is what the first one was called when it was made: another word would be other weights.
    name = "student" if kind == "unet-xs" else kind
    torch.manual_seed(derive_seed(seed, name, "init"))
    network = STUDENTS[kind](len(HEADS))
    more = TISSUES if course.tissues else 0
    bank = Bank.make(derive_seed(seed, "scenes"), SCENES, tissues=more)
    held_out = Bank.make(seed + 1, VALIDATION, tissues=VALIDATION if course.tissues else 0)
    rng = derive_rng(seed, name, "batches")

    def loss_at(step: int) -> Tensor:
        image, target, _ = bank.draw(rng, 16, curriculum(step, steps))
        with torch.autocast("cpu", torch.bfloat16, enabled=course.tissues):
            logits = network(image)
        return segmentation_loss(logits.float(), target)

    losses = fit(network, steps, {"": course.rate}, loss_at)
    ready = network.half().float() if course.tissues else network  # as it ships
    about = {"heads": list(HEADS), "validation_dice": head_dice(ready, held_out), "losses": losses}
    if course.tissues:
        about["trained_on"] = REAL_LOOKING
    _ship("student", kind, network.half() if course.tissues else network, (seed, steps), about)


def pretrain_generator(seed: int, steps: int) -> None:
    torch.manual_seed(derive_seed(seed, "generator", "init"))
    network = StyleDiffusion()
    # Without distractors: the generator must paint what the mask says and nothing else.
    bank = Bank.make(derive_seed(seed, "plain scenes"), SCENES // 2, distractors=0.0)
    rng = derive_rng(seed, "generator", "batches")
    noise = torch.Generator().manual_seed(derive_seed(seed, "generator", "noise"))
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )

    def loss_at(step: int) -> Tensor:
        if step:
            average.update_parameters(network)
        parts: list[Styled] = []
        while (missing := 8 - sum(len(part.images) for part in parts)) > 0:
            image, target, kinds = bank.draw(rng, missing, (1, 1, 1))
            if found := Styled.of(dim(image, rng), target, kinds):
                parts.append(found)
        images, masks, styles = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("images", "masks", "styles")
        )
        return diffusion_loss(network, images, masks, styles, noise)

    losses = fit(network, steps, {"": 1.5e-3}, loss_at)
    _ship("generator", "generator", average.module, (seed, steps), {"losses": losses})


def _ship(kind: str, maker: str, network: nn.Module, made: tuple[int, int], more: dict[str, object]) -> None:
    ship(SHIPPED.get(maker, maker), network, (maker, *made), {"kind": kind, **more})


DEFAULT_STEPS = {
    "teacher": 6000,
    "generator": 1600,
    LATENT: latent_pretraining.STEPS,
    **{kind: one.steps for kind, one in COURSES.items()},
}
MAKERS: dict[str, Callable[..., None]] = {
    "teacher": pretrain_teacher,
    "generator": pretrain_generator,
    LATENT: latent_pretraining.pretrain_latent_generator,
    **{kind: partial(pretrain_student, kind) for kind in COURSES},
}
USUAL = ("teacher", "generator", LATENT, *SHIPPED_STUDENTS)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.models if name not in MAKERS]:
        parser.error(f"no model {', '.join(unknown)}; there are: {', '.join(MAKERS)}")
    if (given.codec is None) != (given.name is None) or (given.codec and given.models != [LATENT]):
        parser.error(f"--codec and --name go together, and with {LATENT} alone")
    torch.set_num_threads(1)
    try:
        for name in given.models or USUAL:
            MAKERS[name](given.seed, given.steps or DEFAULT_STEPS[name], **_options(name, given))
    except WardroundError as error:
        parser.exit(error.exit_code, f"{error}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help=f"{', '.join(MAKERS)} (default: all that ship)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="optimiser steps (default: as shipped)")
    parser.add_argument("--device", default="cpu", help="of the teacher's training (cpu, cuda)")
    latent = parser.add_argument_group(LATENT)
    latent.add_argument("--keep", type=Path, metavar="FOLDER", help="to take up what was broken off")
    latent.add_argument("--codec", type=Path, metavar="FOLDER", help="an AutoencoderKL in place of our own")
    latent.add_argument("--name", help="of the generator in the latent space of --codec")
    latent.add_argument("--folder", type=Path, help="where that goes (default: first of WARDROUND_TEACHERS)")
    return parser


def _options(name: str, given: argparse.Namespace) -> dict[str, Any]:
    if name == "teacher":
        return {"device": given.device}
    if name != LATENT:
        return {}
    read = latent_pretraining.Brought.read
    brought = None if given.codec is None else read(given.codec, given.name, given.folder)
    return {"keep": given.keep, "brought": brought}


if __name__ == "__main__":
    main()
