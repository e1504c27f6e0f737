"""Comparison: what is far off is quarantined with its reason; honest sites that were measured are not."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from server.geometry import Geometry
from server.outliers import EARLY, NORM_RATIO, OPPOSED, TOO_LARGE, Findings, compare
from server.steps import Group

SIZE = 100_000

RETINA = ("chase", "diabetic", "glaucoma", "healthy")
DEMO = ("harbour", "northfield", "oldtown", "southgate", "tiny")
NUCLEI = ("site-1", "site-2", "site-3", "site-4")


@dataclass(frozen=True)
class Measured:
    """A round of honest sites: norms of their changes, and cosines above the diagonal."""

    progress: float
    norms: dict[str, float]
    cosines: list[float]

    def geometry(self, scales: Mapping[str, float]) -> Geometry:
        """With the change of each site of ``scales`` so many times as long; negative: turned round."""
        count = len(self.norms)
        cosines = torch.eye(count, dtype=torch.float64)
        for (row, column), value in zip(itertools.combinations(range(count), 2), self.cosines, strict=True):
            cosines[row, column] = cosines[column, row] = value
        lengths = [norm * scales.get(site, 1.0) for site, norm in self.norms.items()]
        gram = cosines * torch.outer(torch.tensor(lengths).double(), torch.tensor(lengths).double())
        return Geometry(tuple(self.norms), {Group.factors: gram}, {Group.factors: SIZE})

    def quarantined(self, scales: Mapping[str, float] | None = None) -> dict[str, str]:
        return compare(self.geometry(scales or {}), self.progress).quarantined()


def measured(progress: float, sites: Sequence[str], norms: list[float], cosines: list[float]) -> Measured:
    return Measured(progress, dict(zip(sites, norms, strict=True)), cosines)


# The hardest rounds that were measured: a site with another camera than the rest, one with 2 patients beside
# 12, and sites that pull against each other at the end of training.
MEASURED = {
    "retina, 1 of 3, decoder": measured(
        0, RETINA, [4.031, 3.504, 3.395, 3.72], [0.07, 0.01, 0.14, 0.38, 0.28, 0.38]
    ),
    "retina, 2 of 3, factors": measured(
        1 / 3, RETINA, [0.218, 0.096, 0.112, 0.074], [-0.22, -0.16, -0.17, 0.41, 0.25, 0.18]
    ),
    "retina, 2 of 6, factors": measured(
        1 / 6, RETINA, [0.314, 0.123, 0.117, 0.089], [-0.09, -0.05, 0.19, 0.38, 0.13, 0.1]
    ),
    "retina, 6 of 6, factors": measured(
        5 / 6, RETINA, [0.021, 0.02, 0.026, 0.033], [-0.3, 0.05, 0.26, 0.57, -0.63, -0.66]
    ),
    "nuclei, 1 of 3, decoder": measured(
        0, NUCLEI, [4.28, 2.934, 3.816, 3.491], [0.04, 0.18, 0.34, 0.31, 0.26, 0.1]
    ),
    "three of demo, 3 of 8, decoder": measured(2 / 8, DEMO[:3], [2.546, 2.533, 2.552], [-0.21, -0.08, 0.05]),
    "three of demo, 8 of 8, decoder": measured(7 / 8, DEMO[:3], [0.472, 0.503, 0.407], [-0.51, -0.12, 0.09]),
    "demo, 1 of 3, decoder": measured(
        0, DEMO, [4.082, 4.274, 4.009, 4.761, 4.503],
        [0.12, 0.46, 0.05, -0.02, 0.42, 0.24, 0.29, 0.1, 0.26, 0.1]
    ),
    "demo, 1 of 3, factors beside a trained head": measured(
        0, DEMO, [1.875, 1.868, 2.088, 1.701, 1.855],
        [0.28, 0.63, 0.03, 0.08, 0.63, 0.03, 0.46, 0.08, 0.35, 0.22]
    ),
    "demo, 2 of 3, factors": measured(
        1 / 3, DEMO, [0.149, 0.098, 0.139, 0.136, 0.203],
        [-0.26, 0.22, -0.01, -0.16, -0.04, -0.17, 0.25, -0.08, 0.14, -0.3],
    ),
}  # fmt: skip


def compare_early(found: Geometry) -> Findings:
    return compare(found, progress=0.0)


def geometry(vectors: Mapping[str, Tensor], size: int = SIZE) -> Geometry:
    """Of one dense vector a site."""
    sites = tuple(sorted(vectors))
    stacked = torch.stack([vectors[site].double() for site in sites])
    grams = {Group.factors: torch.zeros(len(sites), len(sites)).double(), Group.dense: stacked @ stacked.T}
    return Geometry(sites, grams, {Group.factors: 0, Group.dense: size})


def cluster(sites: int, cosine: float, size: int = 4000, seed: int = 0) -> dict[str, Tensor]:
    """Vectors of length about 1 with about this cosine to each other."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(size, generator=generator)
    own = torch.randn(sites, size, generator=generator)
    mixed = (cosine**0.5 * common + (1 - cosine) ** 0.5 * own) / size**0.5
    return {f"site-{index}": row for index, row in enumerate(mixed)}


@pytest.mark.parametrize("name", MEASURED)
def test_honest_sites_that_were_measured_are_kept(name: str) -> None:
    found = compare(MEASURED[name].geometry({}), MEASURED[name].progress)
    assert (found.quarantined(), found.spared) == ({}, [])


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("demo, 1 of 3, decoder", ["northfield", "oldtown"]),
        ("demo, 1 of 3, factors beside a trained head", ["northfield", "oldtown", "tiny"]),
        ("retina, 1 of 3, decoder", ["diabetic", "glaucoma", "healthy"]),
        ("nuclei, 1 of 3, decoder", ["site-2", "site-4"]),
    ],
)
def test_measured_sites_turned_round_are_found_alone(name: str, sites: list[str]) -> None:
    """Those of a first round whose changes agreed with the others'."""
    for site in sites:
        assert MEASURED[name].quarantined({site: -1.0}) == {site: OPPOSED}


def test_angles_are_not_judged_late() -> None:
    """The same turned sites, and honest ones that pull apart by the end of training."""
    first = MEASURED["demo, 1 of 3, decoder"].geometry({"oldtown": -1.0})
    assert compare(first, EARLY - 1e-9).quarantined() == {"oldtown": OPPOSED}
    assert compare(first, EARLY).quarantined() == {}
    last = MEASURED["three of demo, 8 of 8, decoder"]
    assert compare(last.geometry({}), 0.0).quarantined() == {"harbour": OPPOSED}
    assert last.quarantined() == {}


@pytest.mark.parametrize("name", MEASURED)
def test_a_measured_site_a_hundred_times_as_far_is_found(name: str) -> None:
    for site in MEASURED[name].norms:
        for factor in (100.0, -100.0):
            assert MEASURED[name].quarantined({site: factor}) == {site: TOO_LARGE}


@pytest.mark.parametrize("bad", range(5))
def test_one_of_five_turned_round_is_found_where_they_agree(bad: int) -> None:
    vectors = cluster(5, 0.5)
    vectors[f"site-{bad}"] = -vectors[f"site-{bad}"]
    assert compare_early(geometry(vectors)).quarantined() == {f"site-{bad}": OPPOSED}


def test_one_of_three_turned_round_is_found_where_they_agree() -> None:
    vectors = cluster(3, 0.5)
    vectors["site-1"] = -vectors["site-1"]
    assert compare_early(geometry(vectors)).quarantined() == {"site-1": OPPOSED}


def test_against_others_who_do_not_agree_is_no_fault() -> None:
    """As hospitals do when a model is nearly trained, all pull apart: the cosines are about -1 / (n - 1)."""
    vectors = cluster(4, 0.0)
    mean = torch.stack(list(vectors.values())).mean(0)
    assert (
        compare_early(geometry({site: vector - mean for site, vector in vectors.items()})).quarantined() == {}
    )


@pytest.mark.parametrize("noise", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("seed", range(5))
def test_privacy_noise_trips_nothing(noise: float, seed: int) -> None:
    """Noise of every size beside a signal of length 1, in which the sites agree or do not."""
    generator = torch.Generator().manual_seed(seed)
    for cosine in (0.0, 0.5):
        vectors = cluster(5, cosine, seed=seed)
        noised = {
            site: vector + noise * torch.randn(vector.shape, generator=generator) / len(vector) ** 0.5
            for site, vector in vectors.items()
        }
        assert compare_early(geometry(noised, size=4000)).quarantined() == {}


def test_a_group_of_a_few_numbers_is_not_judged_by_its_angles() -> None:
    """Five sites with 17 numbers each: noise alone makes every angle."""
    agreeing = cluster(5, 0.5)
    agreeing["site-0"] = -agreeing["site-0"]
    assert compare_early(geometry(agreeing, size=17)).quarantined() == {}


def test_a_small_change_is_never_quarantined() -> None:
    vectors = cluster(5, 0.5)
    for scale in (0.0, 1e-6, 1e-2):
        small = vectors | {"site-2": scale * vectors["site-2"]}
        assert compare_early(geometry(small)).quarantined() == {}


def test_of_two_sites_none_is_quarantined() -> None:
    vectors = cluster(2, 0.5)
    assert compare_early(geometry(vectors | {"site-0": -1000 * vectors["site-0"]})).quarantined() == {}
    assert compare_early(geometry({"a": vectors["site-0"]})).quarantined() == {}
    assert compare_early(geometry(cluster(3, 0.5)).only(set())).sites == {}


def test_three_equal_norms_and_a_slightly_larger_one_are_no_outlier() -> None:
    """The spread is zero, so that every difference is many deviations: the ratio decides."""
    vector = cluster(1, 0.5)["site-0"]
    for ratio, reasons in ((0.99 * NORM_RATIO, {}), (1.01 * NORM_RATIO, {"d": TOO_LARGE})):
        vectors = {"a": vector, "b": vector, "c": vector, "d": ratio * vector}
        assert compare_early(geometry(vectors)).quarantined() == reasons


def test_where_norms_spread_widely_a_large_one_is_no_outlier() -> None:
    vectors = cluster(5, 0.5)
    spread = {
        site: scale * vector
        for scale, (site, vector) in zip((1, 4, 16, 64, 256), vectors.items(), strict=True)
    }
    assert compare_early(geometry(spread)).quarantined() == {}


def test_fewer_than_half_are_quarantined() -> None:
    """Two of four lie far off, in different ways: the stronger one goes, and the other is named."""
    vectors = cluster(4, 0.6)
    grams = geometry(vectors | {"site-0": 1000 * vectors["site-0"]}).grams
    other = geometry(vectors | {"site-1": 50 * vectors["site-1"]}).grams
    both = Geometry(
        tuple(vectors), {Group.factors: grams[Group.dense], Group.dense: other[Group.dense]},
        {Group.factors: SIZE, Group.dense: SIZE},
    )  # fmt: skip
    findings = compare_early(both)
    assert findings.quarantined() == {"site-0": TOO_LARGE}
    assert findings.spared == ["site-1"]


def test_a_change_that_is_too_large_has_no_say_in_the_directions() -> None:
    vectors = cluster(5, 0.5)
    vectors["site-4"] = 100 * torch.randn(4000, generator=torch.Generator().manual_seed(9)) / 4000**0.5
    vectors["site-3"] = -vectors["site-3"]
    assert compare_early(geometry(vectors)).quarantined() == {"site-4": TOO_LARGE, "site-3": OPPOSED}


def test_what_is_found_is_said_of_every_site() -> None:
    vectors = cluster(3, 0.5)
    findings = compare_early(geometry(vectors | {"site-2": 0 * vectors["site-2"]}))
    assert list(findings.sites) == ["site-0", "site-1", "site-2"]
    first = findings.sites["site-0"]
    assert first.norms == pytest.approx({Group.dense: float(vectors["site-0"].norm())})
    assert first.cosines[Group.dense] == pytest.approx(0.5, abs=0.1)
    assert findings.sites["site-2"].cosines == {}
