"""Whether an exported network is the one that was trained: both are run on the same tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.errors import ArtefactError
from common.seeding import derive_seed

TOLERANCE = 1e-4  # of a logit: float arithmetic in another order, not another network
BATCHES = (1, 3)

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Fidelity:
    """``largest_difference`` of any logit; ``any_size``: whether tiles of other sizes were right too."""

    largest_difference: float
    any_size: bool


def probe_tiles(batch: int, height: int, width: int) -> Tensor:
    """(batch, 3, height, width) in [0, 1]: noise, and smooth shapes with sharp edges, the same each time."""
    generator = torch.Generator().manual_seed(derive_seed(0, "probe", batch, height, width) % 2**63)
    noise = torch.rand(batch, 3, height, width, generator=generator)
    coarse = torch.rand(batch, 3, max(2, height // 8), max(2, width // 8), generator=generator)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    shapes = smooth + 0.4 * (smooth.mean(1, keepdim=True) > 0.55)
    share = torch.linspace(0, 1, batch)[:, None, None, None] if batch > 1 else torch.tensor(0.3)
    return (share * noise + (1 - share) * shapes).clamp(0, 1)


def other_size(tile: int) -> tuple[int, int]:
    """A larger, longer tile: what is checked before a file is said to take other sizes."""
    return 2 * tile, 3 * tile


def takes_other_sizes(network: Forward, tile: int) -> bool:
    try:
        with torch.inference_mode():
            logits = network(probe_tiles(1, *other_size(tile)))
    except RuntimeError:
        return False
    return tuple(logits.shape[-2:]) == other_size(tile)


def compare(network: Forward, exported: Forward, tile: int, any_size: bool) -> Fidelity:
    """Run both on the same tiles, in batches of several sizes.

    Raises:
        ArtefactError: if a logit differs by more than `TOLERANCE`, is not finite, or the shapes differ.
    """
    sizes = [(tile, tile), other_size(tile)] if any_size else [(tile, tile)]
    worst = 0.0
    with torch.inference_mode():
        for height, width in sizes:
            for batch in BATCHES:
                tiles = probe_tiles(batch, height, width)
                expected, found = network(tiles), exported(tiles)
                if expected.shape != found.shape:
                    raise ArtefactError(
                        f"the exported network gives {tuple(found.shape)} instead of "
                        f"{tuple(expected.shape)}: nothing was written"
                    )
                difference = float((expected - found).abs().max())
                worst = max(worst, difference if difference == difference else float("inf"))
    if worst > TOLERANCE:
        raise ArtefactError(
            f"the exported network differs from the student by {worst:.2g} (at most {TOLERANCE:g} is "
            "allowed): nothing was written. Report the student's kind and the versions that "
            "`wardround doctor` shows"
        )
    return Fidelity(worst, any_size)
