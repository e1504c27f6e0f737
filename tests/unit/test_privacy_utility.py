"""The study of what privacy costs: its noised teacher is that of private rounds, a row does what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from client.account import Reservation, privacy_plan
from client.dp.randomness import SeededRandomness
from client.private_adaptation import private_step
from common.adapter import AdapterUpdate
from common.config import load_recipe
from common.errors import UsageError
from common.precision import pack, unpack
from server.aggregation import Share, build_rule
from simulations.benchmark.pool import Pool
from simulations.benchmark.privacy_utility import Cell, Row, Sites, measure, noised, table

SETTINGS = (
    "teacher.adapter=decoder", "generator.scope=none", "privacy.noise_multiplier=1", "privacy.steps=2",
    "privacy.release_metrics=false", "evaluation.overlap=0", "student.steps=1",
)  # fmt: skip
ROW = Row(epsilon=8, steps=2)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return Pool.prepare(load_recipe("smoke", SETTINGS), tmp_path_factory.mktemp("pool"))


def test_a_noised_teacher_is_that_of_private_rounds(pool: Pool) -> None:
    sites = Sites.of(pool, ROW)
    found, noise = noised(sites, {name: SeededRandomness(number) for number, name in enumerate(sites.train)})
    plan, first = sites.plan, sites.first()
    rule = build_rule(plan.aggregation, plan.privacy.momentum)
    rule.start(first, {name: Share.of(first) for name in sites.train})
    sources = {name: SeededRandomness(number) for number, name in enumerate(sites.train)}
    for index in range(plan.rounds):
        rule.open_round()
        for name, patients in sorted(sites.train.items()):
            terms = privacy_plan(plan.privacy, len(patients))
            paid = Reservation(None, 0, index, terms, None)  # type: ignore[arg-type] # nothing is booked here
            sent = rule.adapter_for(name)
            step = private_step(sites.teacher, sent, patients, plan, (index, paid, None), sources[name]).step
            arrived = unpack(pack(step, plan.aggregation.wire_dtype))
            rule.fold(name, AdapterUpdate(arrived, float(terms.patients), sent.digest))
        rule.close_round()
    wanted = rule.global_adapter().tensors
    assert found.tensors.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.tensors.items())
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
