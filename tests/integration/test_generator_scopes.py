"""The scopes of the generator: what each sends, and that each paints (or does not)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.config import load_recipe, save_run_config
from server.outcome import RunOutcome
from simulations.loopback import run_loopback
from simulations.simulate import prepare_sites

EXTRA = {
    "token": ["generator.site_token=true"],
    "latent": ["generator.name=ward-diffusion-latent", "data.image_size=128"],
}
CASES = [
    "style", "style, latent", "local", "local, latent", "federated", "federated, token", "federated, latent",
    "recolour", "paint", "none",
]  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The federation alone, without the report, on the smallest recipe."""
    scope, _, extra = request.param.partition(", ")
    rivals = {"style": "recolour,random_colour", "recolour": "paint,augment", "none": "augment"}.get(scope)
    settings = [
        f"generator.scope={scope}",
        *EXTRA.get(extra, []),
        "run.rounds=1",
        f"baselines=[no_federation{',' + rivals if rivals else ''}]",
        "generator.keep_dice=0",
    ]
    recipe = load_recipe("smoke", settings)
    out = tmp_path_factory.mktemp(scope + extra)
    save_run_config(recipe, out / "config.yaml")
    prepare_sites(recipe, out / "sites")
    run_loopback(out, out / "sites")
    return scope, out


SHARING = ("style", "federated", "recolour", "paint")


def stages(out: Path) -> list[str]:
    return [record.stage for record in RunOutcome.load(out / "state").rounds]


def names_on_receipts(out: Path, site: str) -> set[str]:
    lines = (out / "sites" / site / "receipts.jsonl").read_text().splitlines()
    return {json.loads(line)["name"] for line in lines}


def test_a_scope_sends_what_it_needs_and_no_more(run: tuple[str, Path]) -> None:
    scope, out = run
    assert ("style" in stages(out)) == (scope in SHARING)
    assert ("generator" in stages(out)) == (scope == "federated")
    for site in ("east", "west"):
        sent = names_on_receipts(out, site)
        assert ("style" in sent) == (scope in SHARING)
        assert ("generator.adapter" in sent) == (scope == "federated")


def test_every_scope_but_none_paints_images(run: tuple[str, Path]) -> None:
    scope, out = run
    outcome = RunOutcome.load(out / "state")
    for site, note in outcome.notes.items():
        painted = list((out / "sites" / site / "synthetic").glob("*_mask.png"))
        assert note.generated == (0 if scope == "none" else 2)
        assert len(painted) == note.kept == note.generated


def test_the_federated_generator_is_one_for_all_and_changed(run: tuple[str, Path]) -> None:
    scope, out = run
    outcome = RunOutcome.load(out / "state")
    assert bool(outcome.generator_sha256) == (scope == "federated")
    if scope == "federated":
        record = next(record for record in outcome.rounds if record.stage == "generator")
        assert sorted(record.bytes_up) == ["east", "west"]
        assert record.residual is not None


def test_a_student_without_federation_is_trained_in_every_scope(run: tuple[str, Path]) -> None:
    _, out = run
    for site in ("east", "west"):
        assert (out / "sites" / site / "baselines" / "no_federation.safetensors").exists()


def test_a_generator_that_patients_trained_is_kept_and_its_images_were_held_against_them(
    run: tuple[str, Path],
) -> None:
    scope, out = run
    trained = scope in ("local", "federated")
    outcome = RunOutcome.load(out / "state")
    for site in ("east", "west"):
        home = out / "sites" / site
        assert (home / "generator.safetensors").exists() == trained
        assert (home / "quarantine" / "worst-pairs.html").exists() == trained
        assert (outcome.notes[site].dropped_copy is not None) == trained
        if trained:
            found = json.loads((home / "quarantine" / "findings.json").read_text())
            assert (found["images"], found["patients"], found["holdout"]) == (2, 3, 4)
            assert outcome.notes[site].dropped_copy == found["copied"] == 0


def test_a_rival_is_trained_beside_the_student_and_differs_from_it(run: tuple[str, Path]) -> None:
    scope, out = run
    rivals = {"style": ("recolour", "random_colour"), "recolour": ("paint", "augment"), "none": ("augment",)}
    for site in ("east", "west"):
        home = out / "sites" / site
        students = [home / "student.safetensors"]
        students += [home / "baselines" / f"{name}.safetensors" for name in rivals.get(scope, ())]
        assert len({path.read_bytes() for path in students}) == len(students)


def test_only_what_the_network_painted_names_it_and_own_pixels_are_said_to_be_own(
    run: tuple[str, Path],
) -> None:
    scope, out = run
    network = scope in ("style", "local", "federated")
    plan = json.loads((out / "sites" / "east" / "plan.json").read_text())
    assert (plan["generator"]["name"] in plan["models"]) == network
    if scope == "none":
        return
    said = json.loads((out / "sites" / "east" / "synthetic" / "provenance.json").read_text())
    assert said["scope"] == scope
    assert ("generator_sha256" in said) == network
    assert ("never leave" in said["pixels_of_patients"]) == (scope == "recolour")
    assert ("no patient" in said["masks"]) == (scope != "recolour")
