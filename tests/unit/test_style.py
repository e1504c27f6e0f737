"""Style summaries: bounded, grouped, and never about too few patients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.patients import Patient, Sample, Split
from client.style import sample_styles, style_vector, summarise_style
from common.errors import DataError
from common.style import STYLE_BOUNDS, STYLE_FIELDS, StyleGroup, StyleSummary


def painted(front: float, back: float, noise: float = 0.0, seed: int = 0) -> Sample:
    rng = np.random.default_rng(seed)
    mask = torch.zeros(1, 32, 32, dtype=torch.uint8)
    mask[0, 8:20, 8:20] = 1
    image = torch.full((3, 32, 32), back)
    image[:, mask[0] > 0] = front
    image += torch.from_numpy(rng.normal(0, noise, (1, 32, 32))).float()
    return Sample(image.clamp(0, 1), mask, torch.ones(32, 32, dtype=torch.bool))


def cohort(kinds: list[tuple[float, float]]) -> list[Patient]:
    return [
        Patient(f"p{i}", Split.train, (painted(front, back, 0.02, i),))
        for i, (front, back) in enumerate(kinds)
    ]


def test_the_vector_holds_the_colours_and_the_shape() -> None:
    sample = painted(0.9, 0.2)
    assert sample.mask is not None
    vector = style_vector(sample.image, sample.mask[0], sample.valid)
    assert vector is not None
    named = dict(zip(STYLE_FIELDS, vector, strict=True))
    assert named["fg_mean_r"] == pytest.approx(0.9, abs=1e-6)
    assert named["bg_mean_b"] == pytest.approx(0.2, abs=1e-6)
    assert named["log_coverage"] == pytest.approx(np.log(144 / 1024))
    assert named["log_area_over_perimeter"] == pytest.approx(np.log(144 / 44))


@pytest.mark.parametrize("fill", [0, 1])
def test_an_image_without_foreground_or_background_has_no_vector(fill: int) -> None:
    mask = torch.full((32, 32), fill)
    assert style_vector(torch.rand(3, 32, 32), mask, torch.ones(32, 32, dtype=torch.bool)) is None


@given(st.integers(0, 10_000))
def test_every_number_lies_within_its_bounds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = torch.from_numpy(rng.uniform(-1, 2, (3, 16, 16))).float()
    mask = torch.from_numpy(rng.random((16, 16)) < rng.uniform(0.1, 0.9))
    vector = style_vector(image, mask, torch.ones(16, 16, dtype=torch.bool))
    if vector is not None:
        low, high = np.array(STYLE_BOUNDS).T
        assert ((vector >= low) & (vector <= high)).all()


def test_every_shared_group_covers_at_least_min_patients() -> None:
    summary = summarise_style(cohort([(0.9, 0.1)] * 6 + [(0.2, 0.8)] * 5 + [(0.5, 0.0)] * 2), 32, 5, 5, 0)
    assert 1 <= len(summary.groups) <= 2
    for group in summary.groups:  # the two lonely patients form no group of their own
        assert group.weight >= 0.1


def test_two_appearances_become_two_groups() -> None:
    summary = summarise_style(cohort([(0.9, 0.1)] * 8 + [(0.2, 0.8)] * 8), 32, 5, 5, 0)
    assert sorted(round(group.mean[0], 1) for group in summary.groups) == [0.2, 0.9]


def test_many_images_of_one_patient_are_not_a_group() -> None:
    lonely = Patient("p", Split.train, tuple(painted(0.9, 0.1, 0.02, i) for i in range(20)))
    with pytest.raises(DataError, match="min_group_patients") as caught:
        summarise_style([lonely], 32, 5, 2, 0)
    assert caught.value.border_code == "REFUSED_LOCAL"  # outside, it says nothing of how many there are


def test_sampled_styles_repeat_stay_in_bounds_and_keep_grey_grey() -> None:
    summary = summarise_style(cohort([(0.9, 0.1)] * 6), 32, 5, 5, 0)
    first, again = (sample_styles([summary], 50, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(first, again)
    low, high = np.array(STYLE_BOUNDS).T
    assert ((first >= low) & (first <= high)).all()
    assert np.allclose(first[:, 0], first[:, 1])
    assert np.allclose(first[:, 6], first[:, 8])


def test_sites_are_sampled_in_turn() -> None:
    def flat(value: float) -> StyleSummary:
        return StyleSummary([StyleGroup(1.0, [value] * 12 + [-1.0, 1.0], [0.0] * 14)])

    styles = sample_styles([flat(0.2), flat(0.8)], 10, np.random.default_rng(0))
    assert styles[:, 0].tolist() == [0.2, 0.8] * 5
