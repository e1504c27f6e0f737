"""A teacher warmed on patients of nobody: ``python -m simulations.warm_start TEACHER NAME [--seed 0]``.

A private run pays for every step that its patients teach; what public images teach is free. So a teacher is
first trained, encoder and decoder, on procedural patients like those of the task, under scanners and sizes
drawn at random (`simulations.public_hospitals`). What comes of it is a teacher like any other: a file with a
digest, which a recipe names (``teacher.name``), a policy lists (``payload.base_model_sha256``) and every
site loads itself, so that all start from the same numbers. Nothing of it is noised or booked, for nobody's
patients are in it: the command reads the weights of TEACHER, and no other data.

The same seed, machine and thread count give the same file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import checkpoints
from common.errors import ArtefactError, WardroundError
from common.recipe import Anatomy
from common.seeding import derive_rng, derive_seed
from common.teacher import Teacher, shipped_teacher
from simulations.pretrain import head_dice, segmentation_loss
from simulations.public_hospitals import KIND_OF, hospital_bank
from simulations.scene_training import Bank, fit
from simulations.scenes import KINDS

IMAGES, STEPS, BATCH, HELD_OUT = 4000, 1500, 16, 120
RATES = {"encoder": 3e-4, "decoder": 1.5e-3}  # beginnings of parameters' names
# What the card of an imported teacher says of where its weights came from, and is no longer so.
OF_THE_FILE = ("name", "sha256", "bytes", "losses", "validation_dice", "reproduce", "source")


def public_bank(seed: int, count: int, size: int, anatomy: Anatomy) -> Bank:
    images, targets, kinds = hospital_bank(seed, count, size, anatomy)
    return Bank(torch.from_numpy(images), torch.from_numpy(targets), kinds)


def warm(network: Teacher, bank: Bank, steps: int, seed: int) -> list[float]:
    """Train all of ``network`` on ``bank`` for ``steps`` steps; smoothed losses."""
    rng = derive_rng(seed, "b")  # batches
    shares = tuple(float((bank.kinds == kind).any()) for kind in range(len(KINDS)))

    def loss_at(_: int) -> Tensor:
        image, target, _ = bank.draw(rng, BATCH, shares)
        return segmentation_loss(network(image).logits, target)

    return fit(network, steps, RATES, loss_at)


def make(
    teacher: str, name: str, anatomy: Anatomy, training: tuple[int, int, int], folder: Path
) -> dict[str, Any]:
    """Warm ``teacher`` and save it as ``name`` in ``folder``; the new card.

    Args:
        training: seed, steps, side of the images in pixels.

    Raises:
        ArtefactError: an unknown teacher or one of another family than SAM, a name that a shipped model
            has, a size that the teacher does not take, a full disk.
    """
    seed, steps, size = training
    if name in checkpoints.names() and folder != checkpoints.FOLDER:
        raise ArtefactError(
            f"{name} is a shipped model, which a file of that name cannot replace: take another"
        )
    about = checkpoints.card(teacher)
    if (family := about["encoder"]["family"]) != "sam":
        raise ArtefactError(f"{teacher} is of the family {family}: a warm start is made of a SAM teacher")
    network = shipped_teacher(teacher, size)
    bank = public_bank(derive_seed(seed, "h"), IMAGES, size, anatomy)  # hospitals
    losses = warm(network, bank, steps, seed)
    network = network.half().float()  # as it is kept
    held_out = public_bank(seed + 1, HELD_OUT, size, anatomy)
    dice = head_dice(lambda image: network(image).logits, held_out)
    encoder = {**about["encoder"], "config": {**about["encoder"]["config"], "image_size": size}}
    kept = {key: value for key, value in about.items() if key not in OF_THE_FILE}
    card = kept | {
        "image_size": size,
        "params": sum(parameter.numel() for parameter in network.parameters()),
        "encoder": encoder,
        "seed": seed,
        "steps": steps,
        "trained_on": f"{about['trained_on']}; then {IMAGES} procedural images of {anatomy} under random "
        "scanners (simulations/public_hospitals.py); no real image",
        "warmed_from": {"name": teacher, "sha256": about["sha256"]},
        "reproduce": f"python -m simulations.warm_start {teacher} {name} --anatomy {anatomy} "
        f"--image-size {size} --seed {seed} --steps {steps}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "validation_dice": {key: value for key, value in dice.items() if value == value},
        "losses": losses,
    }
    return checkpoints.save(name, network.half().state_dict(), card, folder)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", help="that it starts from")
    parser.add_argument("name", help="that it gets")
    parser.add_argument("--anatomy", choices=[str(one) for one in KIND_OF], default=str(Anatomy.lesions))
    parser.add_argument("--image-size", type=int, default=64, help="of the runs that will use it, pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--folder", type=Path, help="default: the first folder of imported teachers")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = (given.folder or checkpoints.teacher_folders()[0]).resolve()
    training = given.seed, given.steps, given.image_size
    try:
        card = make(given.teacher, given.name, Anatomy(given.anatomy), training, folder)
    except WardroundError as error:
        parser.exit(error.exit_code, f"{error}\n")
    sys.stdout.write(f"{card['name']}: sha256 {card['sha256']}, in {folder}\n")


if __name__ == "__main__":
    main()
