"""The server's momentum: by hand, through a rule, and over a restart."""

from __future__ import annotations

from collections.abc import Sequence

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


# --- of the factor B, under the rule of private runs ----------------------------------------------------


def factors(b: Tensor) -> Adapter:
    a = torch.tensor([[1.0, -2.0, 0.5], [0.25, 1.0, 3.0]])
    return Adapter({"layer.lora_A": a, "layer.lora_B": b}, BASE, 2, "dp")


def play_b(rule: AggregationRule, steps: Sequence[Tensor]) -> Adapter:
    """One round in which each site moves B by one of ``steps`` (4, 2); what goes down."""
    sent = rule.adapter_for("a").tensors["layer.lora_B"]
    rule.open_round()
    for site, step in zip(("a", "b"), steps, strict=True):
        moved = Adapter({"layer.lora_B": sent + step}, BASE, 2, "dp")
        rule.fold(site, AdapterUpdate(moved, 4.0, "ab" * 32))
    rule.close_round()
    return rule.adapter_for("a")


def started_ffa(momentum: float, wire: WireDtype = WireDtype.float32) -> AggregationRule:
    rule = build_rule(AggregationConfig("ffa", wire_dtype=wire), momentum)
    first = factors(torch.zeros(4, 2))
    rule.start(first, dict.fromkeys(("a", "b"), Share.of(first)))
    return rule


def test_b_moves_as_a_dense_tensor_does() -> None:
    rule, dense = started_ffa(0.9), started(0.9)
    for value in (1.0, -3.0, 0.5):
        step = torch.full((4, 2), value)
        b = play_b(rule, (step, 2 * step)).tensors["layer.lora_B"]
        assert torch.allclose(b, play(dense, torch.full((3,), value))[0].expand(4, 2), atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_noise_is_never_squared(momentum: float) -> None:
    """Over rounds the change of a layer is that of the steps plus that of their noise, which keeps A's rows:
    three times the noise moves it three times as far."""
    draw = torch.Generator().manual_seed(0)
    steps, noise = (torch.randn(4, 2, 4, 2, generator=draw) for _ in range(2))

    def change(of_steps: float, of_noise: float) -> Tensor:
        rule = started_ffa(momentum)
        for step, noised in zip(steps, noise, strict=True):
            sent = play_b(rule, tuple(of_steps * step + of_noise * noised))
        assert torch.equal(sent.tensors["layer.lora_A"], factors(torch.zeros(4, 2)).tensors["layer.lora_A"])
        return sent.change("layer")

    for times in (1.0, 3.0):
        assert torch.allclose(change(1, times), change(1, 0) + times * change(0, 1), atol=1e-5)


def test_steps_of_b_below_the_wires_precision_are_not_lost() -> None:
    """Of bfloat16 a step of 1/1000 beside 1 leaves nothing; what is kept adds up and goes down later."""
    rule = started_ffa(0.0, WireDtype.bfloat16)
    play_b(rule, (torch.ones(4, 2), torch.ones(4, 2)))
    small = torch.full((4, 2), 2.0**-10)
    for _ in range(16):
        sent = play_b(rule, (small, small))
    assert torch.allclose(sent.tensors["layer.lora_B"], torch.full((4, 2), 1 + 2.0**-6), atol=2.0**-8)


def test_a_round_that_cannot_be_closed_leaves_the_momentum_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    rule, undisturbed = started_ffa(0.9), started_ffa(0.9)
    step = torch.ones(4, 2)
    for one in (rule, undisturbed):
        play_b(one, (step, step))
    with monkeypatch.context() as patch:
        patch.setattr(rule, "_to_keep", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            play_b(rule, (5 * step, 5 * step))
    for one in (rule, undisturbed):
        last = play_b(one, (-step, -step))
    assert torch.equal(rule.adapter_for("a").tensors["layer.lora_B"], last.tensors["layer.lora_B"])
