"""The rules for one preset and rank against the contract, and each against its own equation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.adapter import Adapter, AdapterUpdate
from common.errors import ArtefactError, ConfigError
from common.recipe import AggregationConfig, WireDtype
from common.tuning.halves import A_ALONE, B_ALONE, BOTH, Halves, trained_halves
from server.aggregation import AggregationRule, Share, build_rule
from server.aggregation.fedsvd import turned
from tests.contract.aggregation_rule import AggregationRuleContract, ExactRuleContract
from tests.contract.dense_algebra import (
    BASE,
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


def in_float64(name: str, **chosen: float) -> AggregationRule:
    rule = build_rule(AggregationConfig(name, **(EVERYTHING_GOES_DOWN | chosen)))
    rule.start(doubled(initial_adapter(4)), shares_of(EQUAL))
    return rule


def random_updates(rule: AggregationRule, seed: int, scale: float = 0.3) -> dict[str, AdapterUpdate]:
    return {
        site: train(rule.adapter_for(site), seed * 10 + index, weight, scale)
        for index, (site, weight) in enumerate(zip(EQUAL, WEIGHTS, strict=True))
    }


def means_by_hand(updates: Mapping[str, AdapterUpdate], layer: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean A, mean B and mean B A, added up site by site."""
    total = sum(update.weight for update in updates.values())
    out, width = LAYERS[layer]
    a, b = torch.zeros(4, width, dtype=torch.float64), torch.zeros(out, 4, dtype=torch.float64)
    product = torch.zeros(out, width, dtype=torch.float64)
    for update in updates.values():
        site_a = update.adapter.tensors[f"{layer}.lora_A"].double()
        site_b = update.adapter.tensors[f"{layer}.lora_B"].double()
        a = a + update.weight / total * site_a
        b = b + update.weight / total * site_b
        product = product + update.weight / total * (site_b @ site_a)
    return a, b, product


class FixedARuleContract(ExactRuleContract):
    """Rules whose sites train B alone."""

    ranks: ClassVar[dict[str, int]] = EQUAL
    fixed_a: ClassVar[tuple[str, ...]] = ("a", "b", "c", "d")

    def test_a_preset_that_trains_a_is_refused_by_name(self) -> None:
        rule = build_rule(AggregationConfig(rule=self.rule))
        with pytest.raises(ConfigError, match=self.rule) as caught:
            rule.start(initial_adapter(4), {**self.shares(), "b": shares_of(EQUAL)["b"]})
        (fault,) = caught.value.faults
        assert fault.startswith("site 'b' has base, which trains the factor A too")
        assert "preset dp" in fault

    def test_a_site_sends_b_alone(self) -> None:
        rule = self.started()
        play(rule, self.updates(rule, 1, WEIGHTS))
        update = train(rule.adapter_for("a"), 1)
        assert {name for name in update.adapter.tensors if ".lora_" in name} == {
            f"{x}.lora_B" for x in LAYERS
        }

    def test_noise_on_b_reaches_the_result_linearly(self) -> None:
        """Twice the noise moves the global change twice as far."""

        def moved(strength: float) -> dict[str, Tensor]:
            rule = self.started()
            updates = self.updates(rule, 1, WEIGHTS)
            generator = torch.Generator().manual_seed(3)
            for update in updates.values():
                for layer in sorted(LAYERS):
                    b = update.adapter.tensors[f"{layer}.lora_B"]
                    b.add_(strength * torch.randn(b.shape, generator=generator))
            play(rule, updates)
            return changes(rule.global_adapter())

        clean, once, twice = moved(0.0), moved(1.0), moved(2.0)
        assert (
            distance({x: twice[x] - clean[x] for x in LAYERS}, {x: 2 * (once[x] - clean[x]) for x in LAYERS})
            <= 1e-5
        )


class TestFFA(FixedARuleContract):
    rule: ClassVar[str] = "ffa"

    def test_a_is_that_of_the_initial_adapter_to_the_bit(self) -> None:
        rule = self.started()
        for seed in range(2):
            play(rule, self.updates(rule, seed, WEIGHTS))
        for layer in LAYERS:
            name = f"{layer}.lora_A"
            assert torch.equal(rule.adapter_for("a").tensors[name], initial_adapter(4).tensors[name])


class TestFedSVD(FixedARuleContract):
    rule: ClassVar[str] = "fedsvd"

    def test_rows_of_a_are_orthonormal_and_b_holds_the_strengths(self) -> None:
        rule = self.started()
        for seed in range(2):
            play(rule, self.updates(rule, seed, WEIGHTS))
            adapter = rule.adapter_for("a")
            for layer in LAYERS:
                a, b = adapter.tensors[f"{layer}.lora_A"], adapter.tensors[f"{layer}.lora_B"]
                assert torch.allclose(a @ a.T, torch.eye(4), atol=1e-5)
                strengths = torch.linalg.svdvals(changes(adapter)[layer])[:4].float()
                assert torch.allclose(b.T @ b, torch.diag(strengths.square()), atol=1e-4)

    def test_directions_without_strength_are_filled_from_the_old_a(self) -> None:
        """Product of rank 1: one component, and three more orthonormal rows in the old row space."""
        generator = torch.Generator().manual_seed(1)
        a = torch.randn(4, 9, generator=generator, dtype=torch.float64)
        b = torch.randn(7, 1, generator=generator, dtype=torch.float64) @ torch.ones(
            1, 4, dtype=torch.float64
        )
        new_a, new_b = turned(a, b)
        assert torch.allclose(new_b @ new_a, b @ a)
        assert not new_b[:, 1:].any()
        assert torch.allclose(new_a @ new_a.T, torch.eye(4, dtype=torch.float64))
        assert torch.linalg.matrix_rank(torch.cat([a, new_a]), rtol=1e-9) == 4

    @pytest.mark.parametrize(("out", "width", "rank"), [(3, 9, 5), (9, 3, 5), (2, 3, 4), (5, 5, 5)])
    def test_a_rank_above_the_layers_size_keeps_the_product(self, out: int, width: int, rank: int) -> None:
        generator = torch.Generator().manual_seed(2)
        a = torch.randn(rank, width, generator=generator, dtype=torch.float64)
        b = torch.randn(out, rank, generator=generator, dtype=torch.float64)
        new_a, new_b = turned(a, b)
        assert (new_a.shape, new_b.shape) == (a.shape, b.shape)
        assert torch.allclose(new_b @ new_a, b @ a)
        full = min(rank, width)
        assert torch.allclose(new_a[:full] @ new_a[:full].T, torch.eye(full, dtype=torch.float64))


class TestRoLora(ExactRuleContract):
    rule: ClassVar[str] = "rolora"
    ranks: ClassVar[dict[str, int]] = EQUAL

    def halves(self, rule: AggregationRule) -> Halves:
        return trained_halves("base", "rolora", int(rule.state()["layers/rounds"]))

    def test_b_and_a_take_turns_and_the_other_stays_to_the_bit(self) -> None:
        rule = self.started()
        for index in range(4):
            moves, stays = ("lora_B", "lora_A") if index % 2 == 0 else ("lora_A", "lora_B")
            before = rule.adapter_for("a").tensors
            updates = self.updates(rule, index, WEIGHTS)
            play(rule, updates)
            after = rule.adapter_for("a").tensors
            for layer in LAYERS:
                assert torch.equal(after[f"{layer}.{stays}"], before[f"{layer}.{stays}"])
                name = f"{layer}.{moves}"
                parts = [(u.weight, {name: u.adapter.tensors[name].double()}) for u in updates.values()]
                assert distance({name: after[name].double()}, dense_mean(parts)) <= 1e-6

    def test_a_site_sends_the_half_whose_turn_it_is_and_no_other(self) -> None:
        rule = self.started()
        for half in ("lora_B", "lora_A", "lora_B"):
            updates = self.updates(rule, 1, WEIGHTS)
            for update in updates.values():
                factors = {name for name in update.adapter.tensors if ".lora_" in name}
                assert factors == {f"{layer}.{half}" for layer in LAYERS}
            play(rule, updates)

    @pytest.mark.parametrize("closed", [0, 1, 2])
    @pytest.mark.parametrize("sent", [A_ALONE, B_ALONE, BOTH])
    def test_an_update_with_the_wrong_half_is_refused(self, closed: int, sent: Halves) -> None:
        rule = self.started()
        for seed in range(closed):
            play(rule, self.updates(rule, seed, WEIGHTS))
        rule.open_round()
        update = train(rule.adapter_for("a"), 5, halves=sent)
        if sent == self.halves(rule):
            rule.fold("a", update)
            return
        with pytest.raises(ArtefactError, match="does not fit what it was sent"):
            rule.fold("a", update)

    def test_a_preset_that_keeps_a_fixed_is_refused_by_name(self) -> None:
        rule = build_rule(AggregationConfig(rule=self.rule))
        fixed = replace(self.shares()["b"], preset="dp", trains_a=False)
        with pytest.raises(ConfigError, match=self.rule) as caught:
            rule.start(initial_adapter(4), {**self.shares(), "b": fixed})
        (fault,) = caught.value.faults
        assert fault.startswith("site 'b' has dp, which keeps the factor A fixed")
        assert "preset lite, base" in fault

    def test_noise_on_the_half_of_a_round_reaches_the_result_linearly(self) -> None:
        """Twice the noise moves the global change twice as far, in a round of B and in one of A."""
        for closed in (2, 3):
            clean, once, twice = (self.after_noise(closed, strength) for strength in (0.0, 1.0, 2.0))
            moved = {layer: twice[layer] - clean[layer] for layer in LAYERS}
            assert distance(moved, {layer: 2 * (once[layer] - clean[layer]) for layer in LAYERS}) <= 1e-5

    def after_noise(self, closed: int, strength: float) -> dict[str, Tensor]:
        """The global change after ``closed`` rounds and one more whose factors came with noise."""
        rule = self.started()
        for seed in range(closed):
            play(rule, self.updates(rule, seed, WEIGHTS))
        updates = self.updates(rule, 9, WEIGHTS)
        generator = torch.Generator().manual_seed(3)
        for update in updates.values():
            for name, part in sorted(update.adapter.tensors.items()):
                if ".lora_" in name:
                    part.add_(strength * torch.randn(part.shape, generator=generator))
        play(rule, updates)
        return changes(rule.global_adapter())


class TestFedEx(ExactRuleContract):
    rule: ClassVar[str] = "fedex"
    ranks: ClassVar[dict[str, int]] = EQUAL

    def test_it_is_exact_splits_mean(self) -> None:
        ours, theirs = in_float64("fedex"), in_float64("exact_split")
        updates = random_updates(ours, 1)
        play(ours, updates)
        play(theirs, updates)
        assert distance(changes(ours.global_adapter()), changes(theirs.global_adapter())) <= 1e-9

    def test_the_trainable_factors_are_fedits(self) -> None:
        ours, theirs = in_float64("fedex"), in_float64("fedit")
        updates = random_updates(ours, 1)
        play(ours, updates)
        play(theirs, updates)
        expected = theirs.adapter_for("a").tensors
        got = ours.adapter_for("a").tensors
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
        assert set(got) - set(expected) == {f"{x}.folded_{half}" for x in LAYERS for half in "AB"}

    def test_what_the_cap_cuts_off_is_kept(self) -> None:
        """F sums whole residuals, of which the two strongest components go down; three rounds by hand."""
        rule = in_float64("fedex", max_rank=2)
        kept = {layer: torch.zeros(shape, dtype=torch.float64) for layer, shape in LAYERS.items()}
        for seed in range(3):
            updates = random_updates(rule, seed)
            assert play(rule, updates) > 0.01
            for layer, down in changes(rule.global_adapter()).items():
                a, b, product = means_by_hand(updates, layer)
                kept[layer] = kept[layer] + product - b @ a
                assert torch.allclose(down, b @ a + truncated(kept[layer], 2), atol=1e-9)
                assert rule.adapter_for("a").tensors[f"{layer}.folded_A"].shape[0] == 2

    def test_equal_factors_leave_nothing_to_fold(self) -> None:
        rule = self.started()
        update = train(rule.adapter_for("a"), 5)
        play(rule, dict.fromkeys(EQUAL, update))
        assert not rule.adapter_for("a").folded_layers()


class TestLoraFair(AggregationRuleContract):
    rule: ClassVar[str] = "lora_fair"
    ranks: ClassVar[dict[str, int]] = EQUAL

    def test_b_solves_its_least_squares(self) -> None:
        """Against a general solver, row by row of D: [A^T; sqrt(0.01) I] d = [m; 0]."""
        rule = in_float64("lora_fair")
        updates = random_updates(rule, 1)
        play(rule, updates)
        for layer in LAYERS:
            a, b, product = means_by_hand(updates, layer)
            rows = []
            for row in product - b @ a:
                system = torch.cat([a.T, math.sqrt(0.01) * torch.eye(4, dtype=torch.float64)])
                target = torch.cat([row, torch.zeros(4, dtype=torch.float64)])
                rows.append(torch.linalg.lstsq(system, target[:, None]).solution[:, 0])
            tensors = rule.global_adapter().tensors
            assert torch.allclose(tensors[f"{layer}.lora_A"], a, atol=1e-9)
            assert torch.allclose(tensors[f"{layer}.lora_B"], b + torch.stack(rows), atol=1e-9)

    @settings(max_examples=10, deadline=None)
    @given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.01, 0.3, 5.0]))
    def test_never_further_than_fedit(self, seed: int, scale: float) -> None:
        ours, theirs = in_float64("lora_fair"), in_float64("fedit")
        updates = random_updates(ours, seed, scale)
        assert play(ours, updates) <= play(theirs, updates) * (1 + 1e-12)

    def test_one_direction_by_hand(self) -> None:
        """Means a = 2, b = 3, product 7: D = (7 - 6) * 2 / (4 + 0.01)."""

        def adapter(a: float, b: float) -> Adapter:
            tensors = {"l.lora_A": torch.tensor([[a]]).double(), "l.lora_B": torch.tensor([[b]]).double()}
            return Adapter(tensors, BASE, 1, "base")

        rule = build_rule(AggregationConfig("lora_fair", wire_dtype=WireDtype.float32))
        rule.start(adapter(1.0, 0.0), dict.fromkeys("ab", Share("base", 1, ("l",))))
        updates = {
            "a": AdapterUpdate(adapter(1.0, 2.0), 1.0, ""),
            "b": AdapterUpdate(adapter(3.0, 4.0), 1.0, ""),
        }
        play(rule, updates)
        assert float(rule.global_adapter().tensors["l.lora_B"]) == pytest.approx(3 + 2 / 4.01)


def test_the_exact_rules_agree_where_all_of_them_serve() -> None:
    """Sites that train B alone, one round from zero: six rules, one mean."""
    contract = FixedARuleContract()
    seen = []
    for name in ("ffa", "fedsvd", "fedex", "exact_split", "flora", "fedit"):
        rule = build_rule(AggregationConfig(name, **EVERYTHING_GOES_DOWN))
        rule.start(doubled(initial_adapter(4)), contract.shares())
        updates = contract.updates(rule, 1, WEIGHTS)
        sent = rule.adapter_for("a")
        seen.append(dense_mean([(u.weight, site_weights(sent, u)) for u in updates.values()]))
        assert play(rule, updates) <= 1e-9
        assert distance(changes(rule.global_adapter()), seen[0]) <= 1e-9
