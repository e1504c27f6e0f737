"""The privacy officer at the command line: plan, draw, sign, keep the ledger, verify."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from common.privacy import planner
from common.privacy.budget import Caps
from common.privacy.entries import Context
from common.privacy.events import Event
from common.privacy.ledger import Ledger
from wardround import main

RUN = ("--patients", "60", "--batch", "6", "--rounds", "4", "--steps", "2")


def run(*arguments: str, answers: str | None = None) -> Result:
    return CliRunner().invoke(main, ["privacy", *arguments], input=answers)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, and without the child that loads Opacus (the accounting's tests ask it)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planner, "prv_epsilon", lambda events, delta: (None, "not asked here"))


def test_the_plan_has_exactly_the_contracted_keys() -> None:
    result = run("plan", *RUN, "--noise-multiplier", "2", "--json")
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert list(plan) == [
        "noise_multiplier", "sample_rate", "steps", "delta", "epsilon", "epsilon_replace_one",
        "epsilon_if_shuffled", "epsilon_if_image_level", "attacker", "noise_per_coordinate",
        "epsilon_total_after", "cheapest_change", "verdict",
    ]  # fmt: skip
    assert set(plan["epsilon"]) == {"pld", "prv", "rdp"}
    assert set(plan["attacker"]) == {"0.001", "0.01", "0.1"}
    assert (plan["sample_rate"], plan["steps"], plan["verdict"]) == (0.1, 8, "OK")
    assert plan["noise_per_coordinate"] == pytest.approx(2 / 6, abs=1e-6)
    assert plan["epsilon"]["pld"] < plan["epsilon"]["rdp"] < plan["epsilon_if_image_level"]


def test_history_counts_and_the_cap_is_said_to_be_passed() -> None:
    ledger = Ledger.create(Path("site"), "harbour", Caps(1e-5))
    ledger.reserve(Context("before"), "adapt", ["a", "b"], [Event(1.0, 1.0, 1)])
    options = (*RUN, "--noise-multiplier", "2", "--history", "site")
    plan = json.loads(run("plan", *options, "--cap", "4.42", "--json").stdout)
    assert plan["epsilon_total_after"] > max(4.42, plan["epsilon"]["pld"])
    assert plan["verdict"] == "OVER"
    assert "->" in plan["cheapest_change"]
    spent_out = json.loads(run("plan", *options, "--cap", "3", "--json").stdout)
    assert spent_out["verdict"] == "INFEASIBLE"
    assert spent_out["cheapest_change"].startswith("none")


def test_the_table_names_unit_band_and_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "NOISE_TABLE", (2.0,))
    monkeypatch.setattr(planner, "ROUNDS_TABLE", (1.0,))
    result = run("plan", *RUN, "--noise-multiplier", "2")
    assert result.exit_code == 0, result.output
    for words in ("unit: patient", "a convention", "if shuffled", "replace-one", "cheapest change", "Dice"):
        assert words in result.stdout


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ((*RUN,), 2),
        ((*RUN, "--noise-multiplier", "1", "--epsilon", "2"), 2),
        ((*RUN, "--epochs", "2", "--epsilon", "2"), 2),
        ((*RUN, "--noise-multiplier", "1", "--delta", "0.02"), 10),
        (("--patients", "5", "--batch", "9", "--rounds", "0", "--steps", "0", "--epsilon", "1"), 10),
        ((*RUN, "--noise-multiplier", "-1"), 10),
        ((*RUN, "--noise-multiplier", "1", "--history", "nowhere"), 12),
    ],
)
def test_a_wrong_question_has_its_exit_code(options: tuple[str, ...], code: int) -> None:
    assert run("plan", *options).exit_code == code


def test_the_curve_is_one_picture_that_names_its_numbers() -> None:
    options = (*RUN, "--noise-multiplier", "2", "--out", "curve.svg")
    assert run("curve", *options).exit_code == 0
    text = Path("curve.svg").read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert all(words in text for words in ("this run", "guessing", "alone", "one patient added or removed"))
    run("curve", *options)
    assert Path("curve.svg").read_text() == text


def test_an_officer_signs_a_policy_and_the_site_checks_it() -> None:
    assert run("key", "officer.key").exit_code == 0
    assert run("key", "officer.key").exit_code == 12
    new = ("policy", "new", "harbour", "--officer", "A. Officer", "--officer-key", "officer.key.pub")
    assert run(*new, "--out", "policy.yaml").exit_code == 0
    assert run(*new, "--out", "policy.yaml").exit_code == 12
    assert run("ledger", "new", "site", "--site", "harbour").exit_code == 0
    assert run("policy", "sign", "policy.yaml", "--key", "officer.key", "--out", "site").exit_code == 0
    check = ("policy", "check", "site/policy.json", "--officer-key", "officer.key.pub", "--ledger", "site")
    assert json.loads(run(*check, "--json").stdout)["version"] == 1
    assert "forbidden" in run("policy", "show", "site/policy.json").stdout
    Path("site/policy.json").write_text(Path("site/policy.json").read_text().replace("8.0", "80.0"))
    result = run(*check)
    assert result.exit_code == 20
    assert "signature" in result.stderr


def test_the_ledger_is_kept_and_verified() -> None:
    run("key", "officer.key")
    run("ledger", "new", "site", "--site", "harbour")
    ledger = Ledger.open(Path("site"), Caps(1e-5))
    ledger.reserve(Context("run"), "adapt", ["anna", "bert"], [Event(2.0, 1.0, 1)])
    assert run("ledger", "merge", "site", answers="anna\nbert\n").exit_code == 0
    assert run("ledger", "roll", "site").exit_code == 0
    checkpoint = ("ledger", "checkpoint", "site", "--key", "officer.key", "--out", "site/checkpoint.json")
    assert run(*checkpoint).exit_code == 0
    shown = run("ledger", "show", "site")
    assert "1 patients: epsilon" in shown.stdout
    assert "anna" not in shown.stdout
    document = json.loads(run("ledger", "show", "site", "--json").stdout)
    assert [entry["type"] for entry in document["entries"]] == [
        "GENESIS", "RESERVE", "MERGE", "KEYROLL", "CHECKPOINT",
    ]  # fmt: skip
    assert run("ledger", "bundle", "site", "site.zip").exit_code == 0
    result = run("verify", "--bundle", "site.zip", "--officer-key", "officer.key.pub", "--json")
    assert result.exit_code == 22  # it spends without a plan
    assert json.loads(result.stdout)["holds"] is False
    assert "reserves for a stage that no plan names" in result.stderr
