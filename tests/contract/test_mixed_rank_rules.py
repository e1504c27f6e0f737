"""The rules for sites of several ranks against the contract, and each against its own equation."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import pytest
import torch

from common.errors import ConfigError
from common.recipe import AggregationConfig, WireDtype
from server.aggregation import Share, build_rule
from tests.contract.aggregation_rule import AggregationRuleContract, ExactRuleContract
from tests.contract.dense_algebra import (
    EQUAL,
    EVERYTHING_GOES_DOWN,
    LAYERS,
    WEIGHTS,
    changes,
    dense_mean,
    distance,
    doubled,
    initial_adapter,
    play,
    shares_of,
    site_weights,
    train,
    truncated,
)

MIXED = {"a": 2, "b": 4, "c": 8, "d": 2}


class FloraContract(ExactRuleContract):
    rule: ClassVar[str] = "flora"

    def test_factors_start_anew_each_round(self) -> None:
        rule = self.started()
        seen = [rule.adapter_for("a").tensors]
        for seed in range(2):
            play(rule, self.updates(rule, seed, WEIGHTS))
            seen.append(rule.adapter_for("a").tensors)
        for layer in self.layers.get("a", tuple(LAYERS)):
            rows = [tensors[f"{layer}.lora_A"] for tensors in seen]
            assert not any(tensors[f"{layer}.lora_B"].any() for tensors in seen)
            assert all(not torch.allclose(one, other) for one, other in pairwise(rows))
            # As strong as the first ones, within what chance does to two small draws.
            assert 0.4 < float(rows[1].norm() / rows[0].norm()) < 2.5

    def test_a_lower_rank_has_the_first_rows_of_a_higher(self) -> None:
        rule = self.started()
        play(rule, self.updates(rule, 1, WEIGHTS))
        whole = rule.global_adapter().tensors
        for site, rank in self.ranks.items():
            for layer in self.layers.get(site, tuple(LAYERS)):
                name = f"{layer}.lora_A"
                assert torch.equal(rule.adapter_for(site).tensors[name], whole[name][:rank])


class TestFlora(FloraContract):
    ranks: ClassVar[dict[str, int]] = EQUAL

    def test_what_the_cap_cuts_off_comes_once_it_is_the_strongest(self) -> None:
        rule = build_rule(AggregationConfig("flora", energy=1.0, max_rank=2, wire_dtype=WireDtype.float32))
        rule.start(initial_adapter(4), self.shares())
        sent = rule.adapter_for("a")
        updates = self.updates(rule, 1, WEIGHTS)
        target = dense_mean([(u.weight, site_weights(sent, u)) for u in updates.values()])
        assert play(rule, updates) > 0.1
        held = changes(rule.global_adapter())
        assert distance(held, {layer: truncated(target[layer], 2) for layer in LAYERS}) <= 1e-6
        # Sites now undo all that they were sent: what is left must be exactly the part never sent.
        undoing = {site: train(rule.adapter_for(site), 0, scale=0.0) for site in EQUAL}
        for site, update in undoing.items():
            down = rule.adapter_for(site).tensors
            for layer in LAYERS:
                update.adapter.tensors[f"{layer}.lora_A"][:2] = down[f"{layer}.folded_A"]
                update.adapter.tensors[f"{layer}.lora_B"][:, :2] = -down[f"{layer}.folded_B"]
        play(rule, undoing)
        best = {layer: truncated(target[layer] - held[layer], 2) for layer in LAYERS}
        assert distance(changes(rule.global_adapter()), best) <= 1e-6

    def test_settings_out_of_range_are_all_named(self) -> None:
        for name in ("flora", "fedex"):
            with pytest.raises(ConfigError, match=name) as caught:
                build_rule(AggregationConfig(name, energy=1.5, max_rank=0))
            assert len(caught.value.faults) == 2


class TestFloraMixedRanks(FloraContract):
    ranks: ClassVar[dict[str, int]] = MIXED


class TestFloraMixedPresets(FloraContract):
    """Sites of several ranks that train other layers of the encoder, one of them B alone."""

    ranks: ClassVar[dict[str, int]] = MIXED
    layers: ClassVar[dict[str, tuple[str, ...]]] = {"a": ("encoder.0.qkv",), "d": ("encoder.0.qkv",)}
    fixed_a: ClassVar[tuple[str, ...]] = ("b",)


class OneLayoutContract(AggregationRuleContract):
    """Rules that take several ranks, but the same layers at all sites."""

    def test_other_layers_are_refused(self) -> None:
        rule = build_rule(AggregationConfig(rule=self.rule))
        shares = shares_of(self.ranks) | {"b": Share("last3", 4, ("encoder.0.qkv",))}
        with pytest.raises(ConfigError, match=self.rule) as caught:
            rule.start(initial_adapter(max(self.ranks.values())), shares)
        (fault,) = caught.value.faults
        assert fault.startswith("site 'b' has last3, with other layers than base")

    def test_a_rank_above_the_runs_is_refused(self) -> None:
        rule = build_rule(AggregationConfig(rule=self.rule))
        with pytest.raises(ConfigError) as caught:
            rule.start(initial_adapter(4), shares_of({"a": 4, "b": 5, "c": 0}))
        assert len(caught.value.faults) == 2

    def test_the_global_adapter_and_its_residual_are_of_the_rank_it_is_asked_for(self) -> None:
        rule = build_rule(AggregationConfig(rule=self.rule))
        every = tuple(sorted(LAYERS))
        rule.start(initial_adapter(max(self.ranks.values())), self.shares(), Share("base", 2, every))
        sent = {site: rule.adapter_for(site) for site in self.ranks}
        updates = self.updates(rule, 1, WEIGHTS)
        residual = play(rule, updates)
        mean = dense_mean([(u.weight, site_weights(sent[site], u)) for site, u in updates.items()])
        assert rule.global_adapter().rank == 2
        down = changes(rule.global_adapter())
        error = sum(float((down[x] - mean[x]).square().sum()) for x in LAYERS)
        norm = sum(float(mean[x].square().sum()) for x in LAYERS)
        assert residual == pytest.approx((error / norm) ** 0.5, abs=1e-6)


class FlexLoraContract(OneLayoutContract):
    rule: ClassVar[str] = "flexlora"

    def test_each_site_has_the_best_of_its_rank(self) -> None:
        rule = build_rule(AggregationConfig("flexlora", wire_dtype=WireDtype.float32))
        rule.start(doubled(initial_adapter(max(self.ranks.values()))), self.shares())
        for seed in range(3):
            sent = {site: rule.adapter_for(site) for site in self.ranks}
            updates = self.updates(rule, seed, WEIGHTS)
            mean = dense_mean([(u.weight, site_weights(sent[site], u)) for site, u in updates.items()])
            play(rule, updates)
            for site, rank in self.ranks.items():
                best = {layer: truncated(matrix, rank) for layer, matrix in mean.items()}
                assert distance(changes(rule.adapter_for(site)), best) <= 1e-9


class TestFlexLora(FlexLoraContract):
    ranks: ClassVar[dict[str, int]] = EQUAL

    def test_full_rank_is_the_mean(self) -> None:
        rule = build_rule(AggregationConfig("flexlora", wire_dtype=WireDtype.float32))
        ranks = dict.fromkeys("abcd", 10)
        rule.start(doubled(initial_adapter(10)), shares_of(ranks))
        for seed in range(2):
            sent = rule.adapter_for("a")
            updates = {site: train(sent, seed * 10 + index, 1.0 + index) for index, site in enumerate(ranks)}
            mean = dense_mean([(u.weight, site_weights(sent, u)) for u in updates.values()])
            assert play(rule, updates) <= 1e-9
            assert distance(changes(rule.global_adapter()), mean) <= 1e-9

    def test_what_is_cut_is_lost(self) -> None:
        """Unlike exact_split: sites that undo what they hold are left with nothing."""
        rule = self.started()
        assert play(rule, self.updates(rule, 1, WEIGHTS)) > 0.05
        undoing = {site: train(rule.adapter_for(site), 0, scale=0.0) for site in EQUAL}
        for update in undoing.values():
            for layer in LAYERS:
                update.adapter.tensors[f"{layer}.lora_B"].zero_()
        assert play(rule, undoing) == 0.0
        assert not any(change.any() for change in changes(rule.global_adapter()).values())


class TestFlexLoraMixedRanks(FlexLoraContract):
    ranks: ClassVar[dict[str, int]] = MIXED


class HetLoraContract(OneLayoutContract):
    rule: ClassVar[str] = "hetlora"

    def test_padded_factors_are_weighed_by_the_norm_of_their_product(self) -> None:
        """Row by row and column by column, with nothing but sums over the sites."""
        rule = build_rule(AggregationConfig("hetlora", wire_dtype=WireDtype.float32))
        highest = max(self.ranks.values())
        rule.start(doubled(initial_adapter(highest)), self.shares())
        updates = self.updates(rule, 1, WEIGHTS)
        play(rule, updates)
        for layer in LAYERS:
            parts, total = [], 0.0
            for update in updates.values():
                a, b = (update.adapter.tensors[f"{layer}.lora_{half}"] for half in "AB")
                strength = update.weight * float((b @ a).square().sum()) ** 0.5
                parts.append((strength, a, b))
                total += strength
            for site, rank in self.ranks.items():
                tensors = rule.adapter_for(site).tensors
                for row in range(rank):
                    holders = [(s, a[row], b[:, row]) for s, a, b in parts if a.shape[0] > row]
                    mean_a = sum(s * a for s, a, _ in holders) / total
                    mean_b = sum(s * b for s, _, b in holders) / total
                    assert torch.allclose(tensors[f"{layer}.lora_A"][row], mean_a, atol=1e-9)
                    assert torch.allclose(tensors[f"{layer}.lora_B"][:, row], mean_b, atol=1e-9)


class TestHetLora(HetLoraContract):
    ranks: ClassVar[dict[str, int]] = EQUAL

    def test_equal_norms_are_fedit(self) -> None:
        rules = [
            build_rule(AggregationConfig(name, wire_dtype=WireDtype.float32)) for name in ("hetlora", "fedit")
        ]
        for rule in rules:
            rule.start(doubled(initial_adapter(4)), self.shares())
        updates = self.updates(rules[0], 1, WEIGHTS)
        for update in updates.values():
            for layer in LAYERS:
                a, b = (update.adapter.tensors[f"{layer}.lora_{half}"] for half in "AB")
                b.div_((b @ a).norm())
        residuals = [play(rule, updates) for rule in rules]
        assert residuals[0] == pytest.approx(residuals[1], abs=1e-12)
        ours, theirs = (rule.global_adapter().tensors for rule in rules)
        assert all(torch.allclose(ours[name], tensor, atol=1e-12) for name, tensor in theirs.items())

    def test_a_site_that_changed_nothing_does_not_count(self) -> None:
        rule = self.started()
        updates = self.updates(rule, 1, WEIGHTS)
        for layer in LAYERS:
            updates["b"].adapter.tensors[f"{layer}.lora_B"].zero_()
        play(rule, updates)
        alone = self.started()
        play(alone, {site: update for site, update in updates.items() if site != "b"})
        assert distance(changes(rule.global_adapter()), changes(alone.global_adapter())) <= 1e-6


class TestHetLoraMixedRanks(HetLoraContract):
    ranks: ClassVar[dict[str, int]] = MIXED

    def test_rows_that_no_reply_holds_can_still_be_trained(self) -> None:
        rule = self.started()
        before = rule.adapter_for("c").tensors
        updates = self.updates(rule, 1, WEIGHTS)
        play(rule, {site: updates[site] for site in ("a", "d")})
        after = rule.adapter_for("c").tensors
        for layer in LAYERS:
            assert torch.equal(after[f"{layer}.lora_A"][2:], before[f"{layer}.lora_A"][2:])
            assert not after[f"{layer}.lora_B"][:, 2:].any()
            assert after[f"{layer}.lora_B"][:, :2].any()


def test_with_mixed_ranks_only_the_exact_rules_show_all_sites_the_same() -> None:
    alike = {}
    for name in ("exact_split", "flora", "flexlora", "hetlora"):
        rule = build_rule(AggregationConfig(name, **EVERYTHING_GOES_DOWN))
        rule.start(initial_adapter(8), shares_of(MIXED))
        play(rule, {site: train(rule.adapter_for(site), index) for index, site in enumerate(MIXED)})
        seen = [changes(rule.adapter_for(site)) for site in MIXED]
        alike[name] = max(distance(seen[0], each) for each in seen) <= 1e-6
    assert alike == {"exact_split": True, "flora": True, "flexlora": False, "hetlora": False}
