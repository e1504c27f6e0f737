"""Item 35: rounds in which nobody moves anything, and rounds that everybody refuses."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from client.app import app as honest
from client.dp.mechanism import PrivateGradient
from client.dp.poisson import PoissonSampler
from client.dp.randomness import SystemRandomness
from client.dp.rehearsal import MadeUpTask, RehearsalTerms
from common import wire
from common.adapter import Adapter, AdapterUpdate
from common.config import load_recipe
from common.errors import FederationError
from common.names import AGGREGATION_RULES, FIXED_A_RULES
from common.plan import RunPlan, Stage
from common.privacy.heads import SignedHead
from common.recipe import Recipe
from server.phases import Walk
from server.planning import build_plan
from simulations.benchmark.aggregation import walked
from simulations.loopback import Courier
from simulations.privacy_exam.hospital import private_recipe
from simulations.privacy_exam.verdict import Verdict

WEIGHT = 3.0


def item_35(rules: Sequence[str] = AGGREGATION_RULES) -> Verdict:
    """The mechanism with gradients of zero; then every rule, with an estimator too, and a private run."""
    recipes = [rule_recipe(rule, robust) for rule in rules for robust in ("none", "auto")]
    still = stopped = resumed = 0
    with tempfile.TemporaryDirectory() as name:
        for number, recipe in enumerate([*recipes, private_recipe()]):
            found = _walk(recipe, Path(name) / f"{number}-still", _answering(recipe))
            still += found is not None and _is_still(found)
            folder = Path(name) / f"{number}-refused"
            stopped += _walk(recipe, folder, _answering(recipe, refused=1)) is None
            again = _walk(recipe, folder, _answering(recipe))
            resumed += again is not None and _is_still(again)
    total, zeros = len(recipes) + 1, _zero_steps()
    figure = (
        f"zero updates leave the adapter as it was in {still} of {total} runs; a round that all refuse ends "
        f"{stopped} with their state, {resumed} go on from it; a step of zeros without noise is "
        f"{'zero' if zeros else 'NOT ZERO'}"
    )
    passed = still == stopped == resumed == total and zeros
    return Verdict("35", "nothing to fold; nobody to fold", figure, "no crash, no division by zero", passed)


def rule_recipe(rule: str, robust: str) -> Recipe:
    preset = "dp" if rule in FIXED_A_RULES else "base"
    settings = [f"aggregation.rule={rule}", f"aggregation.robust={robust}", f"teacher.adapter={preset}"]
    return load_recipe("smoke", [*settings, "generator.scope=none", "baselines=[]"])


def _answering(recipe: Recipe, refused: int | None = None) -> Courier:
    """A courier that agrees as its guard does, then answers zeros, and in round ``refused`` refuses."""
    plan = build_plan(recipe, "zeros")
    heads: dict[int, SignedHead | None] = {}  # of the nodes' ledgers, as they said when they agreed

    def carry(message: wire.Message, context: Any) -> wire.Message:
        if message.metadata.message_type != wire.ACTIONS[Stage.adapt]:
            reply: wire.Message = honest(message, context)
            if message.metadata.message_type == wire.ACTIONS[Stage.propose]:
                heads[message.metadata.dst_node_id] = wire.decode_answer(reply.content).ledger_head
            return reply
        order = wire.decode_order(message.content)
        if order.index == refused:
            return wire.reply_message(wire.encode_refusal("REFUSED_LOCAL"), message)
        update = _zeros(plan, order.index, wire.decode_adapter(message.content))
        update = replace(update, ledger_head=heads[message.metadata.dst_node_id])
        return wire.reply_message(wire.encode_update(order, update), message)

    return carry


def _zeros(plan: RunPlan, index: int, sent: Adapter) -> AdapterUpdate:
    """What the plan lists for a round, all of it zero."""
    listed = plan.variants[0].payload(index).tensors
    tensors = {one.name: torch.zeros(one.shape, dtype=getattr(torch, one.dtype)) for one in listed}
    return AdapterUpdate(replace(sent, tensors=tensors), WEIGHT, sent.digest, losses=(0.0, 0.0))


def _walk(recipe: Recipe, folder: Path, courier: Courier) -> Walk | None:
    """The teacher's rounds in ``folder``, or what is left of them; None: too few sites answered one."""
    try:
        return walked(recipe, folder, courier)
    except FederationError:
        return None


def _is_still(walk: Walk) -> bool:
    """Whether the adapter changes the network as the first one did, to the precision of the wire."""
    found, first = walk.rules[Stage.adapt].global_adapter(), walk.first.whole()
    layers = all(torch.allclose(found.change(one), first.change(one), atol=1e-6) for one in first.layers())
    dense = all(
        torch.allclose(found.tensors[name], tensor.to(torch.bfloat16).float(), atol=1e-6)
        for name, tensor in first.tensors.items()
        if ".lora_" not in name
    )
    return layers and dense and found.layers() == first.layers()


def _zero_steps() -> bool:
    """Gradients of zero, and nobody at all, through the clip and the division."""
    task = MadeUpTask(torch.ones(10, 16), [[row] for row in range(10)], scale=0.0)
    terms = RehearsalTerms(noise_std=0.0, max_grad_norm=1.0, steps=2, sample_rate=1.0)
    mechanism = PrivateGradient(task, task.trained, terms, SystemRandomness())
    everybody = mechanism.step(0)["weight"]
    with patch.object(PoissonSampler, "draw", lambda *_: []):
        nobody = mechanism.step(1)["weight"]
    return not everybody.any() and not nobody.any()
