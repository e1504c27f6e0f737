"""The rehearsal passes this build, and finds each fault that is put into it: the exam's items 10 to 13."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import client.dp.mechanism as mechanism
import client.dp.onepass as onepass
from client.dp.poisson import MicroBatch, PoissonSampler
from client.dp.randomness import SeededRandomness
from client.dp.rehearsal import check_clip, check_noise, check_sampler, judge_draws
from simulations.privacy_exam import mechanism as exam

MILLION = 1_000_000


class Repeating(SeededRandomness):
    """The noise of the first step, again and again."""

    def normals(self, shape: Sequence[int]) -> Tensor:
        return SeededRandomness(0).normals(shape)


class Smeared(SeededRandomness):
    """Each number has a little of its neighbour; the spread is right."""

    def normals(self, shape: Sequence[int]) -> Tensor:
        drawn = super().normals(shape)
        return (drawn + 0.1 * drawn.roll(1)) / (1 + 0.1**2) ** 0.5


class Flat(SeededRandomness):
    """Uniform, with the right spread."""

    def normals(self, shape: Sequence[int]) -> Tensor:
        return torch.from_numpy((self.uniforms(shape[0]) - 0.5) * 12**0.5)


def test_a_million_numbers_of_noise_are_as_claimed() -> None:
    verdict = exam.item_10(MILLION, seed=5)
    assert verdict.passed, verdict


def test_less_noise_is_found_and_a_right_build_passes() -> None:
    verdict = exam.item_11(2, MILLION)
    assert verdict.passed, verdict


@pytest.mark.parametrize("source", [Repeating, Smeared, Flat])
def test_noise_of_the_wrong_kind_is_found(source: type[SeededRandomness]) -> None:
    found = check_noise(source(3), 1.0, 1.0, 200_000)
    assert abs(found.std - 1) <= 0.02
    assert not found.passed
    assert (found.repeats > 0) is (source is Repeating)


def test_coins_are_independent_and_an_empty_draw_is_noised_and_charged() -> None:
    verdict = exam.item_13(3000, seed=1)
    assert verdict.passed, verdict


def test_independent_coins_pass() -> None:
    sampler = PoissonSampler([[row] for row in range(100)], 0.03, 1)
    found = check_sampler(sampler, SeededRandomness(1), 3000)
    assert found.passed
    assert found.rate == pytest.approx(0.03, abs=0.001)
    assert found.empty == pytest.approx(3000 * 0.97**100, abs=40)


def present(kind: str, steps: int = 2000, patients: int = 50, rate: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(0)
    coins = rng.random((steps, patients)) < rate
    if kind == "shuffled":  # every patient once in ten steps
        return np.concatenate(
            [
                rng.permutation(np.arange(patients) % 10)[None] == np.arange(10)[:, None]
                for _ in range(steps // 10)
            ]
        )
    if kind == "favourites":
        coins[:, :3] = rng.random((steps, 3)) < 2 * rate
    if kind == "rarer":
        return rng.random((steps, patients)) < 0.9 * rate
    if kind == "together":  # one coin for two patients
        coins[:, 1::2] = coins[:, ::2]
    return coins


@pytest.mark.parametrize("kind", ["shuffled", "favourites", "rarer", "together"])
def test_another_way_to_draw_is_found(kind: str) -> None:
    assert judge_draws(present("coins"), 0.1).passed
    assert not judge_draws(present(kind), 0.1).passed


def test_the_clip_holds_for_outliers_many_images_and_what_is_not_finite() -> None:
    verdict = exam.item_12(6)
    assert verdict.passed, verdict


def test_a_clip_that_does_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanism, "add_clipped", lambda total, rows, norm: total.add_(rows.sum(0)))
    assert not check_clip(1.0).passed


def test_a_clip_of_images_instead_of_patients_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def apart(gradients: Tensor, batch: MicroBatch, rows: Tensor) -> None:
        rows.copy_(gradients.flatten(1))

    monkeypatch.setattr(onepass, "add_up_patients", apart)
    monkeypatch.setattr(mechanism, "probe", lambda *_: None)  # it would refuse before
    found = check_clip(1.0)
    assert found.many_images > 2
    assert not found.passed
