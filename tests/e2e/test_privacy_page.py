"""The officer's statement and page at the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.privacy.keys import public_key
from tests.privacy_sample import audited_site, bare_site
from wardround import main


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["privacy", *map(str, arguments)])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home") / "site"
    officer = Ed25519PrivateKey.generate()
    audited_site(folder, officer)
    folder.with_name("officer.pub").write_text(public_key(officer))
    return folder


# The keys of the registry's template of 2026 (see `common.privacy.report.registry`), written out by hand,
# without those that it leaves to the author: utility, additional_information, access_type_details,
# data_source_type_details.
REGISTRY_TEMPLATE = {
    "basic": "data_curators data_product_region data_product_sector data_product_type description "
    "intended_use name publication_date",
    "dp_variant": "data_domain unprotected_quantities variant_name",
    "privacy_loss": "number_of_privacy_units privacy_parameters privacy_parameters_details privacy_unit "
    "privacy_unit_details",
    "deployment_model": "access_type actors data_source_type model_name model_name_details release_type "
    "release_type_details trust_assumptions",
    "implementation": "composition justification mechanisms post_processing "
    "preprocessing_and_hyperparameter_tuning",
    "administrative": "evidence_sources registry_authors status tier",
}


def blocks(entry: dict[str, Any]) -> dict[str, str]:
    assert set(entry) == {"url_slug", "deployment"}
    return {name: " ".join(sorted(block)) for name, block in entry["deployment"].items()}


def test_the_statement_is_text_json_or_a_registry_entry(site: Path) -> None:
    key = ("--officer-key", site.with_name("officer.pub"))
    text = run("statement", site, *key)
    assert text.exit_code == 0, text.output
    assert text.stdout.startswith("VERDICT: WITHIN POLICY. harbour, run run-1.")
    assert text.stdout.count("\n\n") == 6  # the verdict, five sentences, the disclaimer
    document = json.loads(run("statement", site, *key, "--json").stdout)
    assert all(sentence["text"] in text.stdout for sentence in document["statement"])
    assert document["epsilons"][0]["delta"] == 1e-5
    entry = json.loads(run("statement", site, *key, "--registry").stdout)
    assert entry["deployment"]["administrative"]["tier"] == 3
    first = document["epsilons"][0]
    parameters = entry["deployment"]["privacy_loss"]["privacy_parameters"]
    assert parameters == {"epsilon": first["total"], "delta": first["delta"]}
    assert blocks(entry) == REGISTRY_TEMPLATE
    assert run("statement", site, "--json", "--registry").exit_code == 2
    assert run("statement", site, "--run", "run-9").exit_code == 12


def test_the_page_is_written_and_checked(site: Path) -> None:
    assert run("page", site, "--check").exit_code == 12  # nothing was made yet
    made = run("page", site, "--officer-key", site.with_name("officer.pub"), "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["page"] == str(site / "privacy.html")
    assert run("page", site, "--check").exit_code == 0
    (site / "privacy.html").write_text("another")
    assert run("page", site, "--check").exit_code == 22


def test_a_site_without_noise_is_told_so(tmp_path: Path) -> None:
    bare_site(tmp_path / "quay")
    result = run("statement", tmp_path / "quay")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("VERDICT: NO GUARANTEE. quay, run run-b.")


def test_a_record_that_does_not_hold_is_told_and_exits_with_22(site: Path, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger.pub"
    stranger.write_text(public_key(Ed25519PrivateKey.generate()))
    result = run("statement", site, "--officer-key", stranger)
    assert result.exit_code == 22
    assert result.stdout.startswith("VERDICT: THE RECORD DOES NOT HOLD")
    assert run("statement", tmp_path).exit_code == 12
