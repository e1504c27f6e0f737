"""The studies of painters and of sampling: one teacher, students that differ in their images alone."""

from __future__ import annotations

from pathlib import Path

import pytest

import simulations.benchmark.painters as study
import simulations.benchmark.sampling as sampling
from common.config import load_recipe
from common.errors import UsageError
from common.recipe import StyleDetail
from common.style import STYLE_FIELDS, TEXTURE
from server.report.schema import RunReport
from simulations.benchmark.aggregation import CellFile, compare
from simulations.benchmark.painters import Cell, Consortium, Row, Study, table
from simulations.benchmark.pool import Pool
from simulations.benchmark.sampling import Found
from simulations.results import site_mean
from simulations.simulate import simulate

SETTINGS = ("evaluation.overlap=0", "run.rounds=1", "generator.scope=paint", "baselines=[no_synthetic]")


def test_rows_are_painters_and_details() -> None:
    assert Row.parse("paint") == Row("paint")
    assert Row.parse("diffusion:texture") == Row("diffusion", StyleDetail.texture)
    assert Row.parse("amplitude").detail is StyleDetail.spectrum
    assert Row.parse("none").variant.styles is None
    assert Row.parse("diffusion").variant == study.VARIANTS["student"]
    for wrong in ("pain", "paint:fine"):
        with pytest.raises(UsageError, match="one of"):
            Row.parse(wrong)


def test_cells_are_the_students_that_simulate_makes_and_are_kept(tmp_path: Path) -> None:
    """The same teacher, images and batches as in a run: equal to the last digit."""
    kept = CellFile(tmp_path / "cells.json", "smoke", SETTINGS, Cell)
    rows = [Row("none"), Row("paint")]
    cells = compare([0], rows, kept, Study().measure)
    out = simulate(load_recipe("smoke", SETTINGS), tmp_path / "run", resume=False)
    report = RunReport.load(out / "report.json")
    for cell, model in zip(cells, ("no_synthetic", "student"), strict=True):
        assert cell.dice["all"] == pytest.approx(site_mean(report, model, "all"), abs=1e-9)
        assert cell.dice["own"] == pytest.approx(site_mean(report, model, "own"), abs=1e-9)
    assert [cell.images for cell in cells] == [0, 2]
    again = CellFile(tmp_path / "cells.json", "smoke", SETTINGS, Cell)
    assert compare([0], rows, again, None) == cells, "nothing is measured twice"
    lines = table(cells).splitlines()
    assert len(lines) == 4
    assert lines[3].startswith("| paint |")


def test_a_coarser_summary_has_the_groups_of_the_finer_one(tmp_path: Path) -> None:
    pool = Pool.prepare(load_recipe("smoke", SETTINGS), tmp_path / "pool")
    consortium = Consortium.train(pool, tmp_path / "run")
    found = {detail: consortium.shared(detail)["east"].groups for detail in StyleDetail}
    assert [len(found[detail][0].mean) for detail in StyleDetail][:2] == [len(STYLE_FIELDS), TEXTURE.stop]
    for coarse, fine in zip(found[StyleDetail.colour], found[StyleDetail.spectrum], strict=True):
        assert (coarse.weight, coarse.mean) == (fine.weight, fine.mean[: len(STYLE_FIELDS)])


def test_what_the_sampler_promises_is_held_against_what_was_found() -> None:
    good = Found(0.1, 0.6, 6.0, 15, 0.8, 0.801, (-0.003, 0.001), 0.04)
    assert good.faults() == []
    slow = Found(0.2, 0.6, 3.0, 15, 0.8, 0.801, (-0.003, 0.001), 0.04)
    assert slow.faults() == ["only 3.0 times faster than DDIM-100"]
    worse = Found(0.1, 0.6, 6.0, 15, 0.7, 0.8, (-0.12, -0.08), 0.04)
    assert worse.faults() == ["students of our images are worse, and not by chance"]


def test_both_solvers_paint_the_same_images_nearly(tmp_path: Path) -> None:
    """The same styles, masks and noise: what differs is the solver's error."""
    pool = Pool.prepare(load_recipe("smoke", [*SETTINGS, "generator.sampler_steps=15"]), tmp_path / "pool")
    consortium = Consortium.train(pool, tmp_path / "run")
    clock: list[tuple[float, float]] = []
    solvers = (sampling.plans_solver(consortium.plan), sampling.ddim)
    ours, ddim = sampling.in_turn(consortium, "east", solvers, clock)
    assert (ours.masks == ddim.masks).all()
    assert (ours.images - ddim.images).square().mean().sqrt() < 0.1
    assert len(clock) == 1
    assert clock[0][1] > 2 * clock[0][0]
