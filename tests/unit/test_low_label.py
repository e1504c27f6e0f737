"""The low-label curve: masks taken away and nothing else, cells that are not measured twice, the picture."""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import pytest

import simulations.benchmark.low_label as low_label
from client.manifest_rows import read_manifest
from client.patients import Split
from client.site import Site
from common.config import load_recipe
from common.errors import DataError
from common.recipe import Recipe
from simulations.benchmark.aggregation import CellFile
from simulations.benchmark.label_plot import Curve, plot
from simulations.benchmark.low_label import Cell, Row, cells_of, curves_of, run_points, table, with_labels
from simulations.crosstest import CrossTest
from simulations.simulate import prepare_sites
from simulations.values import Column, SiteValues

SETTINGS = ("sites.east.phantom.train_patients=4", "sites.west.phantom.train_patients=4")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("smoke", SETTINGS)


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    prepare_sites(recipe, folder)
    return folder


def labelled(recipe: Recipe, split: Split) -> dict[str, list[str]]:
    return {
        s.name: read_manifest(Path(s.manifest)).labelled_patients(split) for s in recipe.sites if s.manifest
    }


def test_fewer_labels_are_some_of_more_and_nothing_else_changes(
    recipe: Recipe, whole: Path, tmp_path: Path
) -> None:
    few, more = (with_labels(recipe, whole, count, tmp_path / str(count)) for count in (2, 3))
    for site in ("east", "west"):
        one, two = labelled(few, Split.train)[site], labelled(more, Split.train)[site]
        assert (len(one), len(two)) == (2, 3)
        assert set(one) < set(two)
        for split in (Split.test, Split.val):
            assert labelled(few, split)[site] == labelled(more, split)[site] != []
        files = [tmp_path / str(count) / f"{site}.csv" for count in (2, 3)]
        texts = [list(csv.DictReader(file.read_text().splitlines())) for file in files]
        original = read_manifest(Site.open(whole / site).manifest).rows
        for hidden in texts:
            assert [Path(row["image"]) for row in hidden] == [row.image.resolve() for row in original]
            assert [row["split"] for row in hidden] == [str(row.split) for row in original]


def test_the_hidden_manifest_gives_the_same_patients_without_those_masks(
    recipe: Recipe, whole: Path, tmp_path: Path
) -> None:
    shown = with_labels(recipe, whole, 2, tmp_path / "manifests")
    prepare_sites(shown, tmp_path / "sites")
    before, after = (
        Site.open(folder / "east").patients(recipe.data, 0) for folder in (whole, tmp_path / "sites")
    )
    assert [patient.id for patient in before] == [patient.id for patient in after]
    lost = [b.id for b, a in zip(before, after, strict=True) if b.labelled and not a.labelled]
    assert len(lost) == 2
    assert all((b.samples[0].image == a.samples[0].image).all() for b, a in zip(before, after, strict=True))


def test_more_labels_than_there_are_is_a_fault(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="5 labels are asked for and 4 training patients have one"):
        with_labels(recipe, whole, 5, tmp_path)


def crossed(value: float, models: Sequence[str], seed: int) -> CrossTest:
    def column(model: str, trainer: str, name: str, shift: float) -> Column:
        return Column(model, trainer, "dice", name, [value + shift, None if shift else value, value])

    sites = ("east", "west")
    columns = [column(m, t, c, s) for m in models for t in sites for c, s in (("a", 0.0), ("b", 0.1))]
    return CrossTest([], {site: SiteValues(site, "run", seed, list(columns)) for site in sites})


def test_classes_are_taken_together_and_an_undefined_one_is_left_out() -> None:
    (cell,) = cells_of(crossed(0.5, ["student"], 3), 10, ["student"], 1.0)
    assert cell.row == Row(10, "student")
    assert cell.seed == 3
    assert cell.values["east"]["west"] == [0.55, 0.5, 0.5]


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[str, ...]]]:
    """Which (labels at east, models) were walked, without walking."""
    done: list[tuple[int, tuple[str, ...]]] = []

    def walked(recipe: Recipe, models: Sequence[str], folder: Path) -> CrossTest:
        known = len(labelled(recipe, Split.train)["east"])
        done.append((known, tuple(models)))
        return crossed(0.5 + known / 100, models, recipe.run.seed)

    monkeypatch.setattr(low_label, "measure", walked)
    return done


def test_each_point_is_walked_once_for_all_its_models_and_never_again(
    tmp_path: Path, walks: list[tuple[int, tuple[str, ...]]]
) -> None:
    def kept() -> CellFile:
        return CellFile(tmp_path / "cells.json", "smoke", list(SETTINGS), Cell)

    run_points(kept(), [2, 4], ["student", "local_only"], [0])
    assert walks == [(2, ("student", "local_only")), (4, ("student", "local_only"))]
    run_points(kept(), [2, 4], ["student", "local_only", "fedavg"], [0])
    assert walks[2:] == [(2, ("fedavg",)), (4, ("fedavg",))]
    run_points(kept(), [2, 4], ["student", "local_only", "fedavg"], [0])
    assert len(walks) == 4
    cells = kept().cells
    assert {cell.row for cell in cells} == {
        Row(n, m) for n in (2, 4) for m in ("student", "local_only", "fedavg")
    }
    text = table(cells)
    assert "| Dice, tested on own | 2 labels | 4 labels |" in text
    assert "| student | 0.537 [" in text
    assert "- met: over FedAvg of the same student, own site: +0.000" in text


def test_a_curve_has_its_points_in_order_and_the_picture_names_it() -> None:
    cells = [
        cell
        for count, value in ((40, 0.8), (10, 0.6))
        for cell in cells_of(
            crossed(value, ["student", "local_only"], 0), count, ["student", "local_only"], 1
        )
    ]
    curves = curves_of(cells, "own")
    assert [curve.model for curve in curves] == ["local_only", "student"]
    assert [count for count, _, _ in curves[0].points] == [10, 40]
    drawn = plot({"own": curves, "all": curves_of(cells, "all")})
    root = ET.fromstring(str(drawn))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [item.text for item in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("10") == texts.count("40") == 2
    lines = list(root.iter("{http://www.w3.org/2000/svg}polyline"))
    assert len(lines) == 4
    (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in lines[0].attrib["points"].split())
    assert x1 < x2
    assert y1 > y2  # more is further up
    assert drawn == plot({"own": curves, "all": curves_of(cells, "all")})


def test_a_picture_without_a_point_is_still_one() -> None:
    ET.fromstring(str(plot({"own": [Curve("student", [])], "all": []})))
