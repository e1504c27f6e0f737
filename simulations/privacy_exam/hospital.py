"""Small hospitals with images, a ledger, an officer and a real guard, and private plans for them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import client.site as site_module
from client.guard import Guard, open_guard
from client.site import Site
from common.adapter import Adapter
from common.config import load_recipe, save_site
from common.guard_api import PlanAnswer
from common.plan import Round, RunPlan, Stage
from common.privacy.budget import Caps
from common.privacy.entries import Entry, EntryType
from common.privacy.keys import public_key
from common.privacy.ledger import Ledger
from common.privacy.policy import Policy, policy_from, sign_policy, template
from common.recipe import Recipe, SiteFile
from common.teacher import initial_adapter
from server.planning import build_plan
from simulations.phantoms import write_site

SITE = "east"
DECLARED = 3  # labelled training patients, as many as `make_home` gives unless it is told otherwise
SETTINGS = [
    "teacher.adapter=decoder", "privacy.noise_multiplier=1.5", "privacy.steps=2", "privacy.sample_rate=0.5",
    "privacy.release_metrics=false", "generator.scope=none", "baselines=[]",
]  # fmt: skip
DELTA = 1e-5


def private_recipe(*overrides: str) -> Recipe:
    """Two sites and two noised steps; nothing else of a patient leaves."""
    return load_recipe("smoke", [*SETTINGS, *overrides])


def private_plan(*overrides: str) -> RunPlan:
    return build_plan(private_recipe(*overrides), "private-run")


def make_home(folder: Path, patients: int = DECLARED) -> Path:
    """The folder of site `SITE` below ``folder``: phantoms, of them ``patients`` train, and a new ledger."""
    recipe, home = private_recipe(), folder / SITE
    phantom = recipe.sites[0].phantom
    assert phantom is not None
    write_site(replace(phantom, train_patients=patients), home / "data", 0, SITE)
    save_site(SiteFile(SITE, policy=recipe.policy, patients=DECLARED), home / "site.yaml")
    Ledger.create(home, SITE, Caps(DELTA))
    return home


class Office:
    """An officer with a key, whose policy allows exactly ``plan`` at ``home``."""

    def __init__(self, home: Path, plan: RunPlan) -> None:
        self.home, self.plan, self.key = home, plan, Ed25519PrivateKey.generate()
        (home / "officer.pub").write_text(public_key(self.key))
        site = SiteFile(SITE, policy=private_recipe().policy, patients=DECLARED, officer_key="officer.pub")
        save_site(site, home / "site.yaml")

    def sign(self, **changes: Any) -> Policy:
        """Put the policy in force, with ``changes`` of its top level."""
        now = datetime.now(UTC)
        draft = template(SITE, "M. Ruiz", public_key(self.key), now - timedelta(days=1))
        draft["stages"] |= {"adapt": "dp_required", "student": "local_only"}
        draft |= {"max_epsilon_total": 50.0, "max_epsilon_per_run": 50.0, "max_epsilon_per_year": 50.0}
        draft |= {"min_patients": DECLARED, "min_noise_multiplier": 1.0}
        draft["payload"] |= {"base_model_sha256": list(self.plan.models.values())}
        for rule in draft["payload"]["outbound"]:
            rule["max_l2"] = 1000.0  # of three patients the noise is a large share
        draft["federation"] |= {
            "min_sites": 2, "allowed_sites": self.plan.sites, "max_rounds": 10,
            "require_secure_aggregation": False,
        }  # fmt: skip
        draft["code"] |= {"allowed_fab_sha256": [self.plan.code_sha256]}
        policy = policy_from(draft | changes, "policy")
        sign_policy(policy, self.home, self.key)
        return policy


def order(plan: RunPlan, stage: Stage, index: int = 0) -> Round:
    return Round(plan.digest, stage, index, 60.0, "nonce")


def start(plan: RunPlan) -> Adapter:
    return initial_adapter(plan.teacher, plan.data, 0)


def ask(home: Path, plan: RunPlan) -> PlanAnswer:
    """The answer of the site's guard to ``plan``."""
    return Guard(Site.open(home)).propose(plan, order(plan, Stage.propose))


def agreed(home: Path, plan: RunPlan) -> Guard:
    """A guard that agreed to ``plan``."""
    guard = Guard(Site.open(home))
    answer = guard.propose(plan, order(plan, Stage.propose))
    assert (answer.agrees, answer.code) == (True, "")
    return guard


def entries(home: Path, kind: EntryType | None = None) -> list[Entry]:
    """Of the site's ledger, which holds."""
    found = Ledger.open(home, Caps(DELTA)).entries
    return found if kind is None else [entry for entry in found if entry.type is kind]


def forget_images() -> None:
    """The next reading of a site's data is from its files."""
    site_module._patients.cache_clear()


class Records:
    """What a site has written so far, beside its data; to be put back."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._files = {path: path.read_bytes() for path in home.iterdir() if path.is_file()}

    def restore(self) -> None:
        """As if nothing had happened since; no guard of this process remembers it either."""
        open_guard.cache_clear()
        for path in self._home.iterdir():
            if path.is_file() and path not in self._files:
                path.unlink()
        for path, data in self._files.items():
            path.write_bytes(data)


def without_patient(home: Path, folder: Path) -> Path:
    """The same site, keys and ledger among it, in ``folder`` and without its first patient."""
    other = folder / home.name
    shutil.copytree(home, other)
    manifest = other / "data" / "manifest.csv"
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(line for line in lines if ",p000," not in line))
    return other
