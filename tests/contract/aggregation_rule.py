"""What every aggregation rule promises: the base classes that each rule's test class inherits.

The oracle is dense algebra: it keeps full weight matrices, adds to each site's matrix what the site
trained, and averages the matrices.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.adapter import Adapter, AdapterUpdate
from common.errors import ArtefactError, ConfigError, FederationError
from common.recipe import AggregationConfig
from server.aggregation import build_rule
from server.aggregation.base import AggregationRule

LAYERS = {"encoder.0.qkv": (12, 10), "encoder.0.proj": (9, 14)}
BASE = "ab" * 32
EVERYTHING_GOES_DOWN = {"energy": 1.0, "max_rank": 64}


def initial_adapter(rank: int, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "head.weight": torch.randn(3, 5, generator=generator),
        "head.bias": torch.randn(3, generator=generator),
    }
    for layer, (out, width) in LAYERS.items():
        tensors[f"{layer}.lora_A"] = torch.randn(rank, width, generator=generator) / width**0.5
        tensors[f"{layer}.lora_B"] = torch.zeros(out, rank)
    return Adapter(tensors, BASE, rank)


def train(adapter: Adapter, seed: int, weight: float = 1.0, scale: float = 0.3) -> AdapterUpdate:
    """What a site sends back: everything it was sent as trainable, moved at random."""
    generator = torch.Generator().manual_seed(seed)
    moved = {
        name: tensor + scale * torch.randn(tensor.shape, generator=generator)
        for name, tensor in sorted(adapter.trained().tensors.items())
    }
    return AdapterUpdate(Adapter(moved, adapter.base_sha256, adapter.rank), weight, adapter.digest)


def site_weights(sent: Adapter, update: AdapterUpdate) -> dict[str, Tensor]:
    """The site's whole weight change after training: what it folded into its base, and what it trained."""
    whole = {}
    for layer in sent.layers():
        tensors = update.adapter.tensors
        change = tensors[f"{layer}.lora_B"].double() @ tensors[f"{layer}.lora_A"].double()
        if f"{layer}.folded_A" in sent.tensors:
            change += sent.tensors[f"{layer}.folded_B"].double() @ sent.tensors[f"{layer}.folded_A"].double()
        whole[layer] = change
    return whole


def dense_mean(parts: Sequence[tuple[float, dict[str, Tensor]]]) -> dict[str, Tensor]:
    total = sum(weight for weight, _ in parts)
    return {name: sum(weight * part[name] for weight, part in parts) / total for name in parts[0][1]}


def changes(adapter: Adapter) -> dict[str, Tensor]:
    return {layer: adapter.change(layer).double() for layer in adapter.layers()}


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def frobenius(parts: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in parts.values()))


def play(rule: AggregationRule, updates: dict[str, AdapterUpdate]) -> float:
    rule.open_round()
    for site, update in updates.items():
        rule.fold(site, update)
    return rule.close_round()


def same_tensors(left: Adapter, right: Adapter) -> bool:
    return left.tensors.keys() == right.tensors.keys() and all(
        torch.equal(tensor, right.tensors[name]) for name, tensor in left.tensors.items()
    )


class AggregationRuleContract:
    """Inherited by one class a rule. ``ranks`` are ones that the rule serves, in sorted order of sites."""

    rule: ClassVar[str] = ""
    ranks: ClassVar[dict[str, int]] = {}

    def started(self, **settings: float) -> AggregationRule:
        rule = build_rule(AggregationConfig(rule=self.rule, **(EVERYTHING_GOES_DOWN | settings)))
        rule.start(initial_adapter(max(self.ranks.values())), self.ranks)
        return rule

    def updates(self, rule: AggregationRule, seed: int, weights: Sequence[float]) -> dict[str, AdapterUpdate]:
        return {
            site: train(rule.adapter_for(site), seed * 100 + index, weight)
            for index, (site, weight) in enumerate(zip(self.ranks, weights, strict=True))
        }

    def test_first_adapter_is_the_initial_one(self) -> None:
        rule = self.started()
        initial = initial_adapter(max(self.ranks.values()))
        assert same_tensors(rule.global_adapter(), initial)
        for site, rank in self.ranks.items():
            sent = rule.adapter_for(site)
            assert (sent.rank, sent.base_sha256) == (rank, BASE)
            for layer in LAYERS:
                assert torch.equal(sent.tensors[f"{layer}.lora_A"], initial.tensors[f"{layer}.lora_A"][:rank])
                assert not sent.tensors[f"{layer}.lora_B"].any()

    def test_factors_have_the_rank_of_their_site_in_every_round(self) -> None:
        rule = self.started()
        for seed in range(3):
            for site, rank in self.ranks.items():
                tensors = rule.adapter_for(site).tensors
                for layer, (out, width) in LAYERS.items():
                    assert tensors[f"{layer}.lora_A"].shape == (rank, width)
                    assert tensors[f"{layer}.lora_B"].shape == (out, rank)
                assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
            play(rule, self.updates(rule, seed, [1.0] * len(self.ranks)))

    def test_one_site_alone_gets_itself_back(self) -> None:
        rule = self.started()
        site = next(iter(self.ranks))
        for seed in range(3):
            sent = rule.adapter_for(site)
            update = train(sent, seed, weight=7.0)
            assert play(rule, {site: update}) <= 1e-6
            assert distance(changes(rule.global_adapter()), site_weights(sent, update)) <= 1e-6
            assert torch.allclose(
                rule.global_adapter().tensors["head.bias"], update.adapter.tensors["head.bias"]
            )

    def test_identical_sites_give_each(self) -> None:
        rule = self.started()
        twins = [site for site, rank in self.ranks.items() if rank == self.ranks[next(iter(self.ranks))]]
        assert len(twins) >= 2
        for seed in range(3):
            sent = rule.adapter_for(twins[0])
            update = train(sent, seed)
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
        updates = {site: train(rule.adapter_for(site), 0, scale=0.0) for site in self.ranks}
        assert play(rule, updates) == 0.0
        assert distance(changes(rule.global_adapter()), changes(before)) == 0.0

    def test_no_update_is_kept_alive(self) -> None:
        rule = self.started()
        rule.open_round()
        for index, site in enumerate(self.ranks):
            update = train(rule.adapter_for(site), index)
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
        rule.fold("a", train(rule.adapter_for("a"), 5))
        during = rule.state()
        assert before.keys() == during.keys()
        assert all(torch.equal(before[name], during[name]) for name in before)
        assert rule.global_adapter().digest == digest

    def test_reopening_a_round_drops_what_was_folded(self) -> None:
        rule, clean = self.started(), self.started()
        rule.open_round()
        rule.fold("a", train(rule.adapter_for("a"), 99, weight=50.0))
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
            return AdapterUpdate(Adapter(new, BASE, good.adapter.rank), 1.0, good.started_from)

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
        with pytest.raises(ConfigError, match="ranks"):
            rule.start(initial_adapter(rank), {})
        tensors = dict(initial_adapter(rank).tensors)
        del tensors[f"{next(iter(LAYERS))}.lora_B"]
        with pytest.raises(ArtefactError, match="lora_B"):
            rule.start(Adapter(tensors, BASE, rank), self.ranks)


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
                sent = changes_of_trainable(rule.adapter_for(site))
                came = changes_of_trainable(update.adapter)
                # A site's own copy of the full weights: where all started, and what its training added.
                parts.append(
                    (update.weight, {name: oracle[name] + came[name] - sent[name] for name in oracle})
                )
            oracle = dense_mean(parts)
            assert play(rule, updates) <= 1e-6
            for site in self.ranks:
                assert distance(changes(rule.adapter_for(site)), oracle) <= 1e-6, (seed, site)
            assert distance(changes(rule.global_adapter()), oracle) <= 1e-6


def changes_of_trainable(adapter: Adapter) -> dict[str, Tensor]:
    return {
        layer: adapter.tensors[f"{layer}.lora_B"].double() @ adapter.tensors[f"{layer}.lora_A"].double()
        for layer in adapter.layers()
    }
