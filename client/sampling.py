"""Patches for training: drawn from patients, not from images, and the same again for the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.patients import Patient, Sample
from common.errors import DataError
from common.seeding import derive_rng

FOREGROUND_SHARE = 0.5  # of the labelled crops that have a foreground pixel at their centre, if there is one
GAIN = (0.85, 1.15)
LOG_GAMMA = (-0.2, 0.2)
NOISE = (0.0, 0.03)  # standard deviation, of the full range
CENTRE_TRIES = 32

Index = tuple[int, int]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Augmented patches.

    Attributes:
        images: (n, 3, S, S) float32 in [0, 1].
        masks: (n, C, S, S) float32, 0 or 1; all 0 for a patch without a mask, so look at ``labelled``.
            C is 0 if no patient of the sampler has a mask.
        labelled: (n,) bool.
        index: (patient, sample) of each patch, positions in the sampler's patients and their samples.
    """

    images: Tensor
    masks: Tensor
    labelled: Tensor
    index: list[Index]


@dataclass(frozen=True)
class TransferCrop:
    """A patch as the image has it. ``id`` is made of positions, ``patient.sample.row.column``."""

    image: Tensor  # (3, S, S) float32
    mask: Tensor | None  # (C, S, S) float32
    id: str
    valid: Tensor  # (S, S) bool, False outside the field of view


class PatchSampler:
    """Draws a patient, then one of its images, then a patch, each uniformly.

    ``labelled`` True or False keeps only the images with or without a mask; None keeps both. The drawing
    is a function of the patients, ``size``, ``seed`` and the calls of `batch` before.
    Raises `DataError` if no image is left.
    """

    def __init__(
        self, patients: Sequence[Patient], size: int, seed: int, labelled: bool | None = None
    ) -> None:
        self.size = size
        self._seed = seed
        self._patients = patients
        self._classes = next(
            (len(s.mask) for patient in patients for s in patient.samples if s.mask is not None), 0
        )
        self._eligible: list[list[Index]] = []
        for place, patient in enumerate(patients):
            kept = [
                (place, number)
                for number, sample in enumerate(patient.samples)
                if labelled is None or labelled == (sample.mask is not None)
            ]
            if kept:
                self._eligible.append(kept)
        if not self._eligible:
            kind = {True: "labelled ", False: "unlabelled ", None: ""}[labelled]
            raise DataError(f"no {kind}image to draw from: add rows of that kind to the manifest's split.")
        self._rng = derive_rng(seed, "batches")
        self._foreground: dict[Index, list[IntArray]] = {}

    def batch(self, n: int) -> Batch:
        """The next ``n`` augmented patches."""
        images, masks, index = [], [], []
        for _ in range(n):
            own = self._eligible[self._rng.integers(len(self._eligible))]
            at = own[self._rng.integers(len(own))]
            image, mask, valid = self._cut(at, self._corner(at, self._rng))
            planes = torch.zeros(self._classes, self.size, self.size) if mask is None else mask
            image, planes, valid = _dihedral([image, planes, valid], int(self._rng.integers(8)))
            images.append(_photometric(image, valid, self._rng))
            masks.append(planes)
            index.append(at)
        labelled = torch.tensor([self._sample(at).mask is not None for at in index])
        return Batch(torch.stack(images), torch.stack(masks), labelled, index)

    def crops(self, n: int) -> list[TransferCrop]:
        """``n`` patches without augmentation, the same at every call; the first of more are the same too.

        Patients take turns, and each its images, so that all are covered before any comes again.
        """
        rng = derive_rng(self._seed, "crops")
        order = [self._eligible[place] for place in rng.permutation(len(self._eligible))]
        found = []
        for number in range(n):
            turn, place = divmod(number, len(order))
            at = order[place][turn % len(order[place])]
            corner = self._corner(at, rng)
            image, mask, valid = self._cut(at, corner)
            name = ".".join(map(str, (*at, *corner)))
            whole = None if mask is None else mask.contiguous()
            found.append(TransferCrop(image.contiguous(), whole, name, valid[0].contiguous()))
        return found

    def _sample(self, at: Index) -> Sample:
        return self._patients[at[0]].samples[at[1]]

    def _corner(self, at: Index, rng: np.random.Generator) -> Index:
        """Upper left corner of a patch that lies inside the (padded) image and has a valid centre."""
        sample = self._sample(at)
        planes = self._foreground_of(at)
        height, width = sample.valid.shape
        room = np.array([max(height - self.size, 0), max(width - self.size, 0)])
        if planes and rng.random() < FOREGROUND_SHARE:
            pixels = planes[rng.integers(len(planes))]
            row, column = divmod(int(pixels[rng.integers(len(pixels))]), width)
            shifted = np.array([row, column]) - self.size // 2
        else:
            shifted = self._valid_corner(sample, room, rng)
        row, column = np.clip(shifted, 0, room).tolist()
        return row, column

    def _valid_corner(self, sample: Sample, room: IntArray, rng: np.random.Generator) -> IntArray:
        shape = np.array(sample.valid.shape)
        # The centre of the patch at corner (0, 0), where a smaller image lies in the patch's middle.
        first = np.minimum(self.size // 2 - np.maximum(self.size - shape, 0) // 2, shape - 1)
        for _ in range(CENTRE_TRIES):
            corner = rng.integers(0, room + 1)
            if sample.valid[tuple(first + corner)]:
                return np.asarray(corner)
        # Few centres are valid: list them; if there is none, a valid pixel that lies off the centre will do.
        (top, left), (bottom, right) = first, first + room + 1
        corners = torch.nonzero(sample.valid[top:bottom, left:right])
        if not len(corners):
            corners = torch.nonzero(sample.valid) - self.size // 2
        return corners[rng.integers(len(corners))].numpy() if len(corners) else room // 2

    def _foreground_of(self, at: Index) -> list[IntArray]:
        """Flat positions of the foreground, one array a class that is there."""
        if at not in self._foreground:
            mask = self._sample(at).mask
            planes = [] if mask is None else [np.flatnonzero(plane.numpy()) for plane in mask]
            self._foreground[at] = [plane for plane in planes if len(plane)]
        return self._foreground[at]

    def _cut(self, at: Index, corner: Index) -> tuple[Tensor, Tensor | None, Tensor]:
        """Image (3, S, S), mask (C, S, S) float or None, valid (1, S, S) of one patch."""
        sample = self._sample(at)
        rows = _window(sample.valid.shape[0], corner[0], self.size)
        columns = _window(sample.valid.shape[1], corner[1], self.size)
        image = sample.image[:, rows][:, :, columns]
        mask = None if sample.mask is None else sample.mask[:, rows][:, :, columns].float()
        return image, mask, sample.valid[None, rows][:, :, columns]


def _window(length: int, start: int, size: int) -> slice | Tensor:
    """``size`` positions from ``start``; of a shorter image all, centred, continued by reflection."""
    if length >= size:
        return slice(start, start + size)
    before = (size - length) // 2
    return torch.from_numpy(np.pad(np.arange(length), (before, size - length - before), mode="reflect"))


def _dihedral(tensors: Sequence[Tensor], element: int) -> list[Tensor]:
    """One of the square's eight symmetries (quarter turns, then a flip) of (C, S, S) tensors."""
    turned = [torch.rot90(tensor, element % 4, dims=(1, 2)) for tensor in tensors]
    return [tensor.flip(2) for tensor in turned] if element >= 4 else turned


def _photometric(image: Tensor, valid: Tensor, rng: np.random.Generator) -> Tensor:
    """Gain, gamma and noise, the same for all channels so that grey stays grey; black outside ``valid``."""
    gain, gamma, spread = rng.uniform(*GAIN), np.exp(rng.uniform(*LOG_GAMMA)), rng.uniform(*NOISE)
    noise = torch.from_numpy(rng.standard_normal(image.shape[1:], dtype=np.float32))
    changed = (gain * image.pow(float(gamma)) + spread * noise).clamp(0.0, 1.0)
    return torch.where(valid, changed, 0.0)
