"""The site's style summary: what the images look like, in a few bounded numbers a group.

Style vectors follow `common.style.style_fields`. A group is a diagonal Gaussian over the vectors of images
that look alike (k-means), and only groups of at least the policy's number of *patients* are shared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from scipy.ndimage import binary_erosion, gaussian_filter
from torch import Tensor

from client.patients import Patient, Sample
from client.texture import texture_numbers
from common.errors import DataError
from common.recipe import StyleDetail
from common.style import CYCLES, STYLE_FIELDS, StyleGroup, StyleSummary, style_bounds

TEXTURE_SIGMA = 4.0  # pixels
DIGITS = 4  # decimals of a number that is shared: fine bands of a clean image deviate by a few thousandths


def style_vector(
    image: Tensor, mask: Tensor, valid: Tensor, detail: StyleDetail = StyleDetail.colour
) -> NDArray[np.float64] | None:
    """The numbers of one image, or None if foreground or background is (nearly) missing.

    Args:
        image: (3, H, W) in [0, 1]. mask: (H, W), nonzero is foreground. valid: (H, W) bool.
    """
    front, back = (mask > 0) & valid, (mask == 0) & valid
    if front.sum() < 8 or back.sum() < 8:
        return None
    body = front.numpy()
    perimeter = max(int((body & ~binary_erosion(body)).sum()), 1)
    pixels = image.numpy()
    colours = [part for region in (body, back.numpy()) for part in colour_and_texture(pixels, region)]
    shape = [np.log(front.sum().item() / valid.sum().item()), np.log(body.sum() / perimeter)]
    parts = [*colours, shape]
    if detail is not StyleDetail.colour:
        parts += [texture_numbers(pixels, region) for region in (body, back.numpy())]
    if detail is StyleDetail.spectrum:
        parts.append(low_amplitudes(pixels).ravel())
    low, high = np.array(style_bounds(detail)).T
    return np.clip(np.concatenate(parts), low, high)


def low_amplitudes(image: NDArray[np.float32]) -> NDArray[np.float64]:
    """Amplitudes of the lowest frequencies of ``image`` (3, H, W), of shape `SPECTRUM_SHAPE`, a pixel."""
    spectrum = np.fft.rfft2(image) / image[0].size
    return np.abs(spectrum[:, low_rows(image.shape[1]), : CYCLES + 1]).astype(np.float64)


def low_rows(height: int) -> NDArray[np.int64]:
    """The rows of a spectrum of ``height`` rows that hold -4 to 4 cycles."""
    return np.arange(-CYCLES, CYCLES + 1) % height


def colour_and_texture(image: NDArray[np.float32], region: NDArray[np.bool_]) -> list[NDArray[np.float64]]:
    """Mean of each channel over ``region``, and the standard deviation of what is finer than `TEXTURE_SIGMA`.

    Slow changes of light are left out of the deviation: a generator would paint them as grain.
    """
    weight = gaussian_filter(region.astype(np.float32), TEXTURE_SIGMA) + 1e-6
    slow = np.stack([gaussian_filter(channel * region, TEXTURE_SIGMA) / weight for channel in image])
    return [image[:, region].mean(1, dtype=np.float64), (image - slow)[:, region].std(1, dtype=np.float64)]


def summarise_style(
    patients: Sequence[Patient],
    size: int,
    max_groups: int,
    min_patients: int,
    seed: int,
    detail: StyleDetail = StyleDetail.colour,
) -> StyleSummary:
    """Group the labelled images of ``patients`` and keep the groups that are large enough.

    An image larger than ``size`` pixels (what a generator paints) is described tile by tile: over a whole
    fundus the light changes far more than within one tile, and would be taken for texture.

    Guarantee: every shared group covers at least ``min_patients`` patients. Each number lies within
    `style_bounds`. Groups are made by colour and shape alone, whatever ``detail`` adds.

    Raises:
        DataError: no group is large enough.
    """
    vectors, owners = _vectors(patients, size, detail)
    low, high = np.array(style_bounds(StyleDetail.colour)).T
    groups: list[StyleGroup] = []
    if len(set(owners)) >= min_patients:
        scaled = (vectors[:, : len(STYLE_FIELDS)] - low) / (high - low)
        labels = _cluster(scaled, owners, max_groups, min_patients, seed)
        for label in np.unique(labels):
            member = labels == label
            if len(set(owners[member])) < min_patients:
                continue
            share = max(round(float(member.mean()), 1), 0.1)
            mean, std = (part.round(DIGITS) for part in (vectors[member].mean(0), vectors[member].std(0)))
            groups.append(StyleGroup(share, mean.tolist(), std.tolist()))
    if not groups:
        raise DataError(  # not a policy refusal: how many patients there are is the site's business
            f"no style group of {min_patients} patients: label more patients, lower "
            "policy.min_group_patients, or share no style (policy.allow_style: false)"
        )
    return StyleSummary(groups)


def _vectors(
    patients: Sequence[Patient], size: int, detail: StyleDetail
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    vectors, owners = [], []
    for owner, patient in enumerate(patients):
        for sample in patient.samples:
            for vector in tile_vectors(sample, size, detail):
                vectors.append(vector)
                owners.append(owner)
    return np.array(vectors).reshape(-1, len(style_bounds(detail))), np.array(owners, np.int64)


def tile_vectors(sample: Sample, size: int, detail: StyleDetail) -> Iterator[NDArray[np.float64]]:
    """The vectors of the sample's tiles of about ``size`` pixels that lie inside the field of view."""
    if sample.mask is None:
        return
    foreground = sample.mask.amax(0)
    height, width = foreground.shape
    down, across = max(1, height // size), max(1, width // size)
    for row in range(down):
        for column in range(across):
            where = (
                slice(row * height // down, (row + 1) * height // down),
                slice(column * width // across, (column + 1) * width // across),
            )
            valid = sample.valid[where]
            if valid.float().mean() < 0.9:
                continue
            vector = style_vector(sample.image[:, where[0], where[1]], foreground[where], valid, detail)
            if vector is not None:
                yield vector


def _cluster(
    scaled: NDArray[np.float64], owners: NDArray[np.int64], max_groups: int, min_patients: int, seed: int
) -> NDArray[np.int64]:
    """The finest k-means partition whose groups are all large enough, else the coarsest with one that is.

    Colour separates appearances, size does not: the two shape numbers count a quarter.
    """
    weights = np.array([1.0] * 12 + [0.25] * 2)
    most = min(max_groups, len(set(owners)) // min_patients)
    best = np.zeros(len(scaled), np.int64)
    for count in range(2, most + 1):
        _, labels = kmeans2(scaled * weights, count, minit="++", rng=np.random.default_rng(seed))
        sizes = [len(set(owners[labels == label])) for label in range(count)]
        if min(size for size in sizes if size) < min_patients and count > 2:
            break
        best = labels.astype(np.int64)
    return best


def sample_styles(
    summaries: Sequence[StyleSummary], count: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """``count`` style vectors (count, 14 or more): sites in turn, groups by the root of their weight.

    The root lifts rare appearances, which are what a student of another site lacks. Each is jittered.
    """
    vectors = []
    for index in range(count):
        groups = summaries[index % len(summaries)].groups
        chances = np.sqrt([group.weight for group in groups])
        group = groups[rng.choice(len(groups), p=chances / chances.sum())]
        mean, std = np.array(group.mean), np.array(group.std)
        jitter = rng.normal(size=len(mean))
        if np.allclose(mean[0:3], mean[0]) and np.allclose(mean[6:9], mean[6]):  # grey stays grey
            for start in (0, 3, 6, 9):
                jitter[start : start + 3] = jitter[start]
        vectors.append(within_bounds(mean + 0.7 * std * jitter))
    return np.array(vectors)


def within_bounds(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """``vector``, of any detail, with each number in its bounds."""
    detail = next(one for one in StyleDetail if len(style_bounds(one)) == len(vector))
    return np.clip(vector, *np.array(style_bounds(detail)).T)
