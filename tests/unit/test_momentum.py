"""The server's momentum: by hand, through a rule, and over a restart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.adapter import Adapter, AdapterUpdate
from common.errors import ArtefactError
from common.recipe import AggregationConfig, WireDtype
from server.aggregation import AggregationRule, Share, build_rule
from server.aggregation.momentum import Momentum

BASE = "0f" * 32
FLOAT32 = AggregationConfig(wire_dtype=WireDtype.float32)


def decoder(values: Tensor) -> Adapter:
    return Adapter({"decoder.head.weight": values}, BASE, 0, "decoder")


def started(momentum: float) -> AggregationRule:
    rule = build_rule(FLOAT32, momentum)
    first = decoder(torch.zeros(3))
    rule.start(first, dict.fromkeys(("a", "b"), Share.of(first)))
    return rule


def play(rule: AggregationRule, step: Tensor) -> Tensor:
    """One round in which site a moves by ``step`` and b, of equal weight, by its double; what goes down."""
    sent = rule.adapter_for("a").tensors["decoder.head.weight"]
    rule.open_round()
    for site, share in (("a", 1.0), ("b", 2.0)):
        rule.fold(site, AdapterUpdate(decoder(sent + share * step), 4.0, "ab" * 32))
    rule.close_round()
    return rule.adapter_for("a").tensors["decoder.head.weight"]


def test_a_tensor_moves_by_the_running_mean_of_the_mean_steps() -> None:
    """b = 0.9 by hand: v1 = .1 s1 and the move s1; v2 = .09 s1 + .1 s2 over 1 - .81."""
    rule = started(0.9)
    one, two = torch.tensor([2.0, 0.0, -4.0]), torch.tensor([0.0, 2.0, 2.0])
    after = play(rule, one)
    assert torch.allclose(after, 1.5 * one)
    moved = play(rule, two) - after
    assert torch.allclose(moved, (0.09 * 1.5 * one + 0.1 * 1.5 * two) / (1 - 0.81), atol=1e-6)


def test_steps_that_stay_the_same_move_as_without_momentum() -> None:
    rule, plain = started(0.9), started(0.0)
    for _ in range(4):
        step = torch.tensor([1.0, -2.0, 0.5])
        assert torch.allclose(play(rule, step), play(plain, step), atol=1e-6)


def test_a_restored_rule_goes_on_bit_identically() -> None:
    draw = torch.Generator().manual_seed(0)
    steps = [torch.randn(3, generator=draw) for _ in range(4)]
    whole, first = started(0.9), started(0.9)
    uninterrupted = [play(whole, step) for step in steps]
    for step in steps[:2]:
        play(first, step)
    second = build_rule(FLOAT32, 0.9)
    second.restore(first.state())
    assert torch.equal([play(second, step) for step in steps[2:]][-1], uninterrupted[-1])


@pytest.mark.parametrize(("saved", "asked"), [(0.9, 0.0), (0.0, 0.9)])
def test_a_state_of_another_momentum_is_refused(saved: float, asked: float) -> None:
    before = started(saved)
    play(before, torch.ones(3))
    with pytest.raises(ArtefactError, match=r"privacy\.momentum"):
        build_rule(FLOAT32, asked).restore(before.state())


def test_without_a_factor_the_move_is_the_step_and_nothing_is_kept() -> None:
    momentum, step = Momentum(), torch.ones(2, dtype=torch.float64)
    assert momentum.next_round().move("x", step) is step
    assert momentum.next_round().state() == {}
