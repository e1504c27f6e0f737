"""The study of what privacy costs: its noised teacher is that of private rounds, a row does what it says."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from client.account import privacy_plan
from client.charges import Reservation
from client.dp.randomness import SeededRandomness
from client.private_adaptation import private_step
from common.config import load_recipe
from common.errors import UsageError
from common.recipe import DecoderTraining
from simulations.benchmark import privacy_utility
from simulations.benchmark.pool import Pool
from simulations.benchmark.privacy_rows import Row
from simulations.benchmark.privacy_utility import Sites, measure, noised, without_noise

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


def test_the_best_without_noise_trains_the_whole_decoder_on_new_crops(pool: Pool) -> None:
    shallow = replace(pool.recipe, teacher=replace(pool.recipe.teacher, decoder=DecoderTraining.shallow))
    rows = [Row(steps=2), Row(steps=2, best=True)]
    held, best = (Sites.of(replace(pool, recipe=shallow), row) for row in rows)
    assert held.first().tensors.keys() < best.first().tensors.keys()
    assert best.first().tensors.keys() == Sites.of(pool, Row(steps=0)).first().tensors.keys()
    plans = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(privacy_utility, "adapt", lambda *given: plans.append(given[3]) or Mock())
        for sites, row in zip((held, best), rows, strict=True):
            without_noise(sites, row)
    assert [plan.teacher.cached_views > 0 for plan in plans] == [True, False]


def test_a_row_is_read_from_its_text() -> None:
    assert Row.parse("8") == Row(8.0)
    assert Row.parse("3:40:0.9", 200) == Row(3.0, 40, 0.9, 200)
    assert Row.parse("none:300") == Row(None, 300)
    assert Row.parse("best:300") == Row(None, 300, best=True)
    asked = load_recipe("smoke", SETTINGS).privacy
    assert Row.parse("3:40").privacy(asked) == replace(asked, epsilon=3.0, noise_multiplier=None, steps=40)


@pytest.mark.parametrize("text", ["none", "best", "eight", "8:1:1:1", "8:few"])
def test_a_text_that_is_no_row_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"EPSILON:STEPS:RATE|for how many steps"):
        Row.parse(text)
