"""What is trained on what: a loss of single images, and the table of patients' images that it is taken on.

A table is made once for a site, each patient's part from that patient alone: were one patient's crops to
depend on who else is there, one patient more would move all gradients and not one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from client.dp.poisson import Row
from client.losses import image_losses
from client.patients import Patient
from client.prefix_cache import frozen_blocks, kept_prefix, rows_of
from client.sampling import PatchSampler
from client.style import style_vector
from common.adapter import Adapter
from common.backbones.base import Features, Progress
from common.errors import DataError
from common.generator import StyleDiffusion, denoising_errors, draw_noise
from common.plan import RunPlan
from common.seeding import derive_seed
from common.style import STYLE_FIELDS
from common.teacher import Teacher


@dataclass(frozen=True)
class PatientCrops:
    """Augmented crops of a site's labelled images, the same all through a run.

    Attributes:
        images, masks: (N, 3, S, S) and (N, C, S, S) float32, `client.sampling.Batch`.
        patients: for each patient the rows of its crops.
    """

    images: Tensor
    masks: Tensor
    patients: list[list[Row]]


def draw_crops(patients: Sequence[Patient], size: int, views: int, seed: int) -> PatientCrops:
    """``views`` crops of every labelled image.

    Guarantee: a patient's crops are a function of that patient and ``seed``; nobody else's presence changes
    them. Patients without a labelled image are left out.

    Raises:
        DataError: nobody has a labelled image.
    """
    images, masks, rows = [], [], []
    count = 0
    for patient in patients:
        labelled = [sample for sample in patient.samples if sample.mask is not None]
        for number, sample in enumerate(labelled):
            alone = [replace(patient, samples=(sample,))]
            own = PatchSampler(alone, size, derive_seed(seed, "crops", patient.id, number), labelled=True)
            batch = own.batch(views)
            images.append(batch.images)
            masks.append(batch.masks)
        if labelled:
            rows.append(list(range(count, count + views * len(labelled))))
            count += views * len(labelled)
    if not rows:
        raise DataError("no patient has a labelled image: label some, or check the manifest")
    return PatientCrops(torch.cat(images), torch.cat(masks), rows)


class PrivateTask(nn.Module, ABC):
    """A loss whose gradient is taken patient by patient.

    Attributes:
        patients: for each patient the rows of its images in the table.

    Guarantee asked of every task: entry i of ``forward(*inputs(rows))`` depends on row i alone.
    """

    patients: Sequence[Sequence[Row]]

    @abstractmethod
    def inputs(self, rows: Tensor) -> tuple[Tensor, ...]:
        """What `forward` takes for ``rows`` (B,) int64 of the table, each with the images along axis 0."""

    @abstractmethod
    def forward(self, *inputs: Tensor) -> Tensor:
        """The loss of each image, (B,)."""


class SegmentationTask(PrivateTask):
    """The teacher's segmentation loss on a site's crops.

    Args:
        held: the crops' way through the encoder so far, if a prefix of it is frozen: after ``cut`` blocks
            (`client.prefix_cache.run_prefix`). With all blocks behind it the whole encoder counts as frozen
            and its output is computed here, once; a step then runs the decoder alone.
        cut: how many blocks ``held`` is behind; 0 without.
    """

    def __init__(
        self,
        network: Teacher,
        crops: PatientCrops,
        exclusive: bool,
        held: Progress | None = None,
        cut: int = 0,
    ) -> None:
        super().__init__()
        self.network, self.patients = network, crops.patients
        self._crops, self._exclusive, self._cut = crops, exclusive, cut
        self._whole = held is not None and cut == len(network.encoder.blocks)
        self._held = _finished(network, held) if held is not None and self._whole else held

    @property
    def nbytes(self) -> int:
        """Memory of the table: crops, masks, and the features of its own, bytes."""
        own = 0 if self._held is None else self._held.hidden.nbytes
        return self._crops.images.nbytes + self._crops.masks.nbytes + own

    def inputs(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Crops, masks and what is held of them."""
        table = self._crops.images[rows], self._crops.masks[rows]
        if self._held is None:
            return table
        own = rows_of(self._held, rows)
        return (*table, own.hidden, *own.taps)

    def forward(self, *inputs: Tensor) -> Tensor:
        images, masks, *held = inputs
        logits = self.network.decode(self._features(images, held), images).logits
        return image_losses(logits, masks, self._exclusive)

    def _features(self, images: Tensor, held: Sequence[Tensor]) -> Features:
        encoder = self.network.encoder
        if self._held is None:
            found: Features = encoder(self.network.prepared(images))
            return found
        if self._whole:
            return Features(held[0], tuple(held[1:]))
        progress = Progress(held[0], tuple(held[1:]), self._held.shared)
        return encoder.finish(encoder.run(progress, self._cut, len(encoder.blocks)))


def segmentation_task(
    network: Teacher,
    adapter: Adapter,
    patients: Sequence[Patient],
    plan: RunPlan,
    folder: Path | None,
    views: int = 1,
) -> SegmentationTask:
    """The task of a site that trains ``adapter`` under ``plan``: what lies below its tensors runs once.

    Args:
        network: with ``adapter`` written into it.
        folder: the site's own, where the frozen prefix is kept (`client.prefix_cache`); None keeps none.
        views: crops of each labelled image.
    """
    crops = _crops_or_blank(patients, plan, views)
    cut = frozen_blocks(network.encoder, adapter.trained().tensors)
    held = kept_prefix(network, adapter, crops.images, cut, folder) if cut else None
    return SegmentationTask(network, crops, plan.data.exclusive, held, cut)


def _crops_or_blank(patients: Sequence[Patient], plan: RunPlan, views: int) -> PatientCrops:
    """Of a site without a labelled image one blank that is nobody's: its steps are noise, as others' are."""
    size = plan.data.image_size
    if any(patient.labelled for patient in patients):
        return draw_crops(patients, size, views, derive_seed(plan.seed, "views"))
    return PatientCrops(torch.zeros(1, 3, size, size), torch.zeros(1, len(plan.data.classes), size, size), [])


@torch.no_grad()
def _finished(network: Teacher, held: Progress) -> Progress:
    """The encoder's output in place of its last hidden state; one image at a time, as the prefix was run."""
    tokens = [
        network.encoder.finish(rows_of(held, torch.tensor([row]))).tokens for row in range(len(held.hidden))
    ]
    return Progress(torch.cat(tokens), held.taps)


class DiffusionTask(PrivateTask):
    """The generator's denoising error on a site's crops, each with its own style (`common.generator`).

    ``draws`` times and noises an image are averaged before the clip, which costs no privacy (Dockhorn et al.
    2023). Crops that show only foreground, or none, have no style and are left out.
    """

    def __init__(self, network: StyleDiffusion, crops: PatientCrops, seed: int, draws: int = 1) -> None:
        super().__init__()
        self.network, self._draws = network, draws
        self._noise = torch.Generator().manual_seed(seed % 2**63)
        self._images, self._masks = crops.images, crops.masks.amax(1, keepdim=True)
        self._styles = torch.zeros(len(crops.images), len(STYLE_FIELDS))
        usable = {row for rows in crops.patients for row in rows if self._style(row)}
        self.patients = [kept for rows in crops.patients if (kept := [row for row in rows if row in usable])]
        if not self.patients:
            raise DataError("the crops hold too little foreground or background to describe a style")

    def _style(self, row: int) -> bool:
        """Write the style of ``row`` into the table; False: it has none."""
        image, mask = self._images[row], self._masks[row]
        vector = style_vector(image, mask[0], torch.ones(mask.shape[1:], dtype=torch.bool))
        if vector is None:
            return False
        self._styles[row] = torch.from_numpy(vector).float()
        return True

    def inputs(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Images, masks, styles, and for each ``draws`` times and noises."""
        images = self._images[rows]
        drawn = [draw_noise(self.network.space, images, self._noise) for _ in range(self._draws)]
        times, noises = (torch.stack(part, 1) for part in zip(*drawn, strict=True))
        return images, self._masks[rows], self._styles[rows], times, noises

    def forward(self, *inputs: Tensor) -> Tensor:
        images, masks, styles, times, noises = inputs
        # The draws of an image lie side by side along axis 0, as its windows would.
        images, masks, styles = (part.repeat_interleave(self._draws, 0) for part in (images, masks, styles))
        errors = denoising_errors(self.network, images, masks, styles, times.flatten(), noises.flatten(0, 1))
        return errors.view(-1, self._draws).mean(1)
