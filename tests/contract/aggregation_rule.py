"""What every aggregation rule promises: the base classes that each rule's test class inherits."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.adapter import Adapter, AdapterUpdate
from common.errors import ArtefactError, ConfigError, FederationError
from common.precision import pack_down, unpack
from common.recipe import AggregationConfig, WireDtype
from common.tuning.halves import BOTH, Halves
from server.aggregation import Share, build_rule
from server.aggregation.base import AggregationRule
from tests.contract.dense_algebra import (
    BASE,
    EVERYTHING_GOES_DOWN,
    LAYERS,
    begun_adapter,
    changes,
    dense_mean,
    distance,
    doubled,
    frobenius,
    initial_adapter,
    play,
    same_tensors,
    shares_of,
    site_weights,
    train,
)


class AggregationRuleContract:
    """Inherited by one class a rule. ``ranks`` are ones that the rule serves, in sorted order of sites.

    ``layers`` names those that a site trains, where it does not train them all; ``fixed_a`` the sites that
    train B alone.
    """

    rule: ClassVar[str] = ""
    ranks: ClassVar[dict[str, int]] = {}
    layers: ClassVar[dict[str, tuple[str, ...]]] = {}
    fixed_a: ClassVar[tuple[str, ...]] = ()

    def shares(self) -> dict[str, Share]:
        found = shares_of(self.ranks, self.layers)
        return found | {site: replace(found[site], preset="dp", trains_a=False) for site in self.fixed_a}

    def started(self, **settings: float) -> AggregationRule:
        rule = build_rule(AggregationConfig(rule=self.rule, **(EVERYTHING_GOES_DOWN | settings)))
        rule.start(initial_adapter(max(self.ranks.values())), self.shares())
        return rule

    def updates(self, rule: AggregationRule, seed: int, weights: Sequence[float]) -> dict[str, AdapterUpdate]:
        return {
            site: self.trained(rule, site, seed * 100 + index, weight)
            for index, (site, weight) in enumerate(zip(self.ranks, weights, strict=True))
        }

    def halves(self, rule: AggregationRule) -> Halves:
        """The factors that sites train in the round to come, as far as their presets train them."""
        return BOTH

    def trained(
        self, rule: AggregationRule, site: str, seed: int, weight: float = 1.0, scale: float = 0.3
    ) -> AdapterUpdate:
        return train(rule.adapter_for(site), seed, weight, scale, self.halves(rule))

    def test_first_adapter_is_the_initial_one(self) -> None:
        rule = self.started()
        initial = initial_adapter(max(self.ranks.values()))
        assert same_tensors(rule.global_adapter(), initial)
        for site, rank in self.ranks.items():
            sent = rule.adapter_for(site)
            assert (sent.rank, sent.base_sha256) == (rank, BASE)
            for layer in self.layers.get(site, tuple(LAYERS)):
                assert torch.equal(sent.tensors[f"{layer}.lora_A"], initial.tensors[f"{layer}.lora_A"][:rank])
                assert not sent.tensors[f"{layer}.lora_B"].any()

    def test_factors_have_the_rank_of_their_site_in_every_round(self) -> None:
        rule = self.started()
        for seed in range(3):
            for site, rank in self.ranks.items():
                tensors = rule.adapter_for(site).tensors
                assert rule.adapter_for(site).layers() == sorted(self.layers.get(site, tuple(LAYERS)))
                for layer in rule.adapter_for(site).layers():
                    out, width = LAYERS[layer]
                    assert tensors[f"{layer}.lora_A"].shape == (rank, width)
                    assert tensors[f"{layer}.lora_B"].shape == (out, rank)
                assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
            play(rule, self.updates(rule, seed, [1.0] * len(self.ranks)))

    def test_one_site_alone_gets_itself_back(self) -> None:
        rule = self.started()
        site = next(iter(self.ranks))
        for seed in range(3):
            sent = rule.adapter_for(site)
            update = self.trained(rule, site, seed, weight=7.0)
            assert play(rule, {site: update}) <= 1e-6
            assert distance(changes(rule.global_adapter()), site_weights(sent, update)) <= 1e-6
            assert torch.allclose(
                rule.global_adapter().tensors["head.bias"], update.adapter.tensors["head.bias"]
            )

    def test_identical_sites_give_each(self) -> None:
        rule = self.started()
        shares = self.shares()
        twins = [site for site, share in shares.items() if share == shares[next(iter(shares))]]
        assert len(twins) >= 2
        for seed in range(3):
            sent = rule.adapter_for(twins[0])
            update = self.trained(rule, twins[0], seed)
            assert play(rule, dict.fromkeys(twins, update)) <= 1e-6
            assert distance(changes(rule.global_adapter()), site_weights(sent, update)) <= 1e-6

    def test_order_of_sites_does_not_matter(self) -> None:
        forward, backward = self.started(), self.started()
        for seed in range(3):
            updates = self.updates(forward, seed, [1.0, 5.0, 2.0, 3.0])
            play(forward, updates)
            # The other rule's sites start from its own adapter, as they would in a run.
            same = self.updates(backward, seed, [1.0, 5.0, 2.0, 3.0])
            play(backward, dict(reversed(same.items())))
            assert distance(changes(forward.global_adapter()), changes(backward.global_adapter())) <= 1e-6
            head = [rule.global_adapter().tensors["head.weight"] for rule in (forward, backward)]
            assert torch.allclose(head[0], head[1], atol=1e-6)

    def test_only_the_ratio_of_weights_counts(self) -> None:
        small, large = self.started(), self.started()
        play(small, self.updates(small, 1, [1.0, 2.0, 3.0, 4.0]))
        play(large, self.updates(large, 1, [10.0, 20.0, 30.0, 40.0]))
        assert distance(changes(small.global_adapter()), changes(large.global_adapter())) <= 1e-6

    def test_dense_tensors_are_weighted_means(self) -> None:
        rule = self.started()
        updates = self.updates(rule, 3, [1.0, 5.0, 2.0, 4.0])
        play(rule, updates)
        for name in ("head.weight", "head.bias"):
            parts = [
                (update.weight, {name: update.adapter.tensors[name].double()}) for update in updates.values()
            ]
            assert distance({name: rule.global_adapter().tensors[name].double()}, dense_mean(parts)) <= 1e-6

    def test_a_silent_site_has_no_weight(self) -> None:
        """With one site silent, the result is that of a round in which it was never asked."""
        rule = self.started()
        play(rule, self.updates(rule, 1, [1.0, 2.0, 3.0, 4.0]))
        updates = self.updates(rule, 2, [1.0, 2.0, 3.0, 4.0])
        silent = sorted(updates)[1]
        other = self.started()
        other.restore(rule.state())
        del updates[silent]
        play(rule, updates)
        # Doubling every weight must leave it alone, which it would not if the silent site's were counted.
        louder = {
            site: AdapterUpdate(update.adapter, update.weight * 2, update.started_from)
            for site, update in updates.items()
        }
        play(other, louder)
        assert distance(changes(rule.global_adapter()), changes(other.global_adapter())) <= 1e-6
        name = "head.weight"
        parts = [
            (update.weight, {name: update.adapter.tensors[name].double()}) for update in updates.values()
        ]
        assert distance({name: rule.global_adapter().tensors[name].double()}, dense_mean(parts)) <= 1e-6

    def test_residual_is_the_distance_to_the_mean_of_the_whole_weights(self) -> None:
        rule = self.started(energy=0.9, max_rank=max(self.ranks.values()))
        for seed in range(3):
            sent = {site: rule.adapter_for(site) for site in self.ranks}
            updates = self.updates(rule, seed, [1.0, 5.0, 2.0, 3.0])
            residual = play(rule, updates)
            mean = dense_mean(
                [(update.weight, site_weights(sent[site], update)) for site, update in updates.items()]
            )
            down = changes(rule.global_adapter())
            gap = {layer: down[layer] - mean[layer] for layer in mean}
            assert residual == pytest.approx(frobenius(gap) / frobenius(mean), abs=1e-6)
            assert residual > 0

    def test_nothing_trained_is_no_change_and_no_residual(self) -> None:
        rule = self.started()
        before = rule.global_adapter()
        updates = {site: self.trained(rule, site, 0, scale=0.0) for site in self.ranks}
        assert play(rule, updates) == 0.0
        assert distance(changes(rule.global_adapter()), changes(before)) == 0.0

    def test_a_start_that_already_changes_the_base_is_kept(self) -> None:
        """A run may go on from an adapter of an earlier one, folded factors and all."""
        rule = build_rule(AggregationConfig(rule=self.rule, **EVERYTHING_GOES_DOWN))
        begun = begun_adapter(max(self.ranks.values()))
        rule.start(begun, self.shares())
        assert distance(changes(rule.global_adapter()), changes(begun)) <= 1e-6
        sent = {site: rule.adapter_for(site) for site in self.ranks}
        updates = self.updates(rule, 1, [1.0, 5.0, 2.0, 3.0])
        residual = play(rule, updates)
        mean = dense_mean(
            [(update.weight, site_weights(sent[site], update)) for site, update in updates.items()]
        )
        down = changes(rule.global_adapter())
        gap = {layer: down[layer] - mean[layer] for layer in mean}
        assert residual == pytest.approx(frobenius(gap) / frobenius(mean), abs=1e-6)

    def test_what_goes_down_is_what_arrives(self) -> None:
        """With fewer bits on the wire, server and sites still count from the same values."""
        rule = self.started(wire_dtype=WireDtype.bfloat16)
        for seed in range(3):
            for site in self.ranks:
                sent = rule.adapter_for(site)
                assert same_tensors(unpack(pack_down(sent, WireDtype.bfloat16)), sent)
            sent_to = {site: rule.adapter_for(site) for site in self.ranks}
            updates = self.updates(rule, seed, [1.0, 5.0, 2.0, 3.0])
            residual = play(rule, updates)
            mean = dense_mean(
                [(update.weight, site_weights(sent_to[site], update)) for site, update in updates.items()]
            )
            gap = {layer: change - mean[layer] for layer, change in changes(rule.global_adapter()).items()}
            assert residual == pytest.approx(frobenius(gap) / frobenius(mean), abs=1e-6)

    def test_what_rounding_cuts_off_a_dense_tensor_comes_later(self) -> None:
        """Steps far below the wire's resolution add up all the same."""
        rule = self.started(wire_dtype=WireDtype.bfloat16)
        first = rule.global_adapter().tensors["head.bias"]
        small = first.abs().max() * 2.0**-12
        for _ in range(64):
            updates = {}
            for site in self.ranks:
                still = self.trained(rule, site, 0, scale=0.0)
                tensors = {**still.adapter.tensors}
                tensors["head.bias"] = tensors["head.bias"] + small
                updates[site] = replace(still, adapter=replace(still.adapter, tensors=tensors))
            play(rule, updates)
        moved = rule.global_adapter().tensors["head.bias"] - first
        one_rounding = float(first.abs().max()) * 2.0**-8
        assert torch.allclose(moved, 64 * small * torch.ones(3), rtol=0, atol=one_rounding)

    def test_no_update_is_kept_alive(self) -> None:
        rule = self.started()
        rule.open_round()
        for index, site in enumerate(self.ranks):
            update = self.trained(rule, site, index)
            watched = [
                weakref.ref(update),
                *(weakref.ref(tensor) for tensor in update.adapter.tensors.values()),
            ]
            rule.fold(site, update)
            del update
            gc.collect()
            assert [ref() for ref in watched] == [None] * len(watched)

    def test_memory_does_not_grow_with_sites(self) -> None:
        def held(rule: AggregationRule) -> int:
            gc.collect()
            return sum(t.numel() for value in vars(rule).values() if isinstance(value, dict)
                       for t in value.values() if isinstance(t, Tensor))  # fmt: skip

        rule = self.started()
        updates = self.updates(rule, 1, [1.0] * len(self.ranks))
        rule.open_round()
        sizes = set()
        for site, update in updates.items():
            rule.fold(site, update)
            sizes.add(held(rule))
        assert len(sizes - {0}) == 1

    def test_restored_rule_goes_on_bit_identically(self, tmp_path: Path) -> None:
        whole = self.started(energy=0.95, max_rank=max(self.ranks.values()))
        for seed in range(2):
            play(whole, self.updates(whole, seed, [1.0, 5.0, 2.0, 3.0]))
        save_file(whole.state(), state := tmp_path / "state.safetensors")
        resumed = build_rule(whole.config)
        resumed.restore(load_file(state))
        for seed in range(2, 5):
            residuals = [
                play(rule, self.updates(rule, seed, [1.0, 5.0, 2.0, 3.0])) for rule in (whole, resumed)
            ]
            assert residuals[0] == residuals[1]
            assert whole.global_adapter().digest == resumed.global_adapter().digest
            for site in self.ranks:
                assert whole.adapter_for(site).digest == resumed.adapter_for(site).digest

    def test_state_taken_in_an_open_round_is_that_of_the_last_closed_one(self) -> None:
        rule = self.started()
        play(rule, self.updates(rule, 1, [1.0] * len(self.ranks)))
        before, digest = rule.state(), rule.global_adapter().digest
        rule.open_round()
        rule.fold("a", self.trained(rule, "a", 5))
        during = rule.state()
        assert before.keys() == during.keys()
        assert all(torch.equal(before[name], during[name]) for name in before)
        assert rule.global_adapter().digest == digest

    def test_reopening_a_round_drops_what_was_folded(self) -> None:
        rule, clean = self.started(), self.started()
        rule.open_round()
        rule.fold("a", self.trained(rule, "a", 99, weight=50.0))
        for each in (rule, clean):
            play(each, self.updates(each, 1, [1.0] * len(self.ranks)))
        assert rule.global_adapter().digest == clean.global_adapter().digest

    @pytest.mark.parametrize("spoil", ["rule", "base", "part"])
    def test_foreign_state_is_refused_and_changes_nothing(self, spoil: str) -> None:
        rule = self.started()
        play(rule, self.updates(rule, 1, [1.0] * len(self.ranks)))
        state, digest = rule.state(), rule.global_adapter().digest
        if spoil == "rule":
            state["meta/rule"] = torch.tensor(list(b"median"), dtype=torch.uint8)
        elif spoil == "base":
            state["meta/base_sha256"] = torch.tensor(list(b"other"), dtype=torch.uint8)
        else:
            del state[next(name for name in state if name.startswith("layers/"))]
        with pytest.raises(ArtefactError):
            rule.restore(state)
        assert rule.global_adapter().digest == digest

    def test_updates_that_do_not_fit_are_refused_and_change_nothing(self) -> None:
        rule, clean = self.started(), self.started()
        fitting = self.updates(rule, 1, [1.0] * len(self.ranks))
        good = fitting["a"]
        layer = next(iter(LAYERS))
        tensors = dict(good.adapter.tensors)

        def with_tensors(new: dict[str, Tensor]) -> AdapterUpdate:
            return AdapterUpdate(replace(good.adapter, tensors=new), 1.0, good.started_from)

        bad = [
            AdapterUpdate(good.adapter, 0.0, ""),
            AdapterUpdate(good.adapter, float("nan"), ""),
            with_tensors({name: tensor for name, tensor in tensors.items() if name != "head.bias"}),
            with_tensors(tensors | {"extra": torch.zeros(2)}),
            with_tensors(tensors | {f"{layer}.lora_A": torch.zeros(1, 3)}),
        ]
        rule.open_round()
        for update in bad:
            with pytest.raises(ArtefactError):
                rule.fold("a", update)
        with pytest.raises(ArtefactError, match="nobody"):
            rule.fold("nobody", good)
        for site, update in fitting.items():
            rule.fold(site, update)
        with pytest.raises(ArtefactError, match="already"):
            rule.fold("a", good)
        rule.close_round()
        play(clean, self.updates(clean, 1, [1.0] * len(self.ranks)))
        assert rule.global_adapter().digest == clean.global_adapter().digest

    def test_a_round_without_replies_fails(self) -> None:
        rule = self.started()
        digest = rule.global_adapter().digest
        rule.open_round()
        with pytest.raises(FederationError):
            rule.close_round()
        assert rule.global_adapter().digest == digest

    def test_adapters_are_no_aliases(self) -> None:
        rule = self.started()
        play(rule, self.updates(rule, 1, [1.0] * len(self.ranks)))
        digests = rule.global_adapter().digest, rule.adapter_for("a").digest
        for adapter in (rule.global_adapter(), rule.adapter_for("a")):
            for tensor in adapter.tensors.values():
                tensor.fill_(7.0)
        for tensor in rule.state().values():
            tensor.fill_(7)
        assert (rule.global_adapter().digest, rule.adapter_for("a").digest) == digests

    def test_start_without_sites_or_with_half_a_layer_is_refused(self) -> None:
        rule = build_rule(AggregationConfig(rule=self.rule))
        rank = max(self.ranks.values())
        with pytest.raises(ConfigError, match="adapters"):
            rule.start(initial_adapter(rank), {})
        tensors = dict(initial_adapter(rank).tensors)
        del tensors[f"{next(iter(LAYERS))}.lora_B"]
        with pytest.raises(ArtefactError, match="lora_B"):
            rule.start(Adapter(tensors, BASE, rank, "base"), self.shares())


class ExactRuleContract(AggregationRuleContract):
    """Rules whose result is the mean of the sites' full weights."""

    def test_several_rounds_equal_averaging_full_weights(self) -> None:
        """Dense algebra over the whole run, with a silent site: error at most 1e-6 in float32."""
        rule = self.started()
        oracle = {layer: torch.zeros(shape, dtype=torch.float64) for layer, shape in LAYERS.items()}
        for seed in range(4):
            updates = self.updates(rule, seed, [4.0, 1.0, 7.0, 2.0])
            if seed == 2:
                del updates["b"]
            parts = []
            for site, update in updates.items():
                sent = rule.adapter_for(site)
                before, after = changes(sent), site_weights(sent, update)
                # A site's own copy of the full weights: where all started, and what its training added.
                parts.append(
                    (update.weight, {name: oracle[name] + after[name] - before[name] for name in oracle})
                )
            oracle = dense_mean(parts)
            assert play(rule, updates) <= 1e-6
            for site in self.ranks:
                assert distance(changes(rule.adapter_for(site)), oracle) <= 1e-6, (seed, site)
            assert distance(changes(rule.global_adapter()), oracle) <= 1e-6

    def test_in_float64_every_site_has_the_dense_mean_to_1e_9(self) -> None:
        rule = build_rule(AggregationConfig(rule=self.rule, **EVERYTHING_GOES_DOWN))
        rule.start(doubled(initial_adapter(max(self.ranks.values()))), self.shares())
        for seed in range(3):
            sent = {site: rule.adapter_for(site) for site in self.ranks}
            updates = self.updates(rule, seed, [4.0, 1.0, 7.0, 2.0])
            parts = [(update.weight, site_weights(sent[site], update)) for site, update in updates.items()]
            assert play(rule, updates) <= 1e-9
            for site in self.ranks:
                assert distance(changes(rule.adapter_for(site)), dense_mean(parts)) <= 1e-9
