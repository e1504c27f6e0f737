"""A site's style summary with noise: what a private run shares of its look (`privacy.style_epsilon`).

Every labelled training patient counts once, in the one of `CELLS` public cells that the patient's look falls
into, and adds to that cell how far the look lies from the cell's centre. Cells, centres and ranges are
fixed here and depend on no data, so groups need no clustering of patients. What a patient adds is one vector
of norm 1 at most, so all sums and counts together are one query of the Gaussian mechanism under adding or
removing one patient (Dwork and Roth 2014, appendix A), with a patient's zeros in all other cells. Its event
and its noise come from one `PrivacyPlan` with a sample rate of 1.

Gaussian rather than Laplace noise: at the same epsilon of its own it costs the run far less, since its tail
shares the run's delta. Beside noised steps of epsilon 8 (delta 1e-5) a summary of epsilon 2 makes 8.39 in all
with Gaussian and 9.76 with Laplace noise; and a bound on the Euclidean norm suits numbers that all vary.

Sums are of whole ticks, and so is the noise on them: what leaves is the mechanism's answer, rounded, and a
float's low bits give nobody away (Mironov 2012). No spread of a group leaves: sums of squares of so few
patients drown in their noise, so `SPREAD` stands in.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from client.dp.randomness import Randomness
from client.patients import Patient
from client.style import DIGITS, tile_vectors
from common.privacy.plan import PrivacyPlan
from common.recipe import StyleDetail
from common.style import STYLE_BOUNDS, StyleGroup, StyleSummary

Numbers = NDArray[np.float64]

# A look: brightness and fine grain of foreground and background, the two shape numbers of `STYLE_FIELDS`, and
# how far red and blue lie from the brightness. Each is clipped into its range; shapes and grain count a
# quarter, as they do where groups are made without noise.
RANGES = np.array(
    [(0.0, 1.0), (0.0, 1.0), (0.0, 0.25), (0.0, 0.25), (-6.0, 0.0), (-1.0, 3.0)] + [(-0.5, 0.5)] * 4
)
WEIGHTS = np.array([1.0, 1.0, 0.25, 0.25, 0.25, 0.25, 1.0, 1.0, 1.0, 1.0])
TINTS = slice(6, 10)
GREY = 0.05  # of the full range: the most that channels of a grey image differ by
REACH = 0.3  # the longest distance from a centre, in weighted ranges; a look farther off is drawn in
# Cells by brightness: background dark or bright, foreground darker or brighter than it. The centres are the
# centroids of these four parts of the square (foreground, background); grey cells, then coloured ones.
CENTRES = ((1 / 6, 1 / 3), (11 / 18, 2 / 9), (7 / 18, 7 / 9), (5 / 6, 2 / 3))
CELLS = 2 * len(CENTRES)
SPREAD = (1 / 8, 1 / 16)  # of each range: the spread of a group of grey and of coloured images
COUNT, SHARE = 0.6, 0.8  # of a patient's norm of 1, at right angles: for the count, for the distance
TICKS = 50_000  # steps of a norm of 1
FALSE_GROUP = 0.1  # chance that any cell without patients passes for a group


def noised_style(
    patients: Sequence[Patient], size: int, plan: PrivacyPlan, limits: tuple[int, int], source: Randomness
) -> StyleSummary:
    """The style summary of the labelled ``patients``, by one release of ``plan``.

    Args:
        size: of a tile, pixels.
        limits: the least patients a group should have, and the most groups.
    """
    sums = summed(patients, size, plan.max_images_per_patient)
    return summary_of(noised(sums, plan, source), plan.noise_multiplier / COUNT, limits)


def noised(totals: NDArray[np.int64], plan: PrivacyPlan, source: Randomness) -> Numbers:
    """``totals`` (`summed`) with the noise of ``plan``, in norms of 1; still whole ticks.

    The noise is ``plan.noise_multiplier`` times the largest norm of a patient's share, which is 1.
    """
    ticks = np.rint(source.normals(totals.shape).numpy() * (plan.noise_multiplier * TICKS))
    return np.asarray((totals + ticks.astype(np.int64)) / TICKS)


def summed(patients: Sequence[Patient], size: int, images: int) -> NDArray[np.int64]:
    """A row a cell (`CELLS`, 11), in ticks: its patients' count, and their distances from its centre.

    Guarantee: one patient more or less moves one row, by a vector of norm `TICKS` at most, whatever the
    images are; how many patients there are decides nothing else.

    Args:
        images: of one patient that are looked at, at most.
    """
    totals = np.zeros((CELLS, 1 + len(RANGES)), np.int64)
    for patient in patients:
        look = look_of(patient, size, images)
        if look is not None:
            cell = cell_of(look)
            totals[cell] += share_of(look, cell)
    return totals


def look_of(patient: Patient, size: int, images: int) -> Numbers | None:
    """The mean over the tiles of the patient's first ``images`` labelled images, or None if it is no number.

    A patient without foreground, without background or with a value that is not finite has none.
    """
    labelled = [sample for sample in patient.samples if sample.mask is not None][:images]
    with np.errstate(all="ignore"):  # of broken images: what they lead to is looked at below
        vectors = [v for sample in labelled for v in tile_vectors(sample, size, StyleDetail.colour)]
        if not vectors or not np.isfinite(vectors).all():
            return None
        front, front_grain, back, back_grain = np.mean(vectors, axis=0)[:12].reshape(4, 3)
        shape = np.mean(vectors, axis=0)[12:]
    tints = [colour[place] - colour.mean() for colour in (front, back) for place in (0, 2)]
    look = [front.mean(), back.mean(), front_grain.mean(), back_grain.mean(), *shape, *tints]
    if max(np.ptp(front), np.ptp(back)) <= GREY:
        look[TINTS] = [0.0] * 4
    return np.asarray(np.clip(look, *RANGES.T))


def cell_of(look: Numbers) -> int:
    """By that look alone."""
    front, back = look[:2]
    coloured = bool(look[TINTS].any())
    return int(front >= back) + 2 * int(back >= 0.5) + len(CENTRES) * int(coloured)


def share_of(look: Numbers, cell: int) -> NDArray[np.int64]:
    """What a patient of that look adds to its cell, in ticks: (11,).

    Guarantee: its norm is at most `TICKS`. Every number is cut towards zero, which makes no vector longer.
    """
    away = (look - centre_of(cell)) / np.ptp(RANGES, axis=1) * WEIGHTS
    away *= SHARE / max(REACH, float(np.linalg.norm(away)))
    return np.array([round(COUNT * TICKS), *np.trunc(away * TICKS)], np.int64)


def centre_of(cell: int) -> Numbers:
    """The public centre of a cell: (10,). Its shapes and grain are the middle of their ranges."""
    centre = RANGES.mean(axis=1)
    centre[:2] = CENTRES[cell % len(CENTRES)]
    return centre


def summary_of(sums: Numbers, deviation: float, limits: tuple[int, int]) -> StyleSummary:
    """What noised sums (`summed`, in norms of 1) say; it looks at nothing else, so it costs nothing.

    Args:
        deviation: of the noise on a count, patients; 0 for sums without noise.
    """
    sizes = told_cells(sums, deviation, limits)
    total = sum(sizes.values())
    groups = []
    for cell, size in sizes.items():
        away = sums[cell, 1:] / SHARE * REACH / size
        away *= REACH / max(REACH, float(np.linalg.norm(away)))  # a mean of looks lies no farther off
        weight = min(1.0, max(0.1, round(size / total, 1)))
        groups.append(_group(weight, centre_of(cell) + away / WEIGHTS * np.ptp(RANGES, axis=1), cell))
    return StyleSummary(groups)


def told_cells(sums: Numbers, deviation: float, limits: tuple[int, int]) -> dict[int, float]:
    """The cells that are told of, the fullest first, and the patients that each is taken to have.

    A cell whose noised count is below the least, or below what noise makes of an empty one, is left out; if
    all are, the fullest is told.
    """
    least, most = limits
    floor = max(float(least), deviation * NormalDist().inv_cdf(1 - FALSE_GROUP / CELLS))
    counts = sums[:, 0] / COUNT
    fullest = [int(cell) for cell in np.argsort(-counts, kind="stable")]
    kept = [cell for cell in fullest if counts[cell] >= floor][:most] or fullest[:1]
    return {cell: max(float(counts[cell]), floor) for cell in kept}


def _group(weight: float, look: Numbers, cell: int) -> StyleGroup:
    """The group in `STYLE_FIELDS`: a grey cell's channels are equal to the last digit."""
    coloured = cell >= len(CENTRES)
    look = np.clip(look, *RANGES.T)
    front, back, front_grain, back_grain, *shape = look[: TINTS.start]
    red, blue = (look[TINTS].reshape(2, 2) * coloured).T
    fields = [
        *_channels(front, red[0], blue[0]), *[front_grain] * 3,
        *_channels(back, red[1], blue[1]), *[back_grain] * 3, *shape,
    ]  # fmt: skip
    mean = np.clip(fields, *np.array(STYLE_BOUNDS).T).round(DIGITS)
    widths = np.ptp(RANGES, axis=1)
    spread = SPREAD[coloured] * np.concatenate([np.repeat(widths[[0, 2, 1, 3]], 3), widths[4 : TINTS.start]])
    return StyleGroup(weight, mean.tolist(), spread.round(DIGITS).tolist())


def _channels(brightness: float, red: float, blue: float) -> list[float]:
    """The colour whose mean over red, green and blue is ``brightness``."""
    return [brightness + red, brightness - red - blue, brightness + blue]
