"""Paired comparisons: worked values, what is paired, what is weighed how, and what a goal says."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ArtefactError
from simulations.comparisons import (
    FloatArray,
    SeedValues,
    compare,
    comparison_table,
    goal_lines,
    holm,
    signed_rank,
)
from simulations.values import SiteValues, columns_of

SIZES = {"east": 10, "west": 30}


def seed_of(models: dict[str, dict[str, float]], seed: int = 0) -> SeedValues:
    """Patients of very different difficulty; a model adds, at a tested site, what ``models`` says of it."""
    rng = np.random.default_rng(seed)
    hard = {site: rng.uniform(0.1, 0.8, size) for site, size in SIZES.items()}
    values: dict[tuple[str, str], dict[str, FloatArray]] = {
        (model, trainer): {site: hard[site] + gains[site] for site in SIZES}
        for model, gains in models.items()
        for trainer in SIZES
    }
    return SeedValues(seed, values)


BETTER = {"student": {"east": 0.1, "west": 0.3}, "local_only": {"east": 0.0, "west": 0.0}}


def test_holm_gives_the_worked_values() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_never_helps(p: list[float]) -> None:
    adjusted = holm(p)
    assert all(a >= raw for a, raw in zip(adjusted, p, strict=True))
    ordered = [adjusted[index] for index in sorted(range(len(p)), key=p.__getitem__)]
    assert all(one <= two for one, two in pairwise(ordered))
    assert min(adjusted) == pytest.approx(min(1.0, len(p) * min(p)))


def test_the_signed_rank_test_gives_the_worked_values() -> None:
    assert signed_rank(np.array([0.1, 0.2, 0.3, 0.4, 0.5])) == pytest.approx(2 / 2**5)
    assert signed_rank(np.array([-0.1, 0.2, 0.3, 0.4, 0.5])) == pytest.approx(4 / 2**5)
    assert signed_rank(np.zeros(8)) == 1.0


def test_own_weighs_sites_alike_and_all_weighs_patients_alike() -> None:
    seeds = [seed_of(BETTER)]
    own, everywhere = (compare(seeds, "student", ["local_only"], where) for where in ("own", "all"))
    assert own is not None
    assert everywhere is not None
    assert own.mean == pytest.approx(0.2)
    assert everywhere.mean == pytest.approx((10 * 0.1 + 30 * 0.3) / 40)
    assert own.lowest == pytest.approx(0.1)


def test_what_every_patient_gains_alike_is_known_exactly() -> None:
    """Patients differ by 0.7, the models by 0.01: only a paired comparison can tell."""
    seeds = [seed_of({"student": dict.fromkeys(SIZES, 0.01), "local_only": dict.fromkeys(SIZES, 0.0)})]
    found = compare(seeds, "student", ["local_only"], "own")
    assert found is not None
    assert found.ci95 == pytest.approx((0.01, 0.01))
    assert found.p < 1e-6


def test_all_looks_at_every_sites_model_and_own_at_the_patients_own() -> None:
    seed = seed_of(BETTER)
    values = dict(seed.values)
    values["student", "west"] = {site: part - 0.4 for site, part in values["student", "west"].items()}
    found = SeedValues(0, values)
    assert found.differences("student", ["local_only"], "own")["east"] == pytest.approx(0.1)
    assert found.differences("student", ["local_only"], "own")["west"] == pytest.approx(-0.1)
    assert found.differences("student", ["local_only"], "all")["east"] == pytest.approx(-0.1)


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(100):
        zero = {site: np.zeros(size) for site, size in SIZES.items()}
        noisy = {site: rng.normal(0.05, 0.1, size) for site, size in SIZES.items()}
        values = {(name, site): part for name, part in (("a", noisy), ("b", zero)) for site in SIZES}
        found = compare([SeedValues(seed, values)], "a", ["b"], "all", resamples=200)
        assert found is not None
        covered += found.ci95[0] <= 0.05 <= found.ci95[1]
    assert 86 <= covered <= 99


def test_seeds_count_alike_and_stand_beside_the_mean() -> None:
    small = {"student": dict.fromkeys(SIZES, 0.02), "local_only": dict.fromkeys(SIZES, 0.0)}
    found = compare([seed_of(BETTER), seed_of(small, 1)], "student", ["local_only"], "own")
    assert found is not None
    assert found.each == pytest.approx([0.2, 0.02])
    assert found.mean == pytest.approx(0.11)


def test_an_undefined_patient_is_left_out_of_the_pair() -> None:
    seed = seed_of(BETTER)
    seed.values["local_only", "east"]["east"][3] = math.nan
    assert len(seed.differences("student", ["local_only"], "own")["east"]) == 9


def test_a_model_that_one_seed_lacks_is_not_compared() -> None:
    without = seed_of({"student": dict.fromkeys(SIZES, 0.0)}, 1)
    assert compare([seed_of(BETTER), without], "student", ["local_only"], "own") is None
    assert len(comparison_table([seed_of(BETTER), without], [("x", "student", "local_only")])) == 2


def test_the_table_corrects_over_all_of_its_rows() -> None:
    seeds = [seed_of({**BETTER, "fedavg": {"east": 0.1, "west": 0.3}})]
    pairs = [("over local", "student", "local_only"), ("over FedAvg", "student", "fedavg")]
    rows = comparison_table(seeds, pairs)[2:]
    assert [row.endswith("| significant |") for row in rows] == [True, True, False, False]
    alone = compare(seeds, "student", ["local_only"], "own")
    assert alone is not None
    assert all(f"| {4 * alone.p:.2g} | significant |" in row for row in rows[:2])


def test_goals_are_met_or_missed_and_say_by_how_much() -> None:
    seeds = [
        seed_of({**BETTER, "fedavg": {"east": 0.2, "west": 0.2}, "local_only_mae": BETTER["local_only"]})
    ]
    lines = list(goal_lines(seeds))
    assert any(line.startswith("- met: over local training of the same start, all") for line in lines)
    assert any("worst site: +0.100, wanted -0.01" in line for line in lines)
    assert any(line.startswith("- met: over FedAvg of the same student, own site: +0.000") for line in lines)
    assert any(line.endswith("without local_only_moco, task_agnostic") for line in lines)
    assert not any("recolouring" in line for line in lines)
    worse = [seed_of({"student": dict.fromkeys(SIZES, 0.0), "fedavg": dict.fromkeys(SIZES, 0.02)})]
    assert all(line.startswith("- missed: over FedAvg") for line in goal_lines(worse))


def test_values_come_back_from_the_disk_as_they_were(tmp_path: Path) -> None:
    for site, size in SIZES.items():
        folder = tmp_path / "sites" / site
        folder.mkdir(parents=True)
        values = {"dice": {"a": np.full(size, 0.5), "b": np.full(size, 0.7)}, "nsd": {"a": np.zeros(size)}}
        values["dice"]["b"][0] = math.nan
        columns = [column for trainer in SIZES for column in columns_of("student", trainer, values)]
        SiteValues(site, "run", 7, columns).save(folder)
        assert (folder / "values.json").stat().st_mode & 0o777 == 0o600
    found = SeedValues.load(tmp_path)
    assert found.seed == 7
    assert found.values["student", "west"]["east"] == pytest.approx([0.5, *[0.6] * 9])


def test_a_run_without_values_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="simulate the run again"):
        SeedValues.load(tmp_path)
    (tmp_path / "sites" / "east").mkdir(parents=True)
    (tmp_path / "sites" / "east" / "values.json").write_text("{}")
    with pytest.raises(ArtefactError, match="no file of patients' values"):
        SeedValues.load(tmp_path)
