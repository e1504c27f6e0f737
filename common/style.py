"""A site's style summary: the look of its images as a few bounded numbers a group.

This is the only thing that a generator elsewhere needs in order to paint images that look like this
site's; it holds no image, no patient, and no group smaller than the site's policy allows.
"""

from __future__ import annotations

from dataclasses import dataclass

# Colour and fine texture of foreground and background (mean and deviation a channel), then two shape numbers.
STYLE_FIELDS = (
    "fg_mean_r", "fg_mean_g", "fg_mean_b", "fg_std_r", "fg_std_g", "fg_std_b",
    "bg_mean_r", "bg_mean_g", "bg_mean_b", "bg_std_r", "bg_std_g", "bg_std_b",
    "log_coverage", "log_area_over_perimeter",
)  # fmt: skip
STYLE_BOUNDS: tuple[tuple[float, float], ...] = ((0.0, 1.0),) * 12 + ((-8.0, 0.0), (-2.0, 5.0))


@dataclass(frozen=True)
class StyleGroup:
    """One diagonal Gaussian over style vectors (`STYLE_FIELDS`), each within `STYLE_BOUNDS`.

    ``weight`` is the group's share of the site's images, rounded to a tenth.
    """

    weight: float
    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class StyleSummary:
    groups: list[StyleGroup]
