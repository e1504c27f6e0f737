"""What a painter is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.patients import Patient
from client.sampling import PatchSampler
from client.style import sample_styles
from common.plan import RunPlan
from common.seeding import derive_rng, derive_seed
from common.style import StyleSummary

FloatImage = NDArray[np.float32]  # (3, S, S) in [0, 1] or a plane of it


@dataclass(frozen=True)
class SyntheticSet:
    """``images`` (N, 3, S, S) in [0, 1] and their ``masks`` (N, C, S, S) in {0, 1}.

    Attributes:
        own_pixels: whether the images are made of the site's own: pixels, shapes and masks of its patients
            are in them, so they are as secret as those, and no filter whose count is told looks at them.
    """

    images: Tensor
    masks: Tensor
    own_pixels: bool = False

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Crop:
    """A labelled crop: ``image`` (3, S, S), ``mask`` (C, S, S), ``valid`` (S, S) inside the field of view."""

    image: FloatImage
    mask: FloatImage
    valid: NDArray[np.bool_]


@dataclass(frozen=True)
class Material:
    """What every painter may use; the number of images is ``plan.generator.images``.

    Attributes:
        summaries: the styles to paint in, one summary a site; none where the painter needs none.
        labelled: the site's own patients, for painters that take the site's crops.
    """

    plan: RunPlan
    summaries: Sequence[StyleSummary]
    labelled: Sequence[Patient]
    seed: int

    @property
    def count(self) -> int:
        return self.plan.generator.images

    @property
    def size(self) -> int:
        """Side of an image, pixels."""
        return self.plan.data.image_size

    def rng(self, *path: str | int) -> np.random.Generator:
        """A stream of its own for each ``path``, so that one image does not move the next."""
        return derive_rng(self.seed, *path)

    @cached_property
    def styles(self) -> NDArray[np.float64]:
        """A style vector for each image, (count, 14 or more)."""
        return sample_styles(self.summaries, self.count, np.random.default_rng(self.seed))

    @cached_property
    def crops(self) -> list[Crop]:
        """Labelled crops of the site, as many as images; patients take turns.

        Raises ``DataError`` where no patient is labelled.
        """
        sampler = PatchSampler(self.labelled, self.size, derive_seed(self.seed, "own crops"), labelled=True)
        return [
            Crop(crop.image.numpy(), crop.mask.float().numpy(), crop.valid.numpy())
            for crop in sampler.crops(self.count)
            if crop.mask is not None
        ]


Paint = Callable[[Material], SyntheticSet]


@dataclass(frozen=True)
class PainterKind:
    """One painter, and what it takes.

    Attributes:
        own_pixels: whether its images are made of the site's own crops.
        shares: "style" or "spectrum": what of other sites it needs; "" nothing.
        about: one sentence, for the provenance beside the images.
    """

    paint: Paint
    own_pixels: bool
    shares: str
    about: str


def from_crops(
    material: Material, change: Callable[[int, Crop], FloatImage | tuple[FloatImage, FloatImage]]
) -> SyntheticSet:
    """Every crop of the site as ``change`` (index, crop) makes it, black outside the field of view.

    ``change`` gives an image (3, S, S), or an image and a mask (C, S, S) where the mask moved with it.
    """
    images, masks = [], []
    for index, crop in enumerate(material.crops):
        made = change(index, crop)
        image, mask = made if isinstance(made, tuple) else (made, crop.mask)
        images.append(np.where(crop.valid, image.clip(0, 1), 0).astype(np.float32))
        masks.append(mask)
    return SyntheticSet(
        torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks)), own_pixels=True
    )
