"""A policy that allows one run plan and nothing beyond it: what an officer reads, changes and signs.

Every field that decides is taken from the same `client.consent.asked_of` that the guard later holds against
the signed policy, so that a draft which is signed as it is lets exactly this run pass.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from client.account import STAGE, STYLED, privacy_plan, published_metrics, style_plan
from client.consent import asked_of
from client.private_adaptation import learning_rate
from client.site import Site
from common.errors import ArtefactError, ConfigError
from common.plan import RunPlan, Stage
from common.privacy.plan import PrivacyPlan
from common.privacy.policy import PayloadRule, StageRule, template
from common.privacy.terms import Asked, joint_epsilon

PLAN = "plan.json"  # in a site's folder: the last run that it agreed to
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
NOISE_TAIL = 6.0
LENGTH_ROOM = 1.01
CURES = {
    "style": "take generator.scope=none, or privacy.style_epsilon",
    "generator": "take generator.scope=none",
    "shared_student": "take student.scope=local",
    "student": "take privacy.release_metrics=false, or privacy.metric_epsilon",
    "evaluate": "take privacy.release_metrics=false, or privacy.metric_epsilon",
}


def read_plan(path: Path) -> RunPlan:
    """Raises ``ArtefactError`` if ``path`` holds no run plan of this version."""
    try:
        return RunPlan.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(
            f"{path} cannot be read: name the plan of the run (a site's plan.json)"
        ) from error


def draft_for(
    site: Site, plan: RunPlan, officer: tuple[str, str], issued: datetime
) -> tuple[dict[str, Any], list[str]]:
    """A draft that allows ``plan`` at ``site``, and what its officer should look at twice.

    Args:
        officer: name and public key.

    Raises:
        ConfigError: something of the plan would leave without noise, which no policy allows, or the site
            declares no patients.
        PolicyRefusal: numbers would leave with noise, and the site declares no test patients, or too few.
    """
    if not plan.privacy.asked or site.declared is None:
        why = "asks for no noise" if not plan.privacy.asked else "needs patients in site.yaml"
        raise ConfigError(f"a policy lets nothing leave without noise, and this plan {why}")
    terms, published = privacy_plan(plan.privacy, site.declared), published_metrics(plan, site)
    plans = {STAGE: terms}
    styled = style_plan(plan.privacy, site.declared) if Stage.style in plan.stages else None
    if styled is not None:
        plans[STYLED] = styled
    asked = asked_of(plan, site, plans, published)
    _refuse_bare(asked)
    usual = template(site.name, *officer, issued)
    draft = usual | {
        "delta": terms.delta,
        "max_epsilon_per_run": _upwards(joint_epsilon(asked, terms.delta, usual["discretisation"])),
        "max_images_per_unit": terms.max_images_per_patient,
        "min_noise_multiplier": min(one.noise_multiplier for one in plans.values()),
        "min_patients": min(usual["min_patients"], terms.patients),
        "stages": usual["stages"] | {stage: _rule(asked, stage) for stage in asked.runs},
        "payload": usual["payload"] | _payload(usual["payload"], asked, plan, terms),
        "federation": usual["federation"] | _federation(plan),
        "code": usual["code"] | {"allowed_fab_sha256": [plan.code_sha256]},
    }
    for cap in ("max_epsilon_per_year", "max_epsilon_total"):
        draft[cap] = max(usual[cap], draft["max_epsilon_per_run"])
    if published is not None:
        limits = {"epsilon_each": published.epsilon_each, "min_patients": published.patients}
        draft["metrics"] = {"per_site": True, "allowed": list(asked.metrics), **limits}
    return draft, _cautions(usual, draft)


def _refuse_bare(asked: Asked) -> None:
    """Raises ``ConfigError`` naming each stage that sends what no mechanism made, and its cure."""
    bare = [stage for stage in asked.sends if stage not in asked.noised]
    if bare:
        raise ConfigError(
            "a policy lets nothing leave without noise, and in this plan something does",
            [f"stage {stage}: {CURES.get(stage, 'leave the stage out')}" for stage in bare],
        )


def _rule(asked: Asked, stage: str) -> str:
    return str(StageRule.dp_required if stage in asked.noised else StageRule.local_only)


def _payload(usual: dict[str, Any], asked: Asked, plan: RunPlan, terms: PrivacyPlan) -> dict[str, Any]:
    """The template's rules that something of the plan needs, as tight as its noise allows.

    A tensor that the template does not name gets a rule of its own.
    """
    longest: dict[tuple[str, str], tuple[int, float]] = {}
    for one in asked.outbound:
        named = (rule["name"] for rule in usual["outbound"] if fnmatchcase(one.name, rule["name"]))
        key = next(named, one.name), one.dtype
        size, length = longest.get(key, (0, 0.0))
        numbers = one.bytes // ITEM_BYTES[one.dtype]
        longest[key] = max(size, one.bytes), max(length, longest_step(plan, terms, numbers))
    rules = [PayloadRule(*key, size, _upwards(length)) for key, (size, length) in sorted(longest.items())]
    return {
        "outbound": [asdict(rule) for rule in rules],
        "base_model_sha256": list(asked.base_models),
        "a_matrix_sha256": list(asked.a_matrices),
    }


def longest_step(plan: RunPlan, terms: PrivacyPlan, numbers: int) -> float:
    """The norm that a noised step of ``numbers`` numbers stays below, but for once in 60 million.

    All patients drawn, their gradients clipped and alike, and the norm of the noise, which exceeds the root
    of its dimension by t with a chance below exp(-t^2 / 2). `LENGTH_ROOM` is left to the wire's rounding.
    """
    gradients = terms.max_grad_norm * terms.patients
    noise = terms.noise_std * (math.sqrt(numbers) + NOISE_TAIL)
    return LENGTH_ROOM * learning_rate(plan, 0) * (gradients + noise) / terms.expected_batch


def _federation(plan: RunPlan) -> dict[str, Any]:
    return {
        "allowed_sites": list(plan.sites),
        "min_sites": len(plan.sites),
        "max_rounds": plan.rounds,
        "require_secure_aggregation": False,  # no run has it yet: each update carries its own noise
    }


def _upwards(epsilon: float) -> float:
    """To two digits, never below."""
    return math.ceil(epsilon * 100) / 100


def _cautions(usual: dict[str, Any], draft: dict[str, Any]) -> list[str]:
    """Where the draft is looser than the template, in words."""
    found = [
        f"{name} {draft[name]:g}: the usual is at most {usual[name]:g}"
        for name in ("max_epsilon_per_run", "max_epsilon_per_year", "max_epsilon_total", "delta")
        if draft[name] > usual[name]
    ]
    found += [
        f"{name} {draft[name]:g}: the usual is at least {usual[name]:g}"
        for name in ("min_noise_multiplier", "min_patients")
        if draft[name] < usual[name]
    ]
    sites = draft["federation"]["min_sites"]
    if sites < usual["federation"]["min_sites"]:
        found.append(f"federation.min_sites {sites}: of two sites each can work out the other's update")
    found.append("federation.require_secure_aggregation false: the server sees each update, with its noise")
    return found
