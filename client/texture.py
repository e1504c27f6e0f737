"""Grain and shading: how strongly luminance varies in each frequency band of a region, and painting it so.

Bands are differences of Gaussian blurs (Burt and Adelson 1983) at `common.style.BAND_EDGES`. A blur looks at
the region alone (normalised convolution, Knutsson and Westin 1993), so that a border is no texture.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.optimize import nnls
from scipy.stats import skew

from common.style import BAND_EDGES, TEXTURE_BOUNDS, TEXTURE_PARTS

FloatImage = NDArray[np.float32]
Region = NDArray[np.bool_]

SHADING_BLUR = 10.0  # pixels: of the noise that stands for shading
GAINS = (0.4, 2.5)  # a band that is there is made weaker or stronger by no more than this
FAINT = 1e-4  # a deviation below this is none


def bands(channel: FloatImage, region: Region) -> FloatImage:
    """(5, H, W): the four bands of ``channel`` from fine to coarse, then what is slower less its mean.

    Inside ``region`` they add up to ``channel`` less its mean there; outside they mean nothing.
    """
    inside = region.astype(np.float32)
    levels = [channel]
    for edge in BAND_EDGES:
        weight = gaussian_filter(inside, edge) + 1e-6
        levels.append(gaussian_filter(channel * inside, edge) / weight)
    fine = [finer - coarser for finer, coarser in pairwise(levels)]
    return np.stack([*fine, levels[-1] - channel[region].mean()]).astype(np.float32)


def texture_numbers(image: FloatImage, region: Region) -> NDArray[np.float64]:
    """The numbers of `common.style.TEXTURE_PARTS` of one region of ``image`` (3, H, W), within bounds."""
    found = bands(image.mean(0), region)[:, region].astype(np.float64)
    deviations = found.std(1)
    grain = found[0]
    skewness = float(skew(grain)) if deviations[0] > FAINT else 0.0
    low, high = np.array(TEXTURE_BOUNDS[: len(TEXTURE_PARTS)]).T
    return np.clip([*deviations, skewness], low, high)


def impose_texture(
    image: FloatImage, region: Region, wanted: NDArray[np.float64], rng: np.random.Generator
) -> FloatImage:
    """``image`` (3, H, W) with the `TEXTURE_PARTS` ``wanted`` in ``region``; its mean colour there stays.

    What is there is made weaker or stronger within `GAINS`; what is still missing is added as grain.
    """
    found = bands(image.mean(0), region)[:, region].std(1)
    gains = np.clip(wanted[:-1] / np.maximum(found, FAINT), *GAINS)
    missing = np.sqrt(np.maximum(wanted[:-1] ** 2 - (gains * found) ** 2, 0))
    added = grain(rng, image.shape[1], missing, float(wanted[-1]))
    changed = image.copy()
    for channel in changed:
        parts = bands(channel, region)
        mean = channel[region].mean()
        channel[region] = mean + np.tensordot(gains, parts, 1)[region] + added[region]
    return changed


def grain(
    rng: np.random.Generator, size: int, deviations: NDArray[np.float64], skewness: float = 0.0
) -> FloatImage:
    """Noise (size, size) whose bands (as `bands` has them) deviate by ``deviations`` (5,).

    Args:
        skewness: of the finest band; speckle is skewed to the bright side.
    """
    spectra, overlaps = _noises(size)
    variances, _ = nnls(overlaps, np.square(deviations))
    field = np.zeros((size, size))
    for index, (spectrum, variance) in enumerate(zip(spectra, variances, strict=True)):
        white = rng.standard_normal((size, size))  # drawn in any case: no band moves the next
        if variance < FAINT**2:
            continue
        band = np.fft.ifft2(np.fft.fft2(white) * spectrum).real
        band = (band - band.mean()) / band.std()
        field += np.sqrt(variance) * (_skewed(band, skewness) if index == 0 else band)
    return field.astype(np.float32)


@lru_cache(maxsize=8)
def _noises(size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Frequency responses (5, size, size) of the five noises, and how far each is heard in each band, (5, 5).

    Bands overlap, so noise of one band deviates in its neighbours too; entry (i, j) is the variance in band i
    of noise j of variance 1.
    """
    frequency = np.square(np.fft.fftfreq(size))
    squared = frequency[:, None] + frequency
    blurs = [np.exp(-2 * np.square(np.pi * sigma) * squared) for sigma in (0.0, *BAND_EDGES, SHADING_BLUR)]
    fine = [finer - coarser for finer, coarser in pairwise(blurs[:-1])]
    heard, made = np.stack([*fine, blurs[-2]]), np.stack([*fine, blurs[-1]])
    heard[:, 0, 0] = made[:, 0, 0] = 0  # the mean is no texture
    power = np.square(made).reshape(len(made), -1)
    overlaps = np.square(heard).reshape(len(heard), -1) @ power.T / power.sum(1)
    return made, overlaps


def _skewed(standard: NDArray[np.float64], skewness: float) -> NDArray[np.float64]:
    """A standard normal field bent to ``skewness`` by its square, still of mean 0 and deviation 1.

    Of z + c (z^2 - 1) the skewness is (6 c + 8 c^3) / (1 + 2 c^2)^(3/2), which is inverted from a table.
    """
    bends = np.linspace(0, 2, 400)
    table = (6 * bends + 8 * bends**3) / (1 + 2 * bends**2) ** 1.5
    rising = bends[: int(table.argmax()) + 1]
    bend = float(np.interp(abs(skewness), table[: len(rising)], rising)) * np.sign(skewness)
    bent: NDArray[np.float64] = (standard + bend * (standard**2 - 1)) / np.sqrt(1 + 2 * bend**2)
    return bent
