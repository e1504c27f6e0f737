"""A job as a coordinator submits it to sites: the run's folder before anything is sent.

``plan.json`` is the exact text that the sites are asked to approve. The walk makes the plan again, of the
recipe and the code that are there, and goes on only if it is the same to the bit.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from common import wire
from common.config import save_run_config
from common.durable import write_atomic
from common.errors import ArtefactError, ConfigError, PolicyRefusal
from common.plan import Round, RunPlan
from common.recipe import Recipe
from common.shared_student_rules import deployment_faults
from common.wire.sealed import create_sealing_key, read_sealing_key, unseal
from server.invited import ROSTER, Invited, read_roster, write_roster
from server.planning import JobTerms, build_plan
from server.state import plan_changes

PLAN_FILE = "plan.json"
SEALING_KEY = "sealing.key"


@dataclass(frozen=True)
class Submission:
    """The job in the folder ``run_dir``.

    Attributes:
        roster: of the sites that it is put to, each with its keys.
        key: opens what the sites seal.
    """

    run_dir: Path
    plan: RunPlan
    roster: Mapping[str, Invited]
    key: X25519PrivateKey

    @classmethod
    def load(cls, run_dir: Path) -> Submission | None:
        """None where nothing was submitted, as in a simulation. Raises ``ArtefactError``: damaged."""
        path = run_dir / PLAN_FILE
        if not path.exists():
            return None
        try:
            plan = RunPlan.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ArtefactError) as error:
            raise ArtefactError(f"{path} is no plan of this version: submit the run anew") from error
        key = read_sealing_key(run_dir / SEALING_KEY)
        if key.public_key().public_bytes_raw().hex() != plan.coordinator_key:
            raise ArtefactError(f"{run_dir / SEALING_KEY} is not the key of {path}: submit the run anew")
        return cls(run_dir, plan, read_roster(run_dir / ROSTER), key)

    @property
    def terms(self) -> JobTerms:
        return JobTerms(self.plan.bundle_sha256, self.plan.expires, self.plan.coordinator_key)

    @property
    def keys(self) -> dict[str, str]:
        """Site -> the public key with which it signs its answers."""
        return {site: invited.ledger_key for site, invited in self.roster.items()}

    def check(self, plan: RunPlan) -> None:
        """``plan`` is the one that was submitted, and not over.

        Raises:
            ArtefactError: naming what differs.
            PolicyRefusal: its last day has passed.
        """
        if plan.digest != self.plan.digest:
            raise ArtefactError(
                f"what would run is not what was submitted in {self.run_dir}: undo these changes, or submit "
                "it anew and have it approved",
                plan_changes(self.plan, plan, "as submitted"),
            )
        if plan.ended(datetime.now(UTC).date()):
            raise PolicyRefusal(f"the plan's last day was {plan.expires}: submit it anew", field="expired")

    def unseal(self, content: wire.Content, order: Round) -> wire.Content:
        """Raises ``ArtefactError`` like `common.wire.sealed.unseal`."""
        return unseal(content, order, self.key)


@dataclass(frozen=True)
class Asked:
    """What a coordinator says beside the recipe.

    Attributes:
        days: how long it may be worked on; None: no end.
        bundle_sha256, code_sha256: of the bundle that will run, and of the code in it; empty: this code runs.
    """

    roster: Mapping[str, Invited]
    days: int | None = None
    bundle_sha256: str = ""
    code_sha256: str = ""


def submit(recipe: Recipe, run_dir: Path, asked: Asked, today: date) -> RunPlan:
    """Stage ``recipe`` in ``run_dir``, which is empty, and return its plan. Nothing is sent.

    Raises:
        ConfigError: with everything that keeps it from running between hospitals.
        ArtefactError: a model is not there, or the disk is full.
    """
    _check(recipe, asked)
    key = create_sealing_key(run_dir / SEALING_KEY)
    expires = "" if asked.days is None else (today + timedelta(days=asked.days)).isoformat()
    plan = build_plan(recipe, secrets.token_hex(8), terms=JobTerms(asked.bundle_sha256, expires, key))
    plan = replace(plan, code_sha256=asked.code_sha256 or plan.code_sha256)
    invited = plan.sites or list(asked.roster)
    save_run_config(recipe, run_dir / "config.yaml")
    write_roster(run_dir / ROSTER, [asked.roster[site] for site in invited])
    write_atomic(run_dir / PLAN_FILE, plan.to_json().encode())  # last: with it there is a submission
    return plan


def _check(recipe: Recipe, asked: Asked) -> None:
    faults = [str(fault) for fault in deployment_faults(recipe)]
    unknown = [site.name for site in recipe.sites if site.name not in asked.roster]
    faults += [f"sites: {name} is in the recipe and not among the members; add it first" for name in unknown]
    there = len(recipe.sites or asked.roster)
    if there < recipe.run.min_sites:
        faults.append(f"run.min_sites: {recipe.run.min_sites} of {there} sites; lower it, or add members")
    if asked.bundle_sha256 and not re.fullmatch(r"[0-9a-f]{64}", asked.bundle_sha256):
        faults.append("the bundle's digest: is no SHA-256 of 64 hex digits")
    if faults:
        raise ConfigError("this recipe cannot be submitted", faults)
