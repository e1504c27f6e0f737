"""Each aggregation rule against the contract, and what is its own."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.adapter import Adapter, AdapterUpdate
from common.errors import ArtefactError, ConfigError
from common.recipe import AggregationConfig, WireDtype
from server.aggregation import Share, build_rule
from tests.contract.aggregation_rule import AggregationRuleContract, ExactRuleContract
from tests.contract.dense_algebra import (
    BASE,
    LAYERS,
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


class TestExactSplit(ExactRuleContract):
    rule: ClassVar[str] = "exact_split"
    ranks: ClassVar[dict[str, int]] = {"a": 4, "b": 4, "c": 4, "d": 4}

    def test_what_the_cap_cuts_off_comes_later(self) -> None:
        """Error feedback: what one round cannot send, later rounds send, and nothing is lost."""
        ranks = dict.fromkeys("abcd", 2)
        rule = build_rule(
            AggregationConfig(rule=self.rule, energy=1.0, max_rank=2, wire_dtype=WireDtype.float32)
        )
        rule.start(initial_adapter(2), shares_of(ranks))
        updates = {site: train(rule.adapter_for(site), index) for index, site in enumerate(ranks)}
        sent = {site: rule.adapter_for(site) for site in ranks}
        target = dense_mean([(1.0, site_weights(sent[site], update)) for site, update in updates.items()])
        assert play(rule, updates) > 0.1
        # Sites now undo whatever they hold: what is left must be exactly the part never sent.
        held = changes(rule.global_adapter())
        idle = {site: train(rule.adapter_for(site), 0, scale=0.0) for site in ranks}
        for update in idle.values():
            for layer in LAYERS:
                update.adapter.tensors[f"{layer}.lora_B"].zero_()
        play(rule, idle)
        left = {layer: target[layer] - held[layer] for layer in LAYERS}
        best = {layer: truncated(matrix, 2) for layer, matrix in left.items()}
        assert distance(changes(rule.global_adapter()), best) <= 1e-6

    def test_energy_bounds_what_is_cut_off(self) -> None:
        for energy in (0.8, 0.95, 0.999):
            rule = self.started(energy=energy)
            residual = play(rule, self.updates(rule, 1, [1.0] * 4))
            assert 0 < residual <= math.sqrt(1 - energy)

    def test_rank_that_goes_down_never_passes_the_cap(self) -> None:
        rule = self.started(max_rank=6)
        for seed in range(3):
            play(rule, self.updates(rule, seed, [1.0] * 4))
            for layer in LAYERS:
                tensors = rule.adapter_for("a").tensors
                assert tensors[f"{layer}.lora_A"].shape[0] + tensors[f"{layer}.folded_A"].shape[0] == 6

    def test_trainable_factors_are_the_strongest_components_balanced(self) -> None:
        rule = self.started()
        play(rule, self.updates(rule, 1, [1.0, 2.0, 3.0, 4.0]))
        adapter = rule.adapter_for("a")
        for layer in LAYERS:
            strongest = torch.linalg.svdvals(adapter.change(layer).double())[:4]
            a, b = adapter.tensors[f"{layer}.lora_A"].double(), adapter.tensors[f"{layer}.lora_B"].double()
            assert torch.allclose(a @ a.T, torch.diag(strongest), atol=1e-5)
            assert torch.allclose(b.T @ b, torch.diag(strongest), atol=1e-5)
            assert (b.gather(0, b.abs().argmax(dim=0, keepdim=True)) > 0).all()

    def test_spare_rows_keep_the_initial_directions(self) -> None:
        """A change of rank 1 leaves three of four slots free: they stay trainable and add nothing."""
        rule = self.started()
        sent = rule.adapter_for("a")
        update = train(sent, 0, scale=0.0)
        for layer in LAYERS:
            update.adapter.tensors[f"{layer}.lora_B"][:, 0] = 1.0
        assert play(rule, {"a": update}) <= 1e-6
        for layer in LAYERS:
            tensors = rule.adapter_for("a").tensors
            assert torch.equal(tensors[f"{layer}.lora_A"][1:], sent.tensors[f"{layer}.lora_A"][1:])
            assert not tensors[f"{layer}.lora_B"][:, 1:].any()
            assert f"{layer}.folded_A" not in tensors

    def test_settings_out_of_range_are_all_named(self) -> None:
        with pytest.raises(ConfigError) as caught:
            build_rule(AggregationConfig(rule=self.rule, energy=1.5, max_rank=0))
        assert len(caught.value.faults) == 2
        rule = build_rule(AggregationConfig(rule=self.rule, max_rank=3))
        with pytest.raises(ConfigError) as caught:
            rule.start(initial_adapter(4), shares_of({"a": 4, "b": 5, "c": 0}))
        assert len(caught.value.faults) == 3


class TestExactSplitMixedRanks(ExactRuleContract):
    rule: ClassVar[str] = "exact_split"
    ranks: ClassVar[dict[str, int]] = {"a": 2, "b": 4, "c": 8, "d": 2}

    def test_every_rank_sees_the_same_weights(self) -> None:
        rule = self.started(energy=0.9)
        for seed in range(3):
            play(rule, self.updates(rule, seed, [1.0, 2.0, 3.0, 4.0]))
            for site in self.ranks:
                assert distance(changes(rule.adapter_for(site)), changes(rule.global_adapter())) <= 1e-6


class TestExactSplitMixedPresets(ExactRuleContract):
    """Sites of several ranks that train other layers of the encoder, one of them B alone."""

    rule: ClassVar[str] = "exact_split"
    ranks: ClassVar[dict[str, int]] = {"a": 2, "b": 4, "c": 8, "d": 2}
    layers: ClassVar[dict[str, tuple[str, ...]]] = {"a": ("encoder.0.qkv",), "d": ("encoder.0.qkv",)}
    fixed_a: ClassVar[tuple[str, ...]] = ("b",)

    def test_a_layer_that_a_site_does_not_train_is_folded_whole(self) -> None:
        rule = self.started()
        play(rule, self.updates(rule, 1, [1.0, 2.0, 3.0, 4.0]))
        tensors = rule.adapter_for("a").tensors
        assert "encoder.0.proj.lora_A" not in tensors
        folded = tensors["encoder.0.proj.folded_B"] @ tensors["encoder.0.proj.folded_A"]
        assert torch.allclose(folded, rule.global_adapter().change("encoder.0.proj"), atol=1e-5)

    def test_a_fixed_a_never_comes_up(self) -> None:
        rule = self.started()
        update = train(rule.adapter_for("b"), 1)
        assert not any(name.endswith("lora_A") for name in update.adapter.tensors)
        whole = train(replace(rule.adapter_for("b"), preset="base"), 1)
        rule.open_round()
        with pytest.raises(ArtefactError, match="does not fit"):
            rule.fold("b", whole)

    def test_the_global_adapter_shows_the_layers_it_is_asked_for(self) -> None:
        rule = build_rule(AggregationConfig(rule=self.rule, energy=1.0))
        shown = Share("lite", 3, ("encoder.0.proj",))
        rule.start(initial_adapter(8), self.shares(), shown)
        play(rule, self.updates(rule, 1, [1.0, 2.0, 3.0, 4.0]))
        adapter = rule.global_adapter()
        assert (adapter.preset, adapter.rank, adapter.layers()) == ("lite", 3, ["encoder.0.proj"])
        assert distance(changes(adapter), changes(rule.adapter_for("c"))) <= 1e-6

    def test_parts_of_a_fused_layer_are_refused_beside_the_whole(self) -> None:
        """Query cut out of the fused layer would be counted in both."""
        start = initial_adapter(4)
        extra = {f"encoder.0.qkv.q.lora_{half}": start.tensors[f"encoder.0.qkv.lora_{half}"] for half in "AB"}
        whole = replace(start, tensors={**start.tensors, **extra})
        shares = {"a": Share("fused", 4, ("encoder.0.qkv",)), "b": Share("base", 4, ("encoder.0.qkv.q",))}
        with pytest.raises(ConfigError, match="adapters") as caught:
            build_rule(AggregationConfig(rule=self.rule)).start(whole, shares)
        (fault,) = caught.value.faults
        assert fault.startswith("site 'b'")

    def test_layers_that_the_run_does_not_have_are_refused(self) -> None:
        with pytest.raises(ConfigError) as caught:
            build_rule(AggregationConfig(rule=self.rule)).start(
                initial_adapter(4), {"a": Share("base", 4, ("encoder.9.qkv",))}
            )
        assert "encoder.9.qkv" in caught.value.faults[0]


class TestDual(ExactRuleContract):
    """On the server nothing but exact_split: any ranks and presets."""

    rule: ClassVar[str] = "dual"
    ranks: ClassVar[dict[str, int]] = {"a": 2, "b": 4, "c": 8, "d": 2}
    layers: ClassVar[dict[str, tuple[str, ...]]] = {"a": ("encoder.0.qkv",), "d": ("encoder.0.qkv",)}
    fixed_a: ClassVar[tuple[str, ...]] = ("b",)

    def test_what_goes_down_is_exact_splits_to_the_bit(self) -> None:
        ours, theirs = (build_rule(AggregationConfig(name, energy=0.9)) for name in ("dual", "exact_split"))
        for rule in (ours, theirs):
            rule.start(initial_adapter(8), self.shares())
        for seed in range(3):
            updates = self.updates(ours, seed, [1.0, 5.0, 2.0, 3.0])
            assert play(ours, updates) == play(theirs, updates)
            for site in self.ranks:
                assert ours.adapter_for(site).digest == theirs.adapter_for(site).digest
            assert ours.global_adapter().digest == theirs.global_adapter().digest

    def test_a_state_of_exact_split_is_another_rules(self) -> None:
        """A run is resumed with the rule that began it: what its sites do afterwards is part of the rule."""
        theirs = build_rule(AggregationConfig("exact_split"))
        theirs.start(initial_adapter(8), self.shares())
        with pytest.raises(ArtefactError, match="set aggregation"):
            build_rule(AggregationConfig("dual")).restore(theirs.state())


class TestFedIT(AggregationRuleContract):
    rule: ClassVar[str] = "fedit"
    ranks: ClassVar[dict[str, int]] = {"a": 4, "b": 4, "c": 4, "d": 4}

    def test_factors_are_averaged_each_for_itself(self) -> None:
        rule = self.started()
        updates = self.updates(rule, 1, [1.0, 5.0, 2.0, 3.0])
        play(rule, updates)
        for layer in LAYERS:
            for name in (f"{layer}.lora_A", f"{layer}.lora_B"):
                parts = [(u.weight, {name: u.adapter.tensors[name].double()}) for u in updates.values()]
                assert (
                    distance({name: rule.global_adapter().tensors[name].double()}, dense_mean(parts)) <= 1e-6
                )

    def test_cross_terms_show_in_the_residual(self) -> None:
        """Two sites that moved apart: the product of means is half their sum, by hand."""
        rule = build_rule(AggregationConfig(rule=self.rule))

        def adapter(a: list[list[float]], b: list[list[float]]) -> Adapter:
            return Adapter({"l.lora_A": torch.tensor(a), "l.lora_B": torch.tensor(b)}, BASE, 1, "base")

        start = adapter([[1.0, 0.0]], [[0.0], [0.0]])
        rule.start(start, dict.fromkeys("ab", Share.of(start)))
        one = adapter([[1.0, 0.0]], [[1.0], [0.0]])
        two = adapter([[0.0, 1.0]], [[0.0], [1.0]])
        residual = play(rule, {"a": AdapterUpdate(one, 1.0, ""), "b": AdapterUpdate(two, 1.0, "")})
        # down = [[1/4, 1/4], [1/4, 1/4]], mean = [[1/2, 0], [0, 1/2]]
        assert torch.equal(rule.global_adapter().change("l"), torch.full((2, 2), 0.25))
        assert residual == pytest.approx(0.5 / math.sqrt(0.5))

    def test_shared_a_makes_it_exact(self) -> None:
        rule = self.started()
        updates = self.updates(rule, 1, [1.0, 5.0, 2.0, 3.0])
        for update in updates.values():
            for layer in LAYERS:
                update.adapter.tensors[f"{layer}.lora_A"].copy_(
                    rule.adapter_for("a").tensors[f"{layer}.lora_A"]
                )
        assert play(rule, updates) <= 1e-6

    def test_mixed_ranks_are_refused_with_every_site_named(self) -> None:
        rule = build_rule(AggregationConfig(rule=self.rule))
        with pytest.raises(ConfigError, match="exact_split") as caught:
            rule.start(initial_adapter(4), shares_of({"a": 4, "b": 2, "c": 8}))
        assert len(caught.value.faults) == 2


@settings(max_examples=40, deadline=None)
@given(ranks=st.lists(st.integers(1, 8), min_size=4, max_size=4), data=st.data())
def test_exact_split_is_the_dense_mean_for_any_ranks_weights_and_replies(
    ranks: list[int], data: st.DataObject
) -> None:
    contract = ExactRuleContract()
    contract.rule, contract.ranks = "exact_split", dict(zip("abcd", ranks, strict=True))
    rule = contract.started()
    for seed in range(2):
        weights = data.draw(st.lists(st.integers(1, 1000), min_size=4, max_size=4))
        silent = data.draw(st.sets(st.sampled_from("abcd"), max_size=3))
        sent = {site: rule.adapter_for(site) for site in "abcd"}
        updates = {k: v for k, v in contract.updates(rule, seed, weights).items() if k not in silent}
        parts = [(update.weight, site_weights(sent[site], update)) for site, update in updates.items()]
        assert play(rule, updates) <= 1e-6
        assert distance(changes(rule.global_adapter()), dense_mean(parts)) <= 2e-6


SHARES = st.tuples(
    st.integers(1, 8),
    st.sets(st.sampled_from(sorted(LAYERS)), min_size=1).map(lambda layers: tuple(sorted(layers))),
    st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(chosen=st.lists(SHARES, min_size=4, max_size=4), order=st.permutations("abcd"), data=st.data())
def test_exact_split_is_exact_to_1e_9_for_any_mixture_of_presets_and_ranks(
    chosen: list[tuple[int, tuple[str, ...], bool]], order: list[str], data: st.DataObject
) -> None:
    """Dense algebra in float64 over three rounds; in another order of the sites it is the same."""
    shares = {
        site: Share("base" if trains_a else "dp", rank, layers, trains_a)
        for site, (rank, layers, trains_a) in zip("abcd", chosen, strict=True)
    }
    start = doubled(initial_adapter(8))
    rule, other = (
        build_rule(AggregationConfig("exact_split", energy=1.0, wire_dtype=WireDtype.float32))
        for _ in range(2)
    )
    for each in (rule, other):
        each.start(start, shares)
    oracle = {layer: torch.zeros(shape, dtype=torch.float64) for layer, shape in LAYERS.items()}
    for seed in range(3):
        weights = data.draw(st.lists(st.integers(1, 1000), min_size=4, max_size=4))
        sent = {site: rule.adapter_for(site) for site in "abcd"}
        for site in "abcd":
            assert distance(changes(sent[site]), oracle) <= 1e-9
        updates = {
            site: train(sent[site], seed * 10 + index, weight)
            for index, (site, weight) in enumerate(zip("abcd", weights, strict=True))
        }
        oracle = dense_mean([(u.weight, site_weights(sent[site], u)) for site, u in updates.items()])
        play(rule, updates)
        play(other, {site: updates[site] for site in order})
    for site in "abcd":
        assert distance(changes(rule.adapter_for(site)), oracle) <= 1e-9
        assert distance(changes(other.adapter_for(site)), oracle) <= 1e-9


@pytest.mark.parametrize(("wrong", "right"), [("exact_spilt", "exact_split"), ("fedIT", "fedit")])
def test_unknown_rule_names_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{right}'"):
        build_rule(AggregationConfig(rule=wrong))


def test_unknown_rule_far_from_any_lists_them_all() -> None:
    with pytest.raises(ConfigError, match=r"known: exact_split, fedit"):
        build_rule(AggregationConfig(rule="zzz"))
