"""The plan: everything a site agrees to, and nothing of where its files lie."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.code_digest import code_sha256
from common.plan import RunPlan, Stage
from common.recipe import GeneratorScope, Recipe
from server.planning import build_plan, first_adapters, run_stages


def test_the_same_recipe_is_the_same_plan(smoke_recipe: Recipe, smoke_plan: RunPlan) -> None:
    again = build_plan(smoke_recipe, smoke_plan.run_id)
    assert replace(again, code_sha256="") == replace(smoke_plan, code_sha256="")
    assert RunPlan.from_json(smoke_plan.to_json()).digest == smoke_plan.digest


def test_where_files_lie_is_no_part_of_a_plan(smoke_recipe: Recipe) -> None:
    rooted = replace(smoke_recipe, data=replace(smoke_recipe.data, root="/srv/images"))
    plan = build_plan(rooted, "x")
    assert plan.data.root is None
    assert "/srv/images" not in plan.to_json()


def test_the_payload_of_training_is_the_adapter_to_the_element(smoke_recipe: Recipe) -> None:
    recipe = replace(smoke_recipe, generator=replace(smoke_recipe.generator, scope=GeneratorScope.federated))
    plan, first = build_plan(recipe, "x"), first_adapters(recipe)
    assert first.generator is not None
    for stage, adapter in ((Stage.adapt, first.teachers[0]), (Stage.generator, first.generator)):
        spec = plan.payload(stage)
        assert spec is not None
        expected = {name: list(tensor.shape) for name, tensor in adapter.trained().tensors.items()}
        assert {tensor.name: tensor.shape for tensor in spec.tensors} == expected
        assert {tensor.dtype for tensor in spec.tensors} == {"bfloat16"}
        layout = sum(len(name) + 32 for name in expected)
        assert adapter.elements * 2 < spec.max_bytes <= adapter.elements * 2 * 1.02 + 1025 + layout
        assert adapter.base_sha256 in plan.models.values()


def test_the_plan_lists_every_variant_that_a_site_trains_the_recipes_first(smoke_recipe: Recipe) -> None:
    east, west = smoke_recipe.sites
    third = replace(east, name="south")  # says nothing: the recipe's
    mixed = replace(smoke_recipe, sites=[replace(east, rank=2), replace(west, adapter="wide"), third])
    plan, first = build_plan(mixed, "x"), first_adapters(mixed)
    assert [(one.preset, one.rank) for one in plan.variants] == [("base", 8), ("base", 2), ("wide", 16)]
    for variant, adapter in zip(plan.variants, first.teachers, strict=True):
        expected = {name: list(tensor.shape) for name, tensor in adapter.trained().tensors.items()}
        assert {tensor.name: tensor.shape for tensor in variant.payload(0).tensors} == expected
    whole = first.whole()
    assert (whole.preset, whole.rank) == ("base", 16)
    assert set(whole.layers()) == {layer for one in first.teachers for layer in one.layers()}
    assert all(whole.tensors[f"{layer}.lora_A"].shape[0] == 16 for layer in first.teachers[2].layers())
    for adapter in first.teachers:  # nested: each variant starts from the first rows
        for layer in adapter.layers():
            a = adapter.tensors[f"{layer}.lora_A"]
            assert torch.equal(a, whole.tensors[f"{layer}.lora_A"][: len(a)])


def test_a_plan_names_its_aggregation(smoke_recipe: Recipe) -> None:
    rule = replace(smoke_recipe.aggregation, rule="fedit")
    plan = build_plan(replace(smoke_recipe, aggregation=rule), "x")
    assert plan.aggregation == rule
    assert plan.digest != build_plan(smoke_recipe, "x").digest


def test_an_alternating_rule_lists_what_each_round_sends(smoke_recipe: Recipe) -> None:
    """Rounds 0, 2, ... send B, rounds 1, 3, ... send A; the decoder is in both, folded factors in none."""
    generator = replace(smoke_recipe.generator, scope=GeneratorScope.federated)
    rule = replace(smoke_recipe.aggregation, rule="rolora")
    recipe = replace(smoke_recipe, aggregation=rule, generator=generator)
    plan, first = build_plan(recipe, "x"), first_adapters(recipe)
    assert RunPlan.from_json(plan.to_json()).digest == plan.digest
    assert first.generator is not None
    for stage, adapter in ((Stage.adapt, first.teachers[0]), (Stage.generator, first.generator)):
        dense = {name for name in adapter.tensors if ".lora_" not in name}
        for index, half in enumerate(["lora_B", "lora_A", "lora_B", "lora_A"]):
            spec = plan.payload(stage, index)
            assert spec is not None
            sent = {tensor.name for tensor in spec.tensors}
            assert sent == dense | {f"{layer}.{half}" for layer in adapter.layers()}
            elements = sum(adapter.tensors[name].numel() for name in sent)
            layout = sum(len(name) + 32 for name in sent)
            assert elements * 2 < spec.max_bytes <= elements * 2 * 1.02 + 1025 + layout


@pytest.mark.parametrize(
    ("scope", "style", "generator"),
    [
        (GeneratorScope.none, False, False),
        (GeneratorScope.local, False, False),
        (GeneratorScope.style, True, False),
        (GeneratorScope.recolour, True, False),
        (GeneratorScope.paint, True, False),
        (GeneratorScope.federated, True, True),
    ],
)
def test_styles_travel_only_where_others_paint_with_them(
    smoke_recipe: Recipe, scope: GeneratorScope, style: bool, generator: bool
) -> None:
    stages = run_stages(replace(smoke_recipe, generator=replace(smoke_recipe.generator, scope=scope)))
    assert (Stage.style in stages, Stage.generator in stages) == (style, generator)


def test_numbers_are_listed_by_their_path(smoke_plan: RunPlan) -> None:
    metrics = smoke_plan.payload(Stage.evaluate)
    assert metrics is not None
    assert {"metrics.site", "metrics.counts.patients", "metrics.metrics.ci95"} <= set(metrics.numbers)


def test_the_code_digest_covers_every_shipped_file(tmp_path: Path) -> None:
    for folder in ("client", "common/privacy", "server"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.py").write_text("x = 1\n")
    seen = {code_sha256(tmp_path)}
    for path in sorted(tmp_path.rglob("*.py")):
        path.write_text("x = 2\n")
        seen.add(code_sha256(tmp_path))
    (tmp_path / "server" / "b.py").write_text("")
    seen.add(code_sha256(tmp_path))
    assert len(seen) == 5
