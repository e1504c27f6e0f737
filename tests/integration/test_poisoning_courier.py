"""The poisoning courier at sites without images: what it changes, where, and what it leaves alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import simulations.attacks as attacks
import simulations.loopback
from common.recipe import AggregationConfig, Recipe, WireDtype
from server.outcome import RunOutcome
from server.outliers import TOO_LARGE
from simulations.attacks import Row, poisoning_courier
from tests.integration import fake_guard
from tests.integration.consortium import Consortium, answered, fake_models, recipe, rejected

__all__ = ["fake_models"]  # a fixture of every test here


def run_with(folder: Path, row: Row, settings: Recipe, wrong: dict[str, str] | None = None) -> RunOutcome:
    """A whole run: the guard of site ``c`` does ``wrong``, and its courier poisons what it released."""
    consortium = Consortium(folder, settings, {"c": wrong or {}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attacks, "client_app", fake_guard.FakeSites())
        patch.setattr(simulations.loopback, "client_app", poisoning_courier(row, settings, 2))
        return consortium.go()


def first_receipt(folder: Path) -> str:
    """The digest of the first update that left ``c``."""
    lines = (folder / "sites/c/receipts.jsonl").read_text().splitlines()
    return next(one["sha256"] for one in map(json.loads, lines) if one["name"] == "adapt.adapter")


@pytest.mark.parametrize("dtype", WireDtype)
def test_one_sites_steps_are_changed_after_its_egress_however_they_travel(
    dtype: WireDtype, tmp_path: Path
) -> None:
    """Well formed, so that only a comparison finds it; the site's own receipts are those of an honest run."""
    settings = replace(recipe(), aggregation=AggregationConfig(max_rank=8, wire_dtype=dtype))
    honest = run_with(tmp_path / "honest", Row("none"), settings)
    attacked = run_with(tmp_path / "attacked", Row("none", "scale", 50.0), settings)
    for index in range(settings.run.rounds):
        assert answered(honest, "adapt", index) == ["a", "b", "c"]
        assert rejected(attacked, "adapt", index) == {"c": TOO_LARGE}
        assert answered(attacked, "adapt", index) == ["a", "b"]
    assert set(attacked.metrics) == {"a", "b", "c"}, "nothing but the training is touched"
    assert first_receipt(tmp_path / "honest") == first_receipt(tmp_path / "attacked")


def test_a_site_that_fails_to_train_has_nothing_to_poison(tmp_path: Path) -> None:
    outcome = run_with(tmp_path, Row("none", "scale", 50.0), recipe(), {"adapt:1": "raise"})
    causes = [rejected(outcome, "adapt", index)["c"] for index in range(3)]
    assert causes == [TOO_LARGE, "SITE_FAILED", TOO_LARGE]
