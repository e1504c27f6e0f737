"""Comparison: what is far off is quarantined with its reason; honest sites that were measured are not."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from server.geometry import Geometry
from server.outliers import AGAINST, NORM_RATIO, OPPOSED, TOO_LARGE, compare
from server.steps import Group

SIZE = 100_000

# Rounds of honest sites that were measured (recipes demo and retina): norms, and cosines above the diagonal.
# The hardest of them: another camera than the rest, and 2 patients beside 12.
MEASURED: dict[str, tuple[dict[str, float], list[float]]] = {
    "retina, round 1, decoder": (
        {"chase": 4.031, "diabetic": 3.504, "glaucoma": 3.395, "healthy": 3.72},
        [0.07, 0.01, 0.14, 0.38, 0.28, 0.38],
    ),
    "retina, round 2, factors": (
        {"chase": 0.218, "diabetic": 0.096, "glaucoma": 0.112, "healthy": 0.074},
        [-0.22, -0.16, -0.17, 0.41, 0.25, 0.18],
    ),
    "retina, round 3, decoder": (
        {"chase": 0.777, "diabetic": 0.705, "glaucoma": 0.766, "healthy": 0.695},
        [-0.17, 0.01, -0.17, 0.36, 0.08, 0.18],
    ),
    "demo, round 1, decoder": (
        {"harbour": 4.082, "northfield": 4.274, "oldtown": 4.009, "southgate": 4.761, "tiny": 4.503},
        [0.12, 0.46, 0.05, -0.02, 0.42, 0.24, 0.29, 0.1, 0.26, 0.1],
    ),
    "demo, round 2, factors": (
        {"harbour": 0.149, "northfield": 0.098, "oldtown": 0.139, "southgate": 0.136, "tiny": 0.203},
        [-0.26, 0.22, -0.01, -0.16, -0.04, -0.17, 0.25, -0.08, 0.14, -0.3],
    ),
    "demo, round 3, factors": (
        {"harbour": 0.04, "northfield": 0.043, "oldtown": 0.035, "southgate": 0.048, "tiny": 0.058},
        [-0.44, 0.34, 0.13, -0.3, -0.24, -0.08, 0.37, 0.02, -0.3, -0.03],
    ),
}


def geometry(vectors: Mapping[str, Tensor], size: int = SIZE) -> Geometry:
    """Of one dense vector a site."""
    sites = tuple(sorted(vectors))
    stacked = torch.stack([vectors[site].double() for site in sites])
    grams = {Group.factors: torch.zeros(len(sites), len(sites)).double(), Group.dense: stacked @ stacked.T}
    return Geometry(sites, grams, {Group.factors: 0, Group.dense: size})


def with_cosines(norms: Mapping[str, float], above: Sequence[float]) -> Geometry:
    count = len(norms)
    cosines = torch.eye(count, dtype=torch.float64)
    for (row, column), value in zip(itertools.combinations(range(count), 2), above, strict=True):
        cosines[row, column] = cosines[column, row] = value
    lengths = torch.tensor(list(norms.values()), dtype=torch.float64)
    gram = cosines * lengths[:, None] * lengths
    return Geometry(tuple(norms), {Group.factors: gram}, {Group.factors: SIZE})


def flipped(found: Geometry, site: str) -> Geometry:
    """The same round with that site's change turned round."""
    signs = torch.tensor([-1.0 if each == site else 1.0 for each in found.sites], dtype=torch.float64)
    return Geometry(
        found.sites,
        {group: gram * signs[:, None] * signs for group, gram in found.grams.items()},
        found.sizes,
    )


def cluster(sites: int, cosine: float, size: int = 4000, seed: int = 0) -> dict[str, Tensor]:
    """Vectors of length about 1 with about this cosine to each other."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(size, generator=generator)
    own = torch.randn(sites, size, generator=generator)
    mixed = (cosine**0.5 * common + (1 - cosine) ** 0.5 * own) / size**0.5
    return {f"site-{index}": row for index, row in enumerate(mixed)}


@pytest.mark.parametrize("round_", MEASURED)
def test_honest_sites_that_were_measured_are_kept(round_: str) -> None:
    findings = compare(with_cosines(*MEASURED[round_]))
    assert findings.quarantined() == {}
    assert findings.spared == []


@pytest.mark.parametrize(("round_", "site"), [("demo, round 1, decoder", "oldtown"),
                                              ("retina, round 1, decoder", "glaucoma")])  # fmt: skip
def test_a_measured_site_turned_round_is_found(round_: str, site: str) -> None:
    assert compare(flipped(with_cosines(*MEASURED[round_]), site)).quarantined() == {site: OPPOSED}


@pytest.mark.parametrize("site", ["harbour", "northfield", "oldtown", "southgate", "tiny"])
@pytest.mark.parametrize("round_", [name for name in MEASURED if name.startswith("demo")])
def test_a_measured_site_a_hundred_times_as_far_is_found(round_: str, site: str) -> None:
    norms, cosines = MEASURED[round_]
    scaled = {name: norm * (100 if name == site else 1) for name, norm in norms.items()}
    assert compare(with_cosines(scaled, cosines)).quarantined() == {site: TOO_LARGE}


@pytest.mark.parametrize("bad", range(5))
def test_one_of_five_turned_round_is_found_where_they_agree(bad: int) -> None:
    vectors = cluster(5, 0.5)
    vectors[f"site-{bad}"] = -vectors[f"site-{bad}"]
    assert compare(geometry(vectors)).quarantined() == {f"site-{bad}": OPPOSED}


def test_one_of_three_turned_round_is_found_where_they_agree() -> None:
    vectors = cluster(3, 0.5)
    vectors["site-1"] = -vectors["site-1"]
    assert compare(geometry(vectors)).quarantined() == {"site-1": OPPOSED}


def test_against_others_who_do_not_agree_is_no_fault() -> None:
    """As hospitals do when a model is nearly trained, all pull apart: the cosines are about -1 / (n - 1)."""
    vectors = cluster(4, 0.0)
    mean = torch.stack(list(vectors.values())).mean(0)
    assert compare(geometry({site: vector - mean for site, vector in vectors.items()})).quarantined() == {}


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
        assert compare(geometry(noised, size=4000)).quarantined() == {}


def test_a_group_of_a_few_numbers_is_not_judged_by_its_angles() -> None:
    """Five sites with 17 numbers each: noise alone makes every angle."""
    agreeing = cluster(5, 0.5)
    agreeing["site-0"] = -agreeing["site-0"]
    assert compare(geometry(agreeing, size=17)).quarantined() == {}


def test_a_small_change_is_never_quarantined() -> None:
    vectors = cluster(5, 0.5)
    for scale in (0.0, 1e-6, 1e-2):
        small = vectors | {"site-2": scale * vectors["site-2"]}
        assert compare(geometry(small)).quarantined() == {}


def test_of_two_sites_none_is_quarantined() -> None:
    vectors = cluster(2, 0.5)
    assert compare(geometry(vectors | {"site-0": -1000 * vectors["site-0"]})).quarantined() == {}
    assert compare(geometry({"a": vectors["site-0"]})).quarantined() == {}
    assert compare(geometry(cluster(3, 0.5)).only(set())).sites == {}


def test_three_equal_norms_and_a_slightly_larger_one_are_no_outlier() -> None:
    """The spread is zero, so that every difference is many deviations: the ratio decides."""
    vector = cluster(1, 0.5)["site-0"]
    for ratio, reasons in ((0.99 * NORM_RATIO, {}), (1.01 * NORM_RATIO, {"d": TOO_LARGE})):
        vectors = {"a": vector, "b": vector, "c": vector, "d": ratio * vector}
        assert compare(geometry(vectors)).quarantined() == reasons


def test_where_norms_spread_widely_a_large_one_is_no_outlier() -> None:
    vectors = cluster(5, 0.5)
    spread = {
        site: scale * vector
        for scale, (site, vector) in zip((1, 4, 16, 64, 256), vectors.items(), strict=True)
    }
    assert compare(geometry(spread)).quarantined() == {}


def test_fewer_than_half_are_quarantined() -> None:
    """Two of four lie far off, in different ways: the stronger one goes, and the other is named."""
    vectors = cluster(4, 0.6)
    grams = geometry(vectors | {"site-0": 1000 * vectors["site-0"]}).grams
    other = geometry(vectors | {"site-1": 50 * vectors["site-1"]}).grams
    both = Geometry(
        tuple(vectors), {Group.factors: grams[Group.dense], Group.dense: other[Group.dense]},
        {Group.factors: SIZE, Group.dense: SIZE},
    )  # fmt: skip
    findings = compare(both)
    assert findings.quarantined() == {"site-0": TOO_LARGE}
    assert findings.spared == ["site-1"]


def test_a_change_that_is_too_large_has_no_say_in_the_directions() -> None:
    vectors = cluster(5, 0.5)
    vectors["site-4"] = 100 * torch.randn(4000, generator=torch.Generator().manual_seed(9)) / 4000**0.5
    vectors["site-3"] = -vectors["site-3"]
    assert compare(geometry(vectors)).quarantined() == {"site-4": TOO_LARGE, "site-3": OPPOSED}


def test_what_is_found_is_said_of_every_site() -> None:
    vectors = cluster(3, 0.5)
    findings = compare(geometry(vectors | {"site-2": 0 * vectors["site-2"]}))
    assert list(findings.sites) == ["site-0", "site-1", "site-2"]
    first = findings.sites["site-0"]
    assert first.norms == pytest.approx({Group.dense: float(vectors["site-0"].norm())})
    assert first.cosines[Group.dense] == pytest.approx(0.5, abs=0.1)
    assert findings.sites["site-2"].cosines == {}
    assert AGAINST < 0
