"""An officer's way by the command line: a run at home, a draft from its plan, a signature, what it stops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from client.dp import canaries, dress_rehearsal
from tests.e2e import walks

PRIVATE = (
    "teacher.adapter=decoder", "privacy.steps=2", "privacy.sample_rate=0.5", "privacy.release_metrics=false",
    "generator.scope=none", walks.QUICK,
)  # fmt: skip
SITES = ("east", "west")


@pytest.fixture
def signed(elsewhere: Path) -> tuple[str, ...]:
    """Settings that put a policy at every site, each drafted from the same run at noise 1.5."""
    rehearsed = walks.invoke("simulate", "smoke", "--out", "home", "privacy.noise_multiplier=1.5", *PRIVATE)
    assert rehearsed.exit_code == 0, rehearsed.output
    assert walks.invoke("privacy", "key", "officer.key").exit_code == 0
    settings = []
    for site in SITES:
        draft = ("--officer", "M. Ruiz", "--officer-key", "officer.key.pub", "--out", f"{site}.yaml")
        drafted = walks.invoke("privacy", "policy", "draft", f"home/sites/{site}", *draft)
        assert drafted.exit_code == 0, drafted.output
        assert "look twice: federation.min_sites 2" in drafted.output
        done = walks.invoke(
            "privacy", "policy", "sign", f"{site}.yaml", "--key", "officer.key", "--out", site
        )
        assert done.exit_code == 0, done.output
        settings += [
            f"sites.{site}.signed_policy={site}/policy.json",
            f"sites.{site}.officer_key=officer.key.pub",
        ]
    return tuple(settings)


def test_a_draft_that_is_signed_as_it_is_lets_that_run_pass_and_no_looser_one(
    signed: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dress_rehearsal, "THOROUGH_NOISE", 50_000)
    monkeypatch.setattr(dress_rehearsal, "CANARIES", 100)
    monkeypatch.setattr(canaries, "STEPS_A_WORLD", 60)
    same = walks.invoke(
        "simulate", "smoke", "--out", "same", "privacy.noise_multiplier=1.5", *PRIVATE, *signed
    )
    assert same.exit_code == 0, same.output
    verify = ("privacy", "verify", "--bundle", "same/sites/east", "--officer-key", "officer.key.pub")
    owing = walks.invoke(*verify)
    assert owing.exit_code == 22, "the draft requires an audit of what left"
    assert owing.stdout.endswith("AN AUDIT IS OWED; the record holds otherwise\n")
    assert "wardround privacy audit" in owing.stderr
    assert walks.invoke("privacy", "audit", "same/sites/east").exit_code == 0
    verified = walks.invoke(*verify, "--json")
    assert verified.exit_code == 0, verified.output
    assert json.loads(verified.stdout)["policy"]["id"] == "east-privacy"
    for looser, field in {
        "privacy.noise_multiplier=1.4": "min_noise_multiplier",
        "privacy.max_images_per_patient=3": "max_images_per_unit",
        "privacy.steps=3": "max_epsilon_per_run",
    }.items():
        asked = dict(item.split("=", 1) for item in ("privacy.noise_multiplier=1.5", *PRIVATE)) | dict(
            [looser.split("=")]
        )
        settings = [f"{key}={value}" for key, value in asked.items()]
        refused = walks.invoke("simulate", "smoke", "--out", looser, *settings, *signed)
        assert refused.exit_code == 20, refused.output
        assert field in Path(looser, "events.jsonl").read_text()


def test_a_policy_of_another_officer_and_one_without_its_signature_are_refused(
    signed: tuple[str, ...],
) -> None:
    assert walks.invoke("privacy", "key", "other.key").exit_code == 0
    foreign = [setting.replace("officer.key.pub", "other.key.pub") for setting in signed]
    Path("west/policy.json.sig").unlink()
    refused = walks.invoke(
        "simulate", "smoke", "--out", "foreign", "privacy.noise_multiplier=1.5", *PRIVATE, *foreign
    )
    assert refused.exit_code == 20, refused.output
    events = Path("foreign/events.jsonl").read_text()
    assert "REFUSED_POLICY (officer)" in events
    assert "REFUSED_POLICY (policy)" in events


def test_what_the_draft_cannot_allow_is_named_with_its_cure(elsewhere: Path) -> None:
    done = walks.invoke("simulate", "smoke", "--out", "open", walks.QUICK)
    assert done.exit_code == 0, done.output
    assert walks.invoke("privacy", "key", "officer.key").exit_code == 0
    draft = ("--officer", "M. Ruiz", "--officer-key", "officer.key.pub", "--out", "policy.yaml")
    refused = walks.invoke("privacy", "policy", "draft", "open/sites/east", *draft)
    assert refused.exit_code == 10
    assert "asks for no noise" in refused.output
    path = Path("open/sites/east/plan.json")
    plan = json.loads(path.read_text())
    plan["privacy"] |= {"noise_multiplier": 1.5}
    path.write_text(json.dumps(plan))
    site = Path("open/sites/east/site.yaml")
    site.write_text(yaml.safe_dump(yaml.safe_load(site.read_text()) | {"patients": 40}))
    refused = walks.invoke("privacy", "policy", "draft", "open/sites/east", *draft)
    assert refused.exit_code == 10
    assert "stage style: take generator.scope=none" in refused.output
    assert not Path("policy.yaml").exists()


def test_a_policy_without_its_key_is_a_fault_of_the_recipe(elsewhere: Path) -> None:
    found = walks.invoke("validate", "smoke", "sites.east.signed_policy=nowhere/policy.json")
    assert found.exit_code == 10
    assert "signed_policy and officer_key go together" in found.output
    assert "there is no file" in found.output
