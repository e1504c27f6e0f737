"""Every recipe in configs/, by glob, and the glob counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config import CONFIG_DIR, list_recipes, load_recipe
from common.recipe import Recipe

RECIPES = sorted((p for p in CONFIG_DIR.glob("*.yaml") if p.stem != "base"), key=lambda path: path.stem)
REAL_IMAGES = {"retina": ["CHASE_DB1", "HRF"], "nuclei": ["DSB2018_96"], "nuclei-dp": ["DSB2018_96"]}


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> Recipe:
    """The recipe, with empty stand-ins for the data sets that it names."""
    path: Path = request.param
    for dataset in REAL_IMAGES.get(path.stem, []):
        (tmp_path / dataset).mkdir()
        (tmp_path / dataset / "index.csv").touch()
    return load_recipe(str(path), [f"data.root={tmp_path}"])


def test_every_recipe_was_found() -> None:
    known = {"demo", "five", "nuclei", "nuclei-dp", "phantom-dp", "retina", "smoke", "speckle"}
    assert {path.stem for path in RECIPES} >= known
    assert [path.stem for path in RECIPES] == [name for name, _ in list_recipes()]
    assert sorted(path.name for path in CONFIG_DIR.rglob("*.y*ml")) == sorted(
        [*(path.name for path in RECIPES), "base.yaml"]
    )


def test_a_recipe_is_called_as_its_file(recipe: Recipe, request: pytest.FixtureRequest) -> None:
    assert recipe.name in request.node.name
    assert recipe.description


def test_a_recipe_has_enough_sites(recipe: Recipe) -> None:
    planned = len(recipe.sites) or (recipe.cohort.sites if recipe.cohort else 0)
    assert planned >= recipe.run.min_sites >= 2


def test_a_recipe_is_private_if_and_only_if_its_name_says_so(recipe: Recipe) -> None:
    assert recipe.privacy.asked == recipe.name.endswith("-dp")
    assert recipe.privacy.withheld == recipe.privacy.asked, "what is measured on patients would leave"


def test_a_recipe_compares_with_the_student_that_no_other_site_helped(recipe: Recipe) -> None:
    assert {"local_only", "local_only_scratch"} <= set(recipe.baselines)


def test_a_recipe_has_enough_patients_to_show_its_numbers(recipe: Recipe) -> None:
    for site in recipe.sites:
        if site.phantom:
            assert site.phantom.test_patients >= recipe.policy.min_cell_patients
            assert site.phantom.train_patients >= recipe.policy.min_group_patients
