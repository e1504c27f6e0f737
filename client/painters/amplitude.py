"""Amplitude transfer: the lowest frequencies' amplitudes of other sites, the phases of the site's own crops.

After FedDG (Liu et al. 2021), which shares the amplitude spectrum of every image. Such a spectrum is of one
patient, so here a site shares the mean over a group of patients instead (`common.style.SPECTRUM_FIELDS`), and
its deviation; what is drawn from that is smoother than what FedDG exchanges.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from client.painters.base import Crop, FloatImage, Material, SyntheticSet, from_crops
from client.style import low_rows
from common.style import CYCLES, SPECTRUM, SPECTRUM_SHAPE


def amplitude(material: Material) -> SyntheticSet:
    """Every crop with the low amplitudes of one drawn style, mixed in by a drawn share; its own mask."""

    def change(index: int, crop: Crop) -> FloatImage:
        share = float(material.rng("amplitude", index).uniform())
        return with_amplitudes(crop.image, material.styles[index], share)

    return from_crops(material, change)


def with_amplitudes(image: FloatImage, style: NDArray[np.float64], share: float) -> FloatImage:
    """``image`` (3, S, S) with (1 - share) of its own low amplitudes and ``share`` of those of ``style``.

    The result is a real image: the mirror half of the column of no cycles across is set alike.
    """
    size = image.shape[1]
    spectrum = np.fft.rfft2(image)
    rows = low_rows(size)
    low = spectrum[:, rows, : CYCLES + 1]
    wanted = style[SPECTRUM].reshape(SPECTRUM_SHAPE) * image[0].size
    # The mirror of (down, 0) is (-down, 0): of the drawn pair the mean, for a real image has them equal.
    wanted[:, :, 0] = (wanted[:, :, 0] + wanted[:, ::-1, 0]) / 2
    mixed = (1 - share) * np.abs(low) + share * wanted
    spectrum[:, rows, : CYCLES + 1] = mixed * np.exp(1j * np.angle(low))
    changed: FloatImage = np.fft.irfft2(spectrum, s=image.shape[1:]).clip(0, 1).astype(np.float32)
    return changed
