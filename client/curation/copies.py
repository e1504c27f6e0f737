"""Are synthetic images copies of the patients that a generator was trained on?

A generator that saw few patients for long can hand them out again (Carlini et al. 2023, arXiv 2301.13188;
of medical images Dar et al. 2024, arXiv 2402.01054). Each synthetic image is held against every training
patient under eight flips and turns. How near is too near is told by patients of the same hospital who were
not trained on: nobody can have copied those. A test that finds nothing has found nothing, and no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.special import betainc, betaincinv
from torch import Tensor

from client.curation.encodings import VIEWS, Encoder, dihedral_views, real_chunks
from client.patients import Patient
from common.privacy.auditing import ALPHA

NULL_SHARE = 0.01  # of images of nobody trained on, that are called near
NEIGHBOURS = 10  # patients, whose mean distance a near one is held against
CARLINI = 0.5  # their alpha: a copy is nearer than this times that mean
NNDR = 0.6  # Lowe's ratio of the two smallest distances, below which an image is worth a look
CLIQUE, OF = 10, 500  # so many images mutually near, of so many
REAL_AT_ONCE, IMAGES_AT_ONCE = 32, 1024  # encoded in memory together


def distances(images: Tensor, patients: Sequence[Patient], encode: Encoder) -> Tensor:
    """From each image (G, 3, S, S) to each patient (G, P): the nearest tile of the nearest view.

    Memory beside the answer is that of `IMAGES_AT_ONCE` images and `REAL_AT_ONCE` tiles in eight views.
    """
    size = images.shape[-1]
    table = torch.full((len(images), len(patients)), torch.inf)
    for start in range(0, len(images), IMAGES_AT_ONCE):
        rows = encode(images[start : start + IMAGES_AT_ONCE])
        part = table[start : start + IMAGES_AT_ONCE]
        for tiles, owners in real_chunks(patients, size, REAL_AT_ONCE):
            views = encode(dihedral_views(tiles).flatten(0, 1))
            near = apart(rows, views).view(len(rows), len(tiles), VIEWS).amin(2)
            part.scatter_reduce_(1, owners.expand(len(rows), -1), near, "amin")
    return table


def apart(left: Tensor, right: Tensor) -> Tensor:
    """Distances (N, M) of rows of length one."""
    return (2 - 2 * left @ right.T).clamp_min(0).sqrt()


@dataclass(frozen=True)
class Nearness:
    """How near images are to a group of patients, by one encoding; each field is (G,).

    Attributes:
        patient: the nearest.
        distance: to that one.
        ratio: that over half the mean distance to the `NEIGHBOURS` nearest (Carlini et al., section 4.2);
            infinite where there are fewer than three patients, who make no neighbourhood.
        nndr: that over the distance to the second nearest.
    """

    patient: Tensor
    distance: Tensor
    ratio: Tensor
    nndr: Tensor

    @classmethod
    def of(cls, table: Tensor) -> Nearness:
        found = table.topk(min(NEIGHBOURS, table.shape[1]), dim=1, largest=False)
        first, nearest = found.values[:, 0], found.indices[:, 0]
        if table.shape[1] < 3:
            return cls(nearest, first, torch.full_like(first, torch.inf), torch.ones_like(first))
        around, second = found.values.mean(1).clamp_min(1e-9), found.values[:, 1].clamp_min(1e-9)
        return cls(nearest, first, first / (CARLINI * around), first / second)


@dataclass(frozen=True)
class Limits:
    """What images of nobody trained on look like to the test, by one encoding.

    Attributes:
        tau: a smaller distance is near; the first percentile of those of the holdout, or their minimum.
        null_rate: the chance of one more such image to be nearer: rank / (|H| + 1).
        ratio: a smaller ratio is a copy's; never above 1, which is Carlini's own limit.
    """

    tau: float
    null_rate: float
    ratio: float

    @classmethod
    def of(cls, holdout: Nearness) -> Limits:
        count = len(holdout.distance)
        rank = max(1, int(NULL_SHARE * (count + 1)))
        tau, ratio = (float(values.sort().values[rank - 1]) for values in (holdout.distance, holdout.ratio))
        return cls(tau, rank / (count + 1), min(1.0, ratio))


@dataclass(frozen=True)
class Likeness:
    """What one encoding says of the images.

    Attributes:
        copied: (G,) bool; nearer than tau, and by far nearer than to the neighbourhood.
        p_value: of so many near images, or more, if none were copied (exact binomial).
        triage: images with a small NNDR. It misses leaks that attacks find, so nothing is decided by it.
        clique: most images found that are mutually nearer than tau, among the first `OF`.
    """

    limits: Limits
    nearness: Nearness
    near: Tensor
    copied: Tensor
    p_value: float
    triage: int
    clique: int


class CopyTest:
    """The test for one site: ``holdout`` tells what is near, and a copy is of a patient of ``train``.

    Args:
        size: of the images that will come, pixels.

    Raises:
        ValueError: one of the two is nobody.
    """

    def __init__(
        self,
        train: Sequence[Patient],
        holdout: Sequence[Patient],
        encodings: Mapping[str, Encoder],
        size: int,
    ) -> None:
        if not train or not holdout:
            raise ValueError("a copy test wants patients who were trained on, and others")
        self.train, self._encodings = train, encodings
        tiles = [tiles for tiles, _ in real_chunks(holdout, size, IMAGES_AT_ONCE)]
        self._holdout = torch.cat(tiles)
        self._limits = {name: Limits.of(self._nearness(name, self._holdout)) for name in encodings}

    def examine(self, images: Tensor) -> dict[str, Likeness]:
        """By each encoding; ``images`` (G, 3, S, S) in [0, 1]."""
        return {name: self._likeness(name, images) for name in self._encodings}

    def _nearness(self, name: str, images: Tensor) -> Nearness:
        return Nearness.of(distances(images, self.train, self._encodings[name]))

    def _likeness(self, name: str, images: Tensor) -> Likeness:
        limits, found = self._limits[name], self._nearness(name, images)
        near = found.distance < limits.tau
        return Likeness(
            limits,
            found,
            near,
            near & (found.ratio < limits.ratio),
            at_least(int(near.sum()), len(images), limits.null_rate),
            int((found.nndr < NNDR).sum()),
            clique(images[:OF], limits.tau, self._encodings[name]),
        )


def copied_by_any(found: Mapping[str, Likeness]) -> Tensor:
    """(G,) bool: the images that one encoding or another calls a copy."""
    return torch.stack([one.copied for one in found.values()]).any(0)


def covered_patients(found: Mapping[str, Likeness]) -> set[int]:
    """Positions of the training patients of whom there is a copy."""
    return {int(place) for one in found.values() for place in one.nearness.patient[one.copied]}


def at_least(successes: int, trials: int, chance: float) -> float:
    """P[X >= ``successes``], X binomial of ``trials`` draws."""
    return 1.0 if successes == 0 else float(betainc(successes, trials - successes + 1, chance))


def upper_coverage(covered: int, patients: int, alpha: float = ALPHA) -> float:
    """The share of patients that more images of this generator may yet copy, at one-sided 1 - ``alpha``.

    Without a copy it is the rule of three, 3 / N (Hanley and Lippman-Hand 1983), otherwise exact
    (Clopper and Pearson 1934), never above 1.
    """
    if covered == 0:
        return min(1.0, 3 / patients)
    if covered == patients:
        return 1.0
    return float(betaincinv(covered + 1, patients - covered, 1 - alpha))


def clique(images: Tensor, tau: float, encode: Encoder) -> int:
    """How many images, at least, are mutually nearer than ``tau``: greedily, from each one on.

    Many samples of one and the same picture are a sign of one that was learned by heart, whosever it is.
    """
    rows = encode(images)
    linked = torch.zeros(len(images), len(images), dtype=torch.bool)
    for start in range(0, len(images), REAL_AT_ONCE):
        views = encode(dihedral_views(images[start : start + REAL_AT_ONCE]).flatten(0, 1))
        near = apart(rows, views).view(len(rows), -1, VIEWS).amin(2) < tau
        linked[:, start : start + REAL_AT_ONCE] = near
    linked &= linked.T.clone()
    linked.fill_diagonal_(False)
    best = min(1, len(images))
    order = linked.sum(1).argsort(descending=True, stable=True).tolist()
    for first in order:
        if int(linked[first].sum()) < best:
            continue
        members, candidates = 1, linked[first].clone()
        for place in order:
            if candidates[place]:
                members, candidates = members + 1, candidates & linked[place]
        best = max(best, members)
    return best
