"""A job in words, for the person who approves it: what it is, what leaves, what it costs, what is new.

Everything is read off the plan itself and the site's own files; no data file is opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from client.account import Account
from client.site import Site
from common.changes import changes
from common.errors import PolicyRefusal, WardroundError
from common.plan import PayloadSpec, RunPlan, Stage, Variant

SHOWN = 60  # characters of a changed value in a line


@dataclass(frozen=True)
class Leaving:
    """What leaves the site in all rounds of a stage: at most ``bytes`` each time."""

    stage: str
    rounds: int
    bytes: int
    tensors: int
    values: int
    numbers: list[str]


def leaving(site: Site, plan: RunPlan) -> list[Leaving]:
    """One entry a stage that sends anything; of stage adapt by the variant that the site trains."""
    found = []
    for stage in plan.stages:
        variant = _variant(site, plan).payloads if stage is Stage.adapt else []
        specs = [*variant, *(spec for spec in plan.payloads if spec.stage is stage)]
        if specs:
            most = max(specs, key=lambda spec: spec.max_bytes)
            values = sum(prod(tensor.shape) for tensor in most.tensors)
            told = sorted({number for spec in specs for number in spec.numbers})
            rounds = plan.rounds_of(stage)
            found.append(Leaving(str(stage), rounds, most.max_bytes, len(most.tensors), values, told))
    return found


def cost(site: Site, plan: RunPlan) -> dict[str, Any]:
    """What the plan would cost at ``site``.

    ``refused``: why its policy or its ledger would say no, in words for the site alone; empty if neither
    does. ``epsilon``: of this run; ``epsilon_after``: with all that the most used patients have spent.
    """
    found: dict[str, Any] = {"noised": plan.privacy.asked, "delta": plan.privacy.delta, "refused": ""}
    try:
        account = Account(site, plan)
        if account.terms is not None:
            terms = account.terms
            found |= {
                "noise_multiplier": terms.noise_multiplier, "sample_rate": terms.sample_rate,
                "steps": terms.steps, "epsilon": terms.epsilon(),
            }  # fmt: skip
        account.check()
        if account.terms is not None:
            found["epsilon_after"] = account.forecast()
            account.check_affordable()
    except WardroundError as refusal:
        found["refused"] = str(refusal)
    return found


def comparable(plan: RunPlan) -> dict[str, Any]:
    """``plan`` as nested keys, with its lists of named things under their names, so that `changes` tells."""
    body: dict[str, Any] = json.loads(plan.to_json())
    body["payloads"] = _turns(plan.payloads)
    body["variants"] = {
        f"{one.preset} of rank {one.rank}": {"a_sha256": one.a_sha256, **_turns(one.payloads)}
        for one in plan.variants
    }
    body["data"]["classes"] = {one["name"]: one for one in body["data"]["classes"]}
    return body


def changed(old: RunPlan, new: RunPlan) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value), field by field."""
    return list(changes(comparable(old), comparable(new)))


def change_line(key: str, old: Any, new: Any) -> str:
    """``key: old -> new``; of two lists what came and what went."""
    if isinstance(old, list) and isinstance(new, list):
        came = [f"+{_short(value)}" for value in new if value not in old]
        went = [f"-{_short(value)}" for value in old if value not in new]
        return f"{key}: {' '.join([*came, *went]) or 'in another order'}"
    return f"{key}: {_short(old)} -> {_short(new)}"


def lines(site: Site, plan: RunPlan) -> Iterator[str]:
    """The whole job in words."""
    variant = _variant(site, plan)
    yield (
        f"run {plan.run_id}: {plan.rounds} rounds of the teacher {plan.teacher.name}, adapter "
        f"{variant.preset} of rank {variant.rank}; student {site.student or plan.student.name}"
    )
    yield f"sites that are asked: {', '.join(plan.sites) or 'not named'}"
    yield f"last day: {plan.expires or 'none'}"
    yield f"code {plan.code_sha256[:16]}, bundle {plan.bundle_sha256[:16] or 'not named'}"
    for name, digest in sorted(plan.models.items()):
        yield f"model {name}: {digest[:16]}"
    for name, digest in sorted(plan.starts.items()):
        yield f"the first round starts from {name}: {digest[:16]}"
    yield "what leaves this site:"
    for one in leaving(site, plan):
        yield f"  {_leaving_line(one)}"
    yield (
        "answers are sealed: only the coordinator can read them"
        if plan.coordinator_key
        else "answers are not sealed: other members' nodes could fetch them"
    )
    yield "the global adapter and the styles of all sites go to every member, in the open"
    yield from _cost_lines(cost(site, plan))


def _leaving_line(one: Leaving) -> str:
    times = f"{one.rounds} x " if one.rounds > 1 else ""
    what = f"{one.tensors} tensors of {one.values:,} values, and " if one.tensors else ""
    numbers = ", ".join(number.rpartition(".")[2] for number in one.numbers)
    return f"{one.stage:<14} {times}at most {one.bytes:,} bytes: {what}{numbers}"


def _cost_lines(found: dict[str, Any]) -> Iterator[str]:
    if not found["noised"]:
        yield "privacy: NO GUARANTEE, what leaves is made without noise"
    elif "epsilon" in found:
        yield (
            f"privacy: epsilon {found['epsilon']:.3g} at delta {found['delta']:g} for this run (noise "
            f"{found['noise_multiplier']:.3g}, {found['steps']} steps, each patient in one of "
            f"{1 / found['sample_rate']:.3g})"
        )
    if "epsilon_after" in found:
        yield f"ledger: the most used patients would then have spent epsilon {found['epsilon_after']:.3g}"
    if found["refused"]:
        yield f"as things are this site would refuse it: {found['refused']}"


def _variant(site: Site, plan: RunPlan) -> Variant:
    """The one that the site trains; the plan's own where it lists none for the site, which then refuses."""
    try:
        return site.variant(plan)
    except PolicyRefusal:
        return plan.variants[0]


def _turns(specs: list[PayloadSpec]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for spec in specs:
        turn = sum(name.partition(" ")[0] == spec.stage for name in found)
        found[f"{spec.stage} {turn + 1}" if turn else str(spec.stage)] = {
            "tensors": {one.name: f"{one.dtype} {one.shape}" for one in spec.tensors},
            "numbers": spec.numbers,
            "max_bytes": spec.max_bytes,
        }
    return found


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 4]} ..."
