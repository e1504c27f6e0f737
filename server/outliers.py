"""Comparison: the change of each site of a round against those of the others, and who is quarantined.

A quarantined update is dropped with a reason, by name, and reported. The comparison is made in each group of
tensors apart. The constants were set by 380 changes of honest sites: ten runs of the recipes demo (three
sites, or five of which one has 2 patients and the others 12), nuclei (four or eight) and retina (four, one
with another camera and population), in three to eight rounds, with two presets and two trainings of the
decoder. None of these changes is quarantined.

What it cannot see: an update of ordinary size that is wrong in an ordinary way, such as one trained on wrong
labels; one turned against the others later than early, or where they do not agree themselves; or the weight
that is declared with it. Robust estimators (`server.robust`) bound what one such site does to the others.
What it alone has images of it can still unteach, for it looks like an honest site that is unlike the rest
(`simulations.attacks`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch

from server.geometry import Geometry
from server.steps import Group

LEAST_SITES = 3  # of two sites that differ, none can say which is wrong

# A norm is far off when its logarithm lies this many robust standard deviations above the median of the
# others'. By itself this trips honest sites, where norms are nearly equal: 1097 at a ratio of 1.19 was seen.
NORM_Z = 4.0
MAD_TO_STD = 1.4826  # median absolute deviation to standard deviation, of a normal distribution
# It must also be this many times that median. Honest changes reached 2.67, those of the site with another
# camera; the site of 2 patients beside 12 reached 1.89.
NORM_RATIO = 4.0

# Angles are judged in this first share of the rounds. While a model is learnt, hospitals pull the same way;
# once it is nearly trained their steps cancel, and the one unlike the rest pulls against all of them. Honest
# medians of cosines were down to -0.63 late, and to -0.14 early.
EARLY = 1 / 3
# A change is against the others' when the median of its cosines to them is below the first constant, and
# that of the cosines among them above the second. In first rounds of four sites or more, 23 of 40 sites are
# found when they are turned round, and never another one for them; the rest hardly agreed with the others
# before they were turned. Of three sites none was found.
AGAINST = -0.2
AGREEMENT = 0.05
# Cosines of independent noise have a standard deviation of about 1 / sqrt(size). The bound is at least this
# many of them away from 0, so that a group of few numbers is not judged.
NOISE_Z = 5.0

TOO_LARGE = "a change far larger than the others'"
OPPOSED = "a change against the others'"


@dataclass(frozen=True)
class SiteFinding:
    """One site beside the others.

    Attributes:
        norms: group -> norm of the site's change.
        cosines: group -> median of its cosines to the others; absent where there is nothing to compare.
        reason: why it is quarantined, in fixed words; empty: it is not.
    """

    norms: dict[str, float]
    cosines: dict[str, float]
    reason: str = ""


@dataclass(frozen=True)
class Findings:
    """``spared`` are outliers that stay: so many at once are no outliers, the strongest apart."""

    sites: dict[str, SiteFinding]
    spared: list[str]

    def quarantined(self) -> dict[str, str]:
        """Site -> reason."""
        return {site: finding.reason for site, finding in self.sites.items() if finding.reason}


def compare(geometry: Geometry, progress: float) -> Findings:
    """Every site beside the others.

    Guarantees: fewer than half of the sites are quarantined; of two sites, none; a small change, never.

    Args:
        progress: share of the stage's rounds that were over before this one, from 0; 1 for a run that goes
            on from an adapter that was trained before.
    """
    suspects = _suspects(geometry, progress < EARLY)
    most = (len(geometry.sites) - 1) // 2
    reasons = dict(suspects[:most])
    norms = {group: geometry.norms(group).tolist() for group in geometry.moved()}
    cosines = {group: _median_cosines(geometry, group) for group in geometry.moved()}
    found = {
        site: SiteFinding(
            {group: values[row] for group, values in norms.items()},
            {group: values[site] for group, values in cosines.items() if site in values},
            reasons.get(site, ""),
        )
        for row, site in enumerate(geometry.sites)
    }
    return Findings(found, [site for site, _ in suspects[most:]])


def _suspects(geometry: Geometry, angles: bool) -> list[tuple[str, str]]:
    """Sites and reasons, the strongest first. A change that is too large has no say in the ``angles``."""
    large: dict[str, float] = {}
    for group in geometry.moved():
        norms = dict(zip(geometry.sites, geometry.norms(group).tolist(), strict=True))
        for site, ratio in _too_large(norms).items():
            large[site] = max(ratio, large.get(site, 0.0))
    rest = geometry.only(set(geometry.sites) - set(large))
    opposed: dict[str, float] = {}
    for group in rest.moved() if angles else ():
        for site, cosine in _opposed(rest, group).items():
            opposed[site] = min(cosine, opposed.get(site, 0.0))
    by_size = sorted(large, key=lambda site: (-large[site], site))
    by_angle = sorted(opposed, key=lambda site: (opposed[site], site))
    return [(site, TOO_LARGE) for site in by_size] + [(site, OPPOSED) for site in by_angle]


def _too_large(norms: Mapping[str, float]) -> dict[str, float]:
    """Site -> how many times the median of the others' norms its own is, where that is far too much."""
    present = {site: norm for site, norm in norms.items() if norm > 0}
    found = {}
    for site, norm in present.items() if len(present) >= LEAST_SITES else ():
        others = [math.log(other) for name, other in present.items() if name != site]
        middle = median(others)
        spread = MAD_TO_STD * median(abs(other - middle) for other in others)
        above = math.log(norm) - middle
        if above > NORM_Z * spread and above > math.log(NORM_RATIO):
            found[site] = math.exp(above)
    return found


def _opposed(geometry: Geometry, group: Group) -> dict[str, float]:
    """Site -> median of its cosines to the others, where it is against them and they agree."""
    bound = min(AGAINST, -NOISE_Z / math.sqrt(geometry.sizes[group]))
    own = _median_cosines(geometry, group)
    if len(own) < LEAST_SITES:
        return {}
    return {
        site: cosine
        for site, cosine in own.items()
        if cosine < bound and _agreement(geometry, group, set(own) - {site}) > AGREEMENT
    }


def _median_cosines(geometry: Geometry, group: Group) -> dict[str, float]:
    """Site -> median of its cosines to the others, among the sites that changed something."""
    norms, cosines = geometry.norms(group), geometry.cosines(group)
    rows = [row for row in range(len(geometry.sites)) if norms[row] > 0]
    if len(rows) < 2:
        return {}
    return {
        geometry.sites[row]: median(float(cosines[row, other]) for other in rows if other != row)
        for row in rows
    }


def _agreement(geometry: Geometry, group: Group, sites: set[str]) -> float:
    """The median of the cosines of all pairs of ``sites``."""
    cosines = geometry.only(sites).cosines(group)
    above, right = torch.triu_indices(len(sites), len(sites), offset=1)
    return median(cosines[above, right].tolist())
