"""Noise and coins: as they should be distributed, nobody's to repeat, and seeded only in simulations."""

from __future__ import annotations

import copy
import os
import pickle

import numpy as np
import pytest
import torch

from client.dp.randomness import CHUNK, SeededRandomness, SystemRandomness, open_randomness
from common.errors import PolicyRefusal
from simulations.privacy_exam import mechanism as exam


def test_two_processes_with_one_seed_share_no_value() -> None:
    """Not one of a million numbers is in both, and no seed is taken for the noise."""
    verdict = exam.item_14(1_000_000)
    assert verdict.passed, verdict


def test_two_sources_and_two_calls_share_no_value() -> None:
    source = SystemRandomness()
    drawn = [source.normals((20_000,)).numpy(), source.normals((20_000,)).numpy()]
    drawn += [SystemRandomness().normals((20_000,)).numpy()]
    assert len(np.unique(np.concatenate(drawn))) == 60_000


def test_a_forked_process_does_not_go_on_in_its_parents_stream() -> None:
    source = SystemRandomness()
    source.uniforms(3)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, source.uniforms(100).tobytes())
        os._exit(0)
    ours = source.uniforms(100)
    assert os.waitpid(child, 0)[1] == 0
    theirs = np.frombuffer(os.read(read, 800))
    assert len(theirs) == 100
    assert not np.intersect1d(ours, theirs).size


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_source_is_neither_copied_nor_stored(copied) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TypeError, match="neither copied nor stored"):
        copied(SystemRandomness())


def test_a_seed_is_refused_where_patients_are() -> None:
    with pytest.raises(PolicyRefusal) as refusal:
        open_randomness(simulated=False, seed=0)
    assert refusal.value.field == "randomness"
    assert "0" not in str(refusal.value)
    with pytest.raises(TypeError):
        SystemRandomness(0)  # type: ignore[call-arg]
    assert isinstance(open_randomness(simulated=False), SystemRandomness)
    assert isinstance(open_randomness(simulated=True), SystemRandomness)
    assert open_randomness(simulated=False).secure
    assert not open_randomness(simulated=True, seed=0).secure


def test_torchs_and_numpys_seeds_change_nothing() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        drawn.append(SystemRandomness().normals((1000,)))
    assert not torch.equal(*drawn)


def test_a_simulation_repeats_with_its_seed() -> None:
    one, same, other = (SeededRandomness(seed).normals((100,)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_uniforms_fill_the_unit_interval_evenly() -> None:
    drawn = SeededRandomness(0).uniforms(200_000)
    assert 0 <= drawn.min() < 1e-4
    assert 1 - 1e-4 < drawn.max() < 1
    counts = np.histogram(drawn, bins=100, range=(0, 1))[0]
    assert np.square(counts - 2000).sum() / 2000 < 149.5  # chi-squared of 99 degrees, p = .001
    assert len(SeededRandomness(0).uniforms(0)) == 0


@pytest.mark.parametrize("count", [0, 1, 2, CHUNK - 1, CHUNK, CHUNK + 1])
def test_normals_come_in_any_number(count: int) -> None:
    drawn = SeededRandomness(0).normals((count,))
    assert drawn.shape == (count,)
    assert drawn.dtype == torch.float64
    assert bool(drawn.isfinite().all())
    assert len(drawn.unique()) == count


def test_a_normal_is_four_draws_of_four_pairs() -> None:
    """The source's own integers, put together by hand."""
    count = 5
    words = SeededRandomness(7).uniforms(4 * count)
    radius = np.sqrt(-2 * np.log(words[: 2 * count] + 2.0**-53))
    angle = 2 * np.pi * words[2 * count :]
    cosines, sines = radius * np.cos(angle), radius * np.sin(angle)
    wanted = [
        (cosines[i] + cosines[i + count] + sines[(i - 1) % count] + sines[(i - 1) % count + count]) / 2
        for i in range(count)
    ]
    np.testing.assert_allclose(SeededRandomness(7).normals((count,)).numpy(), wanted, rtol=1e-12)
