"""A run that every site refuses, by the command: the exit code says for what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.config import load_recipe, load_site, save_run_config, save_site
from common.privacy.keys import public_key
from common.privacy.policy import policy_from, sign_policy, template
from server.planning import build_plan
from simulations.simulate import prepare_sites
from tests.e2e import walks

PRIVATE = (
    "teacher.adapter=decoder", "privacy.noise_multiplier=1.2", "privacy.steps=3",
    "privacy.release_metrics=false", "generator.scope=none", walks.QUICK,
)  # fmt: skip


def over_the_cap(draft: dict[str, Any]) -> None:
    draft["max_epsilon_total"] = 0.5


def forbidden(draft: dict[str, Any]) -> None:
    draft["stages"]["adapt"] = "forbidden"


CASES: list[tuple[dict[str, Callable[[dict[str, Any]], None]], int, str]] = [
    ({"east": over_the_cap, "west": over_the_cap}, 21, "REFUSED_BUDGET"),
    ({"east": forbidden, "west": forbidden}, 20, "REFUSED_POLICY (stages.adapt)"),
    ({"east": over_the_cap, "west": forbidden}, 30, "REFUSED_BUDGET"),
]


@pytest.mark.parametrize(("policies", "code", "reason"), CASES, ids=["budget", "policy", "mixed"])
def test_a_run_that_its_sites_refuse_ends_with_the_code_of_their_reason(
    elsewhere: Path, policies: dict[str, Callable[[dict[str, Any]], None]], code: int, reason: str
) -> None:
    recipe, run = load_recipe("smoke", PRIVATE), elsewhere / "run"
    prepare_sites(recipe, run / "sites")
    (run / "sites" / ".complete").touch()
    save_run_config(recipe, run / "config.yaml")
    for site, change in policies.items():
        put_in_force(run / "sites" / site, change)
    done = walks.invoke("simulate", "smoke", "--out", run, "--resume", *PRIVATE)
    assert done.exit_code == code, done.output
    assert reason in done.output
    assert not (run / "state" / "outcome.json").exists()


def put_in_force(home: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A policy that allows the run, but for ``change``, signed by an officer of the site's own."""
    key, plan = Ed25519PrivateKey.generate(), build_plan(load_recipe("smoke", PRIVATE), "any")
    draft = template(home.name, "M. Ruiz", public_key(key), datetime.now(UTC) - timedelta(days=1))
    draft["stages"] |= {"adapt": "dp_required", "student": "local_only"}
    draft |= {"max_epsilon_total": 50.0, "max_epsilon_per_run": 50.0, "max_epsilon_per_year": 50.0}
    draft |= {"min_patients": 3}
    draft["payload"]["base_model_sha256"] = list(plan.models.values())
    draft["federation"] |= {"min_sites": 2, "allowed_sites": plan.sites, "max_rounds": 3,
                            "require_secure_aggregation": False}  # fmt: skip
    draft["code"]["allowed_fab_sha256"] = [plan.code_sha256]
    change(draft)
    sign_policy(policy_from(draft, "policy"), home, key)
    (home / "officer.pub").write_text(public_key(key))
    save_site(replace(load_site(home / "site.yaml"), officer_key="officer.pub"), home / "site.yaml")
