"""What images are compared by when copies are looked for: two encodings, and the eight ways an image can lie.

Both encodings give rows of length one, so that a distance is between 0 (alike up to brightness and contrast)
and 2. Neither was ever shown a patient of the site: one has no weights, the other those that everybody has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from client.patients import Patient
from common.plan import RunPlan
from common.teacher import untrained_teacher

Encoder = Callable[[Tensor], Tensor]  # (B, 3, S, S) in [0, 1] -> (B, D), rows of length one

PIXELS, TOKENS = "pixels", "public encoder"  # the encodings' names
SIDE = 64  # pixels, to which larger images are brought down
GRID = 4  # the encoder's tokens are averaged to as many rows and columns
VIEWS = 8


def encoders(plan: RunPlan) -> dict[str, Encoder]:
    """Both, for images of ``plan``. The public one is the shipped teacher's encoder, which no run trains."""
    network = untrained_teacher(plan.teacher, plan.data).eval()

    @torch.inference_mode()
    def encode(images: Tensor) -> Tensor:
        tokens = network.encoder(network.prepared(images)).tokens
        return standardised(F.adaptive_avg_pool2d(tokens, GRID).flatten(1))

    return {PIXELS: encode_pixels, TOKENS: encode}


def encode_pixels(images: Tensor) -> Tensor:
    """The images themselves, at most 64 pixels a side."""
    if images.shape[-1] > SIDE:
        images = F.adaptive_avg_pool2d(images, SIDE)
    return standardised(images.flatten(1))


def standardised(rows: Tensor) -> Tensor:
    """Each row (N, D) less its mean and of length one; a row that is constant becomes zeros."""
    centred = rows.float() - rows.float().mean(1, keepdim=True)
    return centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-6)


def dihedral_views(images: Tensor) -> Tensor:
    """(N, C, S, S) -> (N, 8, C, S, S): four quarter turns, and those of the mirror image."""
    sides = (images, images.flip(3))
    return torch.stack([side.rot90(turn, (2, 3)) for side in sides for turn in range(4)], 1)


def real_chunks(patients: Sequence[Patient], size: int, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All tiles of the patients' images, at most ``most`` at once: (n, 3, S, S), and whose each is (n,)."""
    tiles: list[Tensor] = []
    owners: list[int] = []
    for owner, patient in enumerate(patients):
        for sample in patient.samples:
            for tile in tiles_of(sample.image, size):
                tiles.append(tile)
                owners.append(owner)
                if len(tiles) == most:
                    yield torch.stack(tiles), torch.tensor(owners)
                    tiles, owners = [], []
    if tiles:
        yield torch.stack(tiles), torch.tensor(owners)


def tiles_of(planes: Tensor, size: int) -> Iterator[Tensor]:
    """Squares of ``size`` pixels that cover ``planes`` (C, H, W), half over one another; less is framed.

    A copy of a crop that lies between two tiles is off by at most a quarter of the side each way.
    """
    height, width = planes.shape[1:]
    below, right = max(0, size - height), max(0, size - width)
    frame = (right // 2, right - right // 2, below // 2, below - below // 2)
    framed = F.pad(planes, frame)
    for row in _starts(framed.shape[1], size):
        for column in _starts(framed.shape[2], size):
            yield framed[:, row : row + size, column : column + size]


def _starts(length: int, size: int) -> list[int]:
    """Where tiles begin along one side: steps of half a tile or less, the last one at the end."""
    steps = -(-(length - size) // max(1, size // 2))
    return [round(step * (length - size) / max(steps, 1)) for step in range(steps + 1)]
