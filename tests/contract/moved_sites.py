"""Sites that sent steps, for the tests of what compares them and takes them together; and their oracle.

The oracle forms every dense change, ``(B + dB)(A + dA) - B A``, and puts them side by side in one vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from common.adapter import Adapter, AdapterUpdate
from common.recipe import AggregationConfig
from server.aggregation import AggregationRule, Share, build_rule
from server.answers import Answers
from server.steps import Group, RoundSteps, sent_to
from tests.contract.dense_algebra import (
    EVERYTHING_GOES_DOWN,
    LAYERS,
    begun_adapter,
    changes,
    doubled,
    shares_of,
)

SITES = ("a", "b", "c", "d", "e")
DENSE = {"head.weight": (3, 5), "head.bias": (3,)}


def begun_rule(
    name: str = "exact_split", sites: Sequence[str] = SITES, trains_a: bool = True
) -> AggregationRule:
    """Started in float64 from an adapter that has learnt something; all sites have rank 4."""
    shares = shares_of(dict.fromkeys(sites, 4))
    if not trains_a:
        shares = {site: replace(share, preset="dp", trains_a=False) for site, share in shares.items()}
    return started_rule(name, shares)


def started_rule(name: str, shares: Mapping[str, Share]) -> AggregationRule:
    rule = build_rule(AggregationConfig(rule=name, **EVERYTHING_GOES_DOWN))
    rule.start(doubled(begun_adapter(max(share.rank for share in shares.values()))), shares)
    return rule


def random_steps(sent: Adapter, seed: int, scale: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    trained = sorted(sent.trained().tensors.items())
    return {name: scale * torch.randn(tensor.shape, generator=generator) for name, tensor in trained}


def alike(sent: Mapping[str, Adapter], seed: int, spread: float = 0.2) -> dict[str, dict[str, Tensor]]:
    """Site -> steps in a common direction, with a part of its own. All sites train the same."""
    common = random_steps(next(iter(sent.values())), seed)
    found = {}
    for index, (site, adapter) in enumerate(sorted(sent.items())):
        own = random_steps(adapter, 1000 * seed + index, spread * 0.3)
        found[site] = {name: common[name] + part for name, part in own.items()}
    return found


def as_update(sent: Adapter, steps: Mapping[str, Tensor], weight: float = 1.0) -> AdapterUpdate:
    return AdapterUpdate(replace(sent.trained(), tensors=dict(steps)), weight, sent.digest)


def answered(
    folder: Path,
    rule: AggregationRule,
    moved: Mapping[str, Mapping[str, Tensor]],
    weights: Mapping[str, float] | None = None,
) -> RoundSteps:
    """The round in which each site of ``moved`` sent these steps."""
    sent, answers = sent_to(rule, moved), Answers(folder)
    for site, steps in moved.items():
        answers.add(site, as_update(sent[site], steps, (weights or {}).get(site, 1.0)))
    return RoundSteps(answers, sent)


def dense_change(
    sent: Adapter, steps: Mapping[str, Tensor], factors: float = 1.0, dense: float = 1.0
) -> Tensor:
    """(d,): every layer's change, then every dense tensor's, with the steps that long."""
    parts = []
    for layer, (out, width) in sorted(LAYERS.items()):
        a, b = (sent.tensors.get(f"{layer}.{half}") for half in ("lora_A", "lora_B"))
        if a is None or b is None:
            parts.append(torch.zeros(out * width, dtype=torch.float64))
            continue
        a, b = a.double(), b.double()
        da, db = (steps.get(f"{layer}.{half}", torch.zeros(1)).double() for half in ("lora_A", "lora_B"))
        parts.append(((b + factors * db) @ (a + factors * da) - b @ a).flatten())
    return torch.cat([*parts, *(dense * steps[name].double().flatten() for name in sorted(DENSE))])


FACTOR_VALUES = sum(
    out * width for out, width in LAYERS.values()
)  # of a dense change, before the dense tensors
PARTS = {Group.factors: slice(0, FACTOR_VALUES), Group.dense: slice(FACTOR_VALUES, None)}


def whole(adapter: Adapter) -> Tensor:
    """(d,): what an adapter makes of the base, laid out as `dense_change`."""
    layers = changes(adapter)
    parts = [layers[layer].flatten() for layer in sorted(LAYERS)]
    return torch.cat([*parts, *(adapter.tensors[name].double().flatten() for name in sorted(DENSE))])
