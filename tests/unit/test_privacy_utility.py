"""The study of what privacy costs: its noised teacher is that of private rounds, a row does what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from client.account import Reservation, privacy_plan
from client.dp.randomness import SeededRandomness
from client.private_adaptation import private_step
from common.config import load_recipe
from common.errors import UsageError
from simulations.benchmark.pool import Pool
from simulations.benchmark.privacy_utility import Cell, Row, Sites, measure, noised, table

SETTINGS = (
    "teacher.adapter=decoder", "generator.scope=none", "privacy.noise_multiplier=1", "privacy.steps=2",
    "privacy.release_metrics=false", "evaluation.overlap=0", "student.steps=1",
    "aggregation.wire_dtype=float32",
)  # fmt: skip
ROW = Row(epsilon=8, steps=2)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return Pool.prepare(load_recipe("smoke", SETTINGS), tmp_path_factory.mktemp("pool"))


def test_a_noised_teacher_is_that_of_private_rounds(pool: Pool) -> None:
    """Held against the sites' own function of a private round, and the momentum written out."""
    sites = Sites.of(pool, ROW)
    found, noise = noised(sites, {name: SeededRandomness(number) for number, name in enumerate(sites.train)})
    plan, wanted = sites.plan, sites.first()
    sources = {name: SeededRandomness(number) for number, name in enumerate(sites.train)}
    velocity = {name: torch.zeros_like(tensor) for name, tensor in wanted.tensors.items()}
    for index in range(plan.rounds):
        steps = []
        for name, patients in sorted(sites.train.items()):
            terms = privacy_plan(plan.privacy, len(patients))
            paid = Reservation(None, 0, index, terms, None)  # type: ignore[arg-type] # nothing is booked here
            order = (index, paid, None)
            steps.append(private_step(sites.teacher, wanted, patients, plan, order, sources[name]).step)
        factor = plan.privacy.momentum
        for name, speed in velocity.items():
            mean = torch.stack([step.tensors[name] for step in steps]).mean(0)
            velocity[name] = factor * speed + (1 - factor) * mean
        moves = {name: speed / (1 - factor ** (index + 1)) for name, speed in velocity.items()}
        wanted = replace(wanted, tensors={name: wanted.tensors[name] + move for name, move in moves.items()})
    assert found.tensors.keys() == wanted.tensors.keys()
    for name, tensor in found.tensors.items():
        assert torch.allclose(tensor, wanted.tensors[name], rtol=1e-4, atol=1e-4), name
    assert noise == pytest.approx(terms.noise_multiplier / (terms.sample_rate * 3))


def test_a_cell_says_what_was_trained(pool: Pool) -> None:
    shipped = measure(pool, Row(steps=0))
    assert (shipped.steps, shipped.noise, shipped.patients) == (0, 0.0, 3)
    trained = measure(pool, Row(steps=2, patients=2))
    assert trained.dice != shipped.dice
    assert (trained.steps, trained.noise, trained.patients) == (2, 0.0, 2)
    private = measure(pool, ROW, students=True)
    assert private.noise > 0
    assert set(private.student) == {"own", "worst", "all"}
    assert private.student["worst"] <= private.student["own"]
    assert len(private.sites) == 2
    assert measure(pool, ROW).dice == private.dice, "a seed makes the same cell again"


def test_a_row_is_read_from_its_text() -> None:
    assert Row.parse("8") == Row(8.0)
    assert Row.parse("3:40:0.9", 200) == Row(3.0, 40, 0.9, 200)
    assert Row.parse("none:300") == Row(None, 300)
    asked = load_recipe("smoke", SETTINGS).privacy
    assert Row.parse("3:40").privacy(asked) == replace(asked, epsilon=3.0, noise_multiplier=None, steps=40)


@pytest.mark.parametrize("text", ["none", "eight", "8:1:1:1", "8:few"])
def test_a_text_that_is_no_row_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"EPSILON:STEPS:RATE|for how many steps"):
        Row.parse(text)


def test_what_is_lost_is_lost_to_the_best_row_without_noise() -> None:
    def cell(row: Row, seed: int, small: float, large: float) -> Cell:
        return Cell(row, seed, {"all": 0.0, "site a": small, "site b": large}, 10.0, 80, 0.01, 400.0)

    best, other, private = Row(steps=300), Row(steps=30), Row(epsilon=8)
    cells = [cell(best, 0, 0.8, 0.9), cell(other, 0, 0.7, 0.9)]
    cells += [cell(private, 0, 0.7, 0.9), cell(private, 1, 0.76, 0.9)]
    lines = table(cells).splitlines()
    assert lines[2].startswith("| none | 400 | 80 | 0.0100 | 0.850 | 0.000 | 0.800 |")
    lost = "0.815 (0.800 0.830) | 0.035 | 0.730 (0.700 0.760)"
    assert lines[4].startswith(f"| 8 | 400 | 80 | 0.0100 | {lost} |")
