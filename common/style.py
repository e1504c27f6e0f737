"""A site's style summary: the look of its images as a few bounded numbers a group.

This is the only thing that a painter elsewhere needs in order to paint images that look like this
site's; it holds no image, no patient, and no group smaller than the site's policy allows.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.recipe import StyleDetail

# Colour and fine texture of foreground and background (mean and deviation a channel), then two shape numbers.
STYLE_FIELDS = (
    "fg_mean_r", "fg_mean_g", "fg_mean_b", "fg_std_r", "fg_std_g", "fg_std_b",
    "bg_mean_r", "bg_mean_g", "bg_mean_b", "bg_std_r", "bg_std_g", "bg_std_b",
    "log_coverage", "log_area_over_perimeter",
)  # fmt: skip
STYLE_BOUNDS: tuple[tuple[float, float], ...] = ((0.0, 1.0),) * 12 + ((-8.0, 0.0), (-2.0, 5.0))

# Of foreground and background: the deviation of luminance in each band between two of these blurs (pixels),
# that of what is slower than the last (shading), and the skewness of the finest grain (speckle is skewed).
BAND_EDGES = (0.7, 1.4, 2.8, 5.6)
TEXTURE_PARTS = (*(f"band_{edge:g}" for edge in BAND_EDGES), "shading", "skewness")
TEXTURE_FIELDS = tuple(f"{region}_{part}" for region in ("fg", "bg") for part in TEXTURE_PARTS)
TEXTURE_BOUNDS = (((0.0, 0.5),) * (len(BAND_EDGES) + 1) + ((-3.0, 3.0),)) * 2

# Amplitudes of the lowest frequencies of a tile, as shares of its pixels: up to this many cycles a tile in
# each direction; the other half of the plane is the mirror image.
CYCLES = 4
SPECTRUM_SHAPE = (3, 2 * CYCLES + 1, CYCLES + 1)  # channel, cycles down (from -4), cycles across
SPECTRUM_FIELDS = tuple(
    f"amplitude_{channel}_{down}_{across}"
    for channel in "rgb"
    for down in range(-CYCLES, CYCLES + 1)
    for across in range(CYCLES + 1)
)
SPECTRUM_BOUNDS = ((0.0, 1.0),) * len(SPECTRUM_FIELDS)

TEXTURE = slice(len(STYLE_FIELDS), len(STYLE_FIELDS) + len(TEXTURE_FIELDS))  # of a vector that has them
SPECTRUM = slice(TEXTURE.stop, TEXTURE.stop + len(SPECTRUM_FIELDS))


def style_fields(detail: StyleDetail) -> tuple[str, ...]:
    """The names of a style vector's numbers, in their order; a finer detail adds to a coarser one."""
    texture = TEXTURE_FIELDS if detail is not StyleDetail.colour else ()
    return STYLE_FIELDS + texture + (SPECTRUM_FIELDS if detail is StyleDetail.spectrum else ())


def style_bounds(detail: StyleDetail) -> tuple[tuple[float, float], ...]:
    """Lowest and highest value of each of `style_fields`."""
    texture = TEXTURE_BOUNDS if detail is not StyleDetail.colour else ()
    return STYLE_BOUNDS + texture + (SPECTRUM_BOUNDS if detail is StyleDetail.spectrum else ())


@dataclass(frozen=True)
class StyleGroup:
    """One diagonal Gaussian over style vectors (`style_fields`), each within `style_bounds`.

    ``weight`` is the group's share of the site's images, rounded to a tenth.
    """

    weight: float
    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class StyleSummary:
    groups: list[StyleGroup]
