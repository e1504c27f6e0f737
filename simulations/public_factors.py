"""Make a teacher's public factors: ``python -m simulations.public_factors TEACHER``.

For every layer that a preset may give factors to, the leading right-singular vectors of the loss gradients of
its weight, image under image, over procedural images alone (`simulations.scenes`, `simulations.tissues`).
With G_i (out, in) the gradient of image i they are the eigenvectors of::

    M = sum_i G_i^T G_i / |G_i|^2        (in, in)

where |G_i| is the length over all layers of the encoder, or of the decoder: as in a private run, an image
counts by the direction of its gradient and not by its length. Images one by one, and not their mean gradient,
which is nearly zero where the teacher was trained on the same kind of image.

The teacher may be any that is installed; the factors of an imported one come to lie beside it. The same seed,
machine and thread count give the same file. The images are of no patient, so the factors cost no privacy, and
whoever distrusts the file can make it again. ``wardround teacher info`` shows the digests of A that a policy
lists (``payload.a_matrix_sha256``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from client.losses import image_losses
from common import checkpoints, progress, public_factors
from common.recipe import DecoderTraining, TeacherConfig
from common.seeding import derive_seed
from common.teacher import Teacher, bare_teacher, shipped_teacher
from common.tuning.placement import place
from common.tuning.presets import PRESETS
from server.aggregation.components import signs
from simulations.scenes import scene_bank
from simulations.tissues import tissue_bank

IMAGES = 600
LARGEST_SIDE = 256  # of the images, pixels, unless another is asked for
EVERY = 100  # images between two lines of progress
LICENCE = "Apache-2.0"
PARTS = ("encoder", "decoder")


def measured_layers(teacher: str) -> dict[str, tuple[str, ...]]:
    """Every layer that some preset gives factors to -> those that are measured for it.

    They are the layer itself, or the three that a fused one is cut into.
    """
    with torch.device("meta"):
        network = bare_teacher(teacher)
    encoder = network.encoder
    roles = {role for preset in PRESETS.values() for role in preset.roles} & set(encoder.LAYERS)
    cut = [f"encoder.{name}" for name in encoder.layers(sorted(roles - {"qkv"}))]
    whole = [f"encoder.{name}" for name in encoder.layers(["qkv"])] if "qkv" in roles else []
    of_decoder = TeacherConfig(teacher, "decoder", decoder=DecoderTraining.lora)
    placed = place(encoder, network.decoder, of_decoder).layers
    fused = {name: tuple(f"{name}.{part}" for part in "qkv") for name in whole}
    return {name: (name,) for name in (*cut, *placed)} | fused


def moments(network: Teacher, layers: Sequence[str], images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Layer -> M (in, in), float64, over ``images`` (N, 3, S, S) in [0, 1] with ``targets`` (N, C, S, S)."""
    weights = {name: _weight(network, name) for name in layers}
    sides = {name: weight.flatten(1).shape[1] for name, weight in weights.items()}
    found = {name: torch.zeros(side, side, dtype=torch.float64) for name, side in sides.items()}
    network.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        loss = image_losses(network(image[None]).logits, target[None], exclusive=False).sum()
        taken = torch.autograd.grad(loss, list(weights.values()))
        gradients = {name: one.flatten(1).double() for name, one in zip(weights, taken, strict=True)}
        squares = dict.fromkeys(PARTS, 0.0)
        for name, gradient in gradients.items():
            squares[_part(name)] += float(gradient.square().sum())
        for name, gradient in gradients.items():
            found[name].addmm_(gradient.T, gradient / squares[_part(name)])
        if (number + 1) % EVERY == 0:
            progress.step(f"{number + 1} images")
    network.requires_grad_(False)
    return found


def leading_rows(moment: Tensor, count: int) -> Tensor:
    """The ``count`` strongest eigenvectors of ``moment`` (in, in) as rows, their signs no accident."""
    vectors = torch.linalg.eigh(moment)[1].flip(1)[:, :count]
    return (vectors * signs(vectors)).T


def public_images(seed: int, count: int, size: int) -> tuple[Tensor, Tensor]:
    """``count`` images (N, 3, S, S) in [0, 1] and targets (N, 5, S, S), half of them of each procedure."""
    scenes = scene_bank(derive_seed(seed, "public", "scenes"), count - count // 2, size)
    tissues = tissue_bank(derive_seed(seed, "public", "tissues"), count // 2, size)
    images, targets = (np.concatenate([scenes[part], tissues[part]]) for part in (0, 1))
    return torch.from_numpy(images).float() / 255, torch.from_numpy(targets).float()


def make(teacher: str, seed: int, count: int, size: int) -> dict[str, object]:
    """Measure and save the factors of ``teacher``; the card.

    Raises ``ArtefactError`` for an unknown teacher, a size that it does not take, or a full disk.
    """
    network, command = shipped_teacher(teacher, size).eval(), public_factors.making(teacher)
    network.encoder.split_qkv()
    images, targets = public_images(seed, count, size)
    layers = measured_layers(teacher)
    single = sorted({part for parts in layers.values() for part in parts})
    progress.stage("public factors", count // EVERY)
    found = moments(network, single, images, targets)
    progress.end()
    sums = {layer: torch.stack([found[part] for part in parts]).sum(0) for layer, parts in layers.items()}
    rows = {layer: leading_rows(moment, public_factors.MOST_ROWS) for layer, moment in sums.items()}
    return public_factors.save(
        teacher,
        rows,
        {
            "layers": len(rows),
            "rows": public_factors.MOST_ROWS,
            "image_size": size,
            "images": count,
            "seed": seed,
            "made_from": "procedural images only (simulations/scenes.py, simulations/tissues.py)",
            "licence": LICENCE,
            "reproduce": f"{command} --seed {seed} --images {count} --image-size {size}",
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
    )


def _part(layer: str) -> str:
    return layer.partition(".")[0]


def _weight(network: nn.Module, layer: str) -> nn.Parameter:
    weight = network.get_submodule(layer).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--image-size", type=int, help=f"default: as it was trained, at most {LARGEST_SIDE}")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    size = given.image_size or min(checkpoints.card(given.teacher)["image_size"], LARGEST_SIDE)
    card = make(given.teacher, given.seed, given.images, size)
    sys.stdout.write(f"{card['layers']} layers, {card['bytes']} bytes, sha256 {card['sha256']}\n")


if __name__ == "__main__":
    main()
