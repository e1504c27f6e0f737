"""Does a generator remember whom it was trained on? The site's own attack on its own generator.

How much better a generator denoises a patient's image than the shipped one does, over several noise levels:
the loss of a diffusion model tells members (Carlini et al. 2023, arXiv 2301.13188, section 5), the more so
against what it was before (Watson et al. 2022, arXiv 2111.08440). A set whose images pass every comparison of
distances may still be told apart so. Scores are of patients, and stay at the site.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from client.curation.encodings import tiles_of
from client.patients import Patient
from client.style import style_vector
from common.errors import DataError
from common.generator import StyleDiffusion, denoising_errors
from common.privacy.membership import Assignment, Claim, Membership, judged
from common.seeding import derive_seed

GENERATOR = "generator"
TIMES = (150, 300, 450, 600, 750, 900)  # noise levels, of a thousand
TILES = 4  # of a patient
AT_ONCE = 16


@dataclass(frozen=True)
class Conditions:
    """Tiles of patients with what a generator paints them from, the same for each generator.

    Attributes:
        images, masks, styles: (N, 3, S, S), (N, 1, S, S) and (N, 14).
        owners: (N,) the patient's position.
        inside: of each patient, whether the generator was trained on it.
    """

    images: Tensor
    masks: Tensor
    styles: Tensor
    owners: Tensor
    inside: list[bool]

    @classmethod
    def of(cls, train: Sequence[Patient], holdout: Sequence[Patient], size: int) -> Conditions:
        """Of the labelled tiles that have a foreground and a background.

        Raises ``DataError`` if no patient of ``train``, or none of ``holdout``, has one.
        """
        inside: list[bool] = []
        tiles: list[tuple[Tensor, Tensor, Tensor]] = []
        owners: list[int] = []
        for trained, patients in ((True, train), (False, holdout)):
            for patient in patients:
                if own := list(_styled_tiles(patient, size)):
                    tiles += own
                    owners += [len(inside)] * len(own)
                    inside.append(trained)
        if len(set(inside)) < 2:
            raise DataError(
                "an attack on the generator wants labelled patients that it was trained on, and others"
            )
        images, masks, styles = (torch.stack(part) for part in zip(*tiles, strict=True))
        return cls(images, masks, styles, torch.tensor(owners), inside)

    @torch.inference_mode()
    def log_losses(self, network: StyleDiffusion, seed: int) -> Tensor:
        """(patients,): the mean logarithm of the denoising error, over a patient's tiles and the times."""
        total = torch.zeros(len(self.images))
        shape = network.space.shape(len(self.images), self.images.shape[-1])
        for time in TIMES:
            draw = torch.Generator().manual_seed(derive_seed(seed, "times", time) % 2**63)
            noise = torch.randn(shape, generator=draw)
            for start in range(0, len(self.images), AT_ONCE):
                part = slice(start, start + AT_ONCE)
                at = torch.full((len(self.images[part]),), time)
                given = (self.images[part], self.masks[part], self.styles[part])
                total[part] += denoising_errors(network, *given, at, noise[part]).clamp_min(1e-9).log()
        sums = torch.zeros(len(self.inside)).index_add_(0, self.owners, total / len(TIMES))
        return sums / torch.bincount(self.owners, minlength=len(self.inside))


def attack(conditions: Conditions, before: Tensor, after: Tensor, digest: str) -> Membership:
    """Judge the scores of a generator with ``digest``; ``before`` and ``after`` as `Conditions.log_losses`.

    Who was trained on was no coin's choice, so that no lower bound on epsilon follows.
    """
    scores = [(float(old - new), float(-new)) for old, new in zip(before, after, strict=True)]
    return judged((GENERATOR, digest), scores, conditions.inside, Assignment.by_split, Claim())


def _styled_tiles(patient: Patient, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """At most `TILES` of the patient: image, mask of every class together, style."""
    found = 0
    for sample in patient.samples:
        if sample.mask is None:
            continue
        mask = sample.mask.amax(0, keepdim=True).float()
        planes = torch.cat([sample.image, mask, sample.valid[None].float()])
        for tile in tiles_of(planes, size):
            vector = style_vector(tile[:3], tile[3], tile[4] > 0)
            if vector is not None:
                yield tile[:3], tile[3:4], torch.from_numpy(vector).float()
                found += 1
            if found == TILES:
                return
