"""The geometry of a round against dense algebra: exact at any mix of ranks, layers and trained halves."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import server.geometry
from server.geometry import Geometry, measure
from server.steps import Group, RoundSteps
from tests.contract.dense_algebra import LAYERS, shares_of
from tests.contract.moved_sites import (
    FACTOR_VALUES,
    answered,
    as_update,
    begun_rule,
    dense_change,
    random_steps,
    started_rule,
)

EVERY = tuple(sorted(LAYERS))


def dense_grams(changes: list[Tensor]) -> dict[Group, Tensor]:
    stacked = torch.stack(changes)
    factors, dense = stacked[:, :FACTOR_VALUES], stacked[:, FACTOR_VALUES:]
    return {Group.factors: factors @ factors.T, Group.dense: dense @ dense.T}


def assert_equal(found: Geometry, changes: list[Tensor], tolerance: float = 1e-12) -> None:
    for group, gram in dense_grams(changes).items():
        assert torch.allclose(
            found.grams[group], gram, rtol=tolerance, atol=tolerance * float(gram.abs().max())
        )


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    kinds=st.lists(st.sampled_from(["base", "dp", "one layer"]), min_size=5, max_size=5),
    scales=st.lists(st.sampled_from([0.0, 1e-3, 1.0, 100.0]), min_size=5, max_size=5),
    seed=st.integers(0, 10**6),
    at_once=st.sampled_from([(1, 3), (2, 7), (16, 1 << 21)]),
)
def test_inner_products_are_those_of_the_dense_changes(
    ranks: list[int], kinds: list[str], scales: list[float], seed: int, at_once: tuple[int, int]
) -> None:
    """Any ranks, however much is looked at together; sites that train both factors, B alone, or one layer."""
    sites = {f"site-{index}": rank for index, rank in enumerate(ranks)}
    chosen = dict(zip(sites, kinds, strict=False))
    shares = shares_of(sites, {site: EVERY[:1] for site, kind in chosen.items() if kind == "one layer"})
    for site, kind in chosen.items():
        if kind == "dp":
            shares[site] = replace(shares[site], preset="dp", trains_a=False)
    rule = started_rule("exact_split", shares)
    sent = {site: rule.adapter_for(site) for site in sites}
    moved = {
        site: random_steps(sent[site], seed + index, scales[index])
        for index, site in enumerate(sorted(sites))
    }
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.geometry, "TILE", at_once[0])
        patch.setattr(server.geometry, "BLOCK", at_once[1])
        found = measure(answered(Path(folder), rule, moved))
    assert found.sites == tuple(sorted(sites))
    assert_equal(found, [dense_change(sent[site], moved[site]) for site in sorted(sites)])


def test_a_small_step_on_large_factors_loses_no_digits(tmp_path: Path) -> None:
    """The difference of two products, taken naively in float32, would be rounding alone."""
    rule = begun_rule(sites=("a", "b"))
    sent = rule.adapter_for("a")
    moved = {site: random_steps(sent, index, scale=1e-6) for index, site in enumerate("ab")}
    found = measure(answered(tmp_path, rule, moved))
    assert_equal(found, [dense_change(sent, moved[site]) for site in "ab"], tolerance=1e-8)


def test_norms_and_cosines(tmp_path: Path) -> None:
    rule = begun_rule(sites=("a", "b", "c"))
    sent = rule.adapter_for("a")
    one = random_steps(sent, 1)
    dense_only = {
        name: tensor if "head" in name else torch.zeros_like(tensor) for name, tensor in one.items()
    }
    opposite = {name: -2 * tensor for name, tensor in dense_only.items()}
    found = measure(answered(tmp_path, rule, {"a": one, "b": dense_only, "c": opposite}))
    norm = float(dense_change(sent, one)[FACTOR_VALUES:].norm())
    assert found.norms(Group.dense).tolist() == pytest.approx([norm, norm, 2 * norm])
    assert found.cosines(Group.dense)[0].tolist() == pytest.approx([1.0, 1.0, -1.0])
    assert found.norms(Group.factors)[1:].tolist() == [0.0, 0.0]
    assert found.cosines(Group.factors)[0].tolist() == pytest.approx([1.0, 0.0, 0.0])
    assert found.moved() == [Group.factors, Group.dense]
    assert found.only({"b", "c"}).moved() == [Group.dense]
    assert found.only({"b", "c"}).sites == ("b", "c")


def test_sizes_are_the_numbers_that_a_site_sent(tmp_path: Path) -> None:
    rule = started_rule("exact_split", shares_of({"a": 2, "b": 4}, {"a": EVERY[:1]}))
    sent = {site: rule.adapter_for(site) for site in "ab"}
    found = measure(answered(tmp_path, rule, {site: random_steps(sent[site], 1) for site in "ab"}))
    out, width = LAYERS[EVERY[0]]
    assert found.sizes == {Group.factors: 2 * (out + width), Group.dense: 18}


def test_nobody_moved(tmp_path: Path) -> None:
    rule = begun_rule()
    found = measure(answered(tmp_path, rule, {"a": random_steps(rule.adapter_for("a"), 0, scale=0.0)}))
    assert found.moved() == []
    assert measure(answered(tmp_path, rule, {})).moved() == []


def test_one_tensor_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole answers are never loaded for a comparison."""
    rule = begun_rule()
    steps = answered(tmp_path, rule, {site: random_steps(rule.adapter_for(site), 1) for site in "abc"})
    monkeypatch.setattr(steps.answers, "update", None)
    assert measure(steps).moved() == [Group.factors, Group.dense]


def test_the_update_to_fold_is_what_the_site_trained(tmp_path: Path) -> None:
    rule = begun_rule(sites=("a",))
    sent = rule.adapter_for("a")
    moved = random_steps(sent, 3)
    steps: RoundSteps = answered(tmp_path, rule, {"a": moved})
    trained = steps.trained("a", 2.5).adapter.tensors
    assert all(
        torch.equal(trained[name], sent.tensors[name].double() + moved[name].double()) for name in moved
    )
    half = steps.trained("a", 2.5, {Group.factors: 0.5, Group.dense: 0.25})
    assert half.weight == 2.5
    assert half.started_from == as_update(sent, moved).started_from
    shorter = {name: tensor - sent.tensors[name] for name, tensor in half.adapter.tensors.items()}
    assert torch.allclose(shorter["head.bias"], 0.25 * moved["head.bias"].double())
    assert torch.allclose(shorter[f"{EVERY[0]}.lora_A"], 0.5 * moved[f"{EVERY[0]}.lora_A"].double())
