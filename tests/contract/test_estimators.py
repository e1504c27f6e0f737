"""Each robust estimator against the contract, and what is its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import ConfigError
from common.names import (
    AGGREGATION_RULES,
    ALTERNATING_RULES,
    CHANGE_VOTE_RULES,
    FACTOR_VOTE_RULES,
    FIXED_A_RULES,
    ROBUST_ESTIMATORS,
    VOTING_ESTIMATORS,
)
from common.recipe import AggregationConfig
from common.robust_rules import robust_faults
from server.robust import AUTO, BOUND, ESTIMATORS, choose_estimator
from server.robust.multi_krum import LEFT_OUT
from server.robust.norm_bound import length_within
from server.steps import Group
from tests.contract.dense_algebra import LAYERS, shares_of
from tests.contract.estimator import EstimatorContract
from tests.contract.moved_sites import (
    FACTOR_VALUES,
    PARTS,
    SITES,
    answered,
    begun_rule,
    dense_change,
    random_steps,
    started_rule,
)


def bounded(weights: np.ndarray) -> np.ndarray:
    """Weights as `norm_bound` and `multi_krum` count them: sorted, the lower middle one, times the bound."""
    return np.minimum(weights, 1.5 * np.sort(weights)[(len(weights) - 1) // 2])


class TestNone(EstimatorContract):
    robust: ClassVar[str] = "none"

    def oracle(self, changes: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return (weights[:, None] * changes).sum(0) / weights.sum()

    def assert_borne(self, result: Tensor, changes: Mapping[str, Tensor], bad: Sequence[str]) -> None:
        """It bears nothing: a bad site has its share in the mean."""
        assert torch.allclose(result, torch.stack(list(changes.values())).mean(0))


class TestNormBound(EstimatorContract):
    robust: ClassVar[str] = "norm_bound"

    def oracle(self, changes: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The last site of three times the step is shortened in both groups: here on its dense change."""
        changes, weights = changes.copy(), bounded(weights)
        sent = self.begun().adapter_for("a")
        steps = {name: 3 * step for name, step in self.moved()["e"].items()}
        for part in PARTS.values():
            norms = np.linalg.norm(changes[:, part], axis=1)
            bound = 1.5 * np.sort(norms)[2]
            assert (norms > bound).tolist() == [False, False, False, False, True]
            low, high = 0.0, 1.0
            while high - low > 1e-15:
                middle = (low + high) / 2
                at = dense_change(sent, steps, middle, middle).numpy()[part]
                low, high = (middle, high) if np.linalg.norm(at) <= bound else (low, middle)
            changes[-1, part] = dense_change(sent, steps, low, low).numpy()[part]
        return (weights[:, None] * changes).sum(0) / weights.sum()

    def assert_borne(self, result: Tensor, changes: Mapping[str, Tensor], bad: Sequence[str]) -> None:
        """The bad site's part is at most the bound times the median norm, divided by the sites."""
        for part in PARTS.values():
            norms = sorted(float(change[part].norm()) for change in changes.values())
            honest = torch.stack([changes[site][part] for site in changes if site not in bad])
            honest = honest.sum(0) / len(SITES)
            assert float((result[part] - honest).norm()) <= BOUND * norms[2] / len(SITES) * (1 + 1e-9)

    def test_every_folded_change_is_within_the_bound(self, tmp_path: Path) -> None:
        """From a thousandth to ten thousand times its length, and where the two orders cancel."""
        rule = self.begun()
        sent = rule.adapter_for("a")
        steps = random_steps(sent, 1)
        turned = {name: -step if name.endswith("lora_A") else step for name, step in steps.items()}
        for number, moved in enumerate((steps, turned)):
            for scale in (1e-3, 1.0, 1e4):
                scaled = {name: scale * step for name, step in moved.items()}
                found = answered(tmp_path / f"{number}-{scale}", rule, {"a": scaled})
                for group, part in zip(
                    Group, (slice(0, FACTOR_VALUES), slice(FACTOR_VALUES, None)), strict=True
                ):
                    norm = float(dense_change(sent, scaled)[part].norm())
                    for bound in (0.0, 1e-3 * norm, 0.5 * norm, norm):
                        t = length_within(found, "a", group, bound)
                        assert 0 <= t <= 1
                        reached = float(dense_change(sent, scaled, t, t)[part].norm())
                        assert reached <= bound * (1 + 1e-9) + 1e-12
                        assert t == 0 or reached >= 0.99 * bound

    def test_where_nothing_is_bounded_the_mean_is_the_exact_weighted_one(self, tmp_path: Path) -> None:
        weights = dict(zip(SITES, (12.0, 10.0, 9.0, 11.0, 2.0), strict=True))
        plain = TestNone().settled(tmp_path / "plain", self.moved(), weights)[0]
        result, estimate = self.settled(tmp_path / "bound", self.moved(), weights)
        assert torch.equal(result, plain)
        assert estimate.notes == {"shortened": {}, "weights_bounded": {}}

    def test_a_declared_weight_is_bounded_too(self, tmp_path: Path) -> None:
        weights = dict(zip(SITES, (10.0, 10.0, 10.0, 10.0, 1000.0), strict=True))
        moved = self.moved()
        result, estimate = self.settled(tmp_path, moved, weights)
        assert estimate.notes["weights_bounded"] == {"e": 15.0}
        shares = torch.tensor([10.0, 10.0, 10.0, 10.0, 15.0]).double() / 55
        assert torch.allclose(
            result, (shares[:, None] * torch.stack(list(self.changes(moved).values()))).sum(0)
        )

    def test_of_two_sites_the_smaller_change_sets_the_bound(self, tmp_path: Path) -> None:
        moved = {site: self.moved()[site] for site in "ab"}
        moved["b"] = {name: 100 * step for name, step in moved["b"].items()}
        result, estimate = self.settled(tmp_path, moved)
        small = self.changes(moved)["a"]
        for part in PARTS.values():
            assert float(result[part].norm()) <= (1 + BOUND) / 2 * float(small[part].norm()) * (1 + 1e-9)
        assert list(estimate.notes["shortened"]) == ["b"]


class TestNormBoundFedIT(EstimatorContract):
    """A rule that averages the factors apart: held to its own mean of the shortened updates."""

    robust: ClassVar[str] = "norm_bound"
    rule: ClassVar[str] = "fedit"

    def oracle(self, changes: np.ndarray, weights: np.ndarray) -> np.ndarray:
        steps = self.moved()
        steps["e"] = {name: 3 * step for name, step in steps["e"].items()}
        sent = self.begun().adapter_for("a")
        names = {
            Group.factors: [n for n in steps["a"] if ".lora_" in n],
            Group.dense: ["head.bias", "head.weight"],
        }
        for group, part in PARTS.items():
            bound = 1.5 * np.sort(np.linalg.norm(changes[:, part], axis=1))[2]
            low, high = 0.0, 1.0
            while high - low > 1e-15:
                t = (low + high) / 2
                short = np.linalg.norm(dense_change(sent, steps["e"], t, t).numpy()[part]) <= bound
                low, high = (t, high) if short else (low, t)
            steps["e"] |= {name: low * steps["e"][name].double() for name in names[group]}
        weights = bounded(weights) / bounded(weights).sum()
        rows = zip(weights, steps.values(), strict=True)
        mean = [{name: weight * step.double() for name, step in row.items()} for weight, row in rows]
        return dense_change(sent, {name: sum(row[name] for row in mean) for name in mean[0]}).numpy()

    def assert_borne(self, result: Tensor, changes: Mapping[str, Tensor], bad: Sequence[str]) -> None:
        """Means of factors apart have no bound in their product; nothing of the attack's size is left."""
        largest = max(float(change.norm()) for site, change in changes.items() if site not in bad)
        assert float(result.norm()) <= BOUND * largest


class TestMultiKrum(EstimatorContract):
    robust: ClassVar[str] = "multi_krum"

    def oracle(self, changes: np.ndarray, weights: np.ndarray) -> np.ndarray:
        count = len(changes)
        distances = np.zeros((count, count))
        for part in PARTS.values():
            squares = (changes[:, None, part] - changes[None, :, part]) ** 2
            distances += squares.sum(2) / np.median((changes[:, part] ** 2).sum(1))
        nearest = [sorted(np.delete(distances[row], row))[: count - 1 - 2] for row in range(count)]
        kept = np.argsort([sum(row) for row in nearest])[: count - 1]
        shares = bounded(weights[kept])
        return (shares[:, None] * changes[kept]).sum(0) / shares.sum()

    def test_what_is_left_out_has_no_part_in_the_result(self, tmp_path: Path) -> None:
        """Guarantee: the result is the mean of the others, to the bit."""
        moved = self.moved()
        moved["c"] = {name: -step for name, step in moved["c"].items()}
        result, estimate = self.settled(tmp_path / "five", moved)
        assert estimate.left_out == {"c": LEFT_OUT}
        others = {site: steps for site, steps in moved.items() if site != "c"}
        assert torch.equal(result, TestNone().settled(tmp_path / "four", others, rule=self.begun())[0])

    def test_both_groups_speak_alike(self, tmp_path: Path) -> None:
        """A site that is wrong in its small factors alone is left out, however large all dense steps are."""
        moved = self.moved()
        for steps in moved.values():
            steps |= {name: 1000 * steps[name] for name in steps if "head" in name}
        moved["b"] |= {name: -step for name, step in moved["b"].items() if name.endswith("lora_B")}
        assert list(self.settled(tmp_path, moved)[1].left_out) == ["b"]


class TestMultiKrumFlora(TestMultiKrum):
    rule: ClassVar[str] = "flora"


class TestTrimmedMean(EstimatorContract):
    robust: ClassVar[str] = "trimmed_mean"

    def oracle(self, changes: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return np.sort(changes, axis=0)[1:-1].mean(0)

    def test_declared_weights_do_not_count(self, tmp_path: Path) -> None:
        light = self.settled(tmp_path / "light", self.moved())[0]
        heavy = self.settled(tmp_path / "heavy", self.moved(), dict(zip(SITES, range(1, 6), strict=True)))[0]
        assert torch.equal(light, heavy)

    def test_a_site_has_no_vote_on_a_layer_that_it_does_not_train(self, tmp_path: Path) -> None:
        """Sites of several ranks; of a layer, those that train it decide."""
        both, one = tuple(sorted(LAYERS)), tuple(sorted(LAYERS))[:1]
        rule = started_rule("exact_split", shares_of(dict(zip(SITES, (2, 4, 3, 4, 2), strict=True)),
                                                     {"b": one, "d": one}))  # fmt: skip
        sent = {site: rule.adapter_for(site) for site in SITES}
        moved = {site: random_steps(sent[site], index) for index, site in enumerate(SITES)}
        result, _ = self.settled(tmp_path, moved, rule=rule)
        stacked = torch.stack([dense_change(sent[site], moved[site]) for site in SITES])
        first = LAYERS[both[0]][0] * LAYERS[both[0]][1]
        second = slice(first, FACTOR_VALUES)
        assert torch.allclose(result[:first], stacked[:, :first].sort(0).values[1:-1].mean(0), atol=1e-9)
        voters = stacked[[0, 2, 4], second]
        assert torch.allclose(result[second], voters.median(0).values, atol=1e-9)

    def test_blocks_of_rows_make_no_difference(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole_layers = self.settled(tmp_path / "whole", self.moved())[0]
        monkeypatch.setattr("server.robust.voting.BLOCK", 60)
        assert torch.allclose(self.settled(tmp_path / "rows", self.moved())[0], whole_layers, atol=1e-12)


class TestTrimmedMeanFlora(TestTrimmedMean):
    rule: ClassVar[str] = "flora"


class TestMedian(EstimatorContract):
    robust: ClassVar[str] = "median"

    def oracle(self, changes: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return np.median(changes, axis=0)

    def test_two_bad_sites_of_five_are_borne(self, tmp_path: Path) -> None:
        moved = self.moved()
        moved["e"] = {name: torch.full_like(step, 1e6) for name, step in moved["e"].items()}
        moved["d"] = {name: -100 * step for name, step in moved["d"].items()}
        result, _ = self.settled(tmp_path, moved)
        self.assert_borne(result, self.changes(moved), "de")

    def test_of_four_sites_it_is_the_mean_of_the_middle_two(self, tmp_path: Path) -> None:
        moved = {site: self.moved()[site] for site in "abcd"}
        expected = np.median(torch.stack(list(self.changes(moved).values())).numpy(), axis=0)
        assert self.settled(tmp_path, moved)[0].numpy() == pytest.approx(expected, abs=1e-9)


class FixedAVote(EstimatorContract):
    """Where all sites train B alone: the vote is on B."""

    trains_a: ClassVar[bool] = False

    def oracle(self, changes: np.ndarray, weights: np.ndarray) -> np.ndarray:
        sent = self.begun().adapter_for("a")
        steps = self.moved()
        steps["e"] = {name: 3 * step for name, step in steps["e"].items()}
        stacked = {
            name: np.stack([row[name].double().numpy() for row in steps.values()]) for name in steps["a"]
        }
        voted = {name: torch.from_numpy(self.vote(values)) for name, values in stacked.items()}
        return dense_change(sent, voted).numpy()

    def vote(self, values: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def assert_borne(self, result: Tensor, changes: Mapping[str, Tensor], bad: Sequence[str]) -> None:
        """The coordinates that are voted on are those of B: the span is read there."""
        sent, moved = self.begun().adapter_for("a"), self.moved()
        start = 0
        for layer, (out, width) in sorted(LAYERS.items()):
            found = result[start : start + out * width].reshape(out, width)
            step = torch.linalg.lstsq(sent.tensors[f"{layer}.lora_A"].double().T, found.T).solution.T
            honest = torch.stack(
                [moved[site][f"{layer}.lora_B"].double() for site in SITES if site not in bad]
            )
            assert bool((step >= honest.min(0).values - 1e-7).all())
            assert bool((step <= honest.max(0).values + 1e-7).all())
            start += out * width


class TestTrimmedMeanFFA(FixedAVote):
    robust: ClassVar[str] = "trimmed_mean"
    rule: ClassVar[str] = "ffa"

    def vote(self, values: np.ndarray) -> np.ndarray:
        return np.sort(values, axis=0)[1:-1].mean(0)


class TestMedianFedSVD(FixedAVote):
    robust: ClassVar[str] = "median"
    rule: ClassVar[str] = "fedsvd"

    def vote(self, values: np.ndarray) -> np.ndarray:
        return np.median(values, axis=0)


# ---- the registry ---------------------------------------------------------------------------------


def test_a_recipe_knows_the_names_of_the_registered_estimators() -> None:
    assert (*ESTIMATORS, AUTO) == ROBUST_ESTIMATORS
    assert set(VOTING_ESTIMATORS) <= set(ESTIMATORS)
    assert {name: each.name for name, each in ESTIMATORS.items()} == {name: name for name in ESTIMATORS}
    assert set(CHANGE_VOTE_RULES) <= set(AGGREGATION_RULES)
    assert set(FACTOR_VOTE_RULES) <= {*FIXED_A_RULES, *ALTERNATING_RULES}


def test_every_estimator_has_a_contract_class() -> None:
    tested, classes = set(), [EstimatorContract]
    while classes:
        each = classes.pop()
        classes += each.__subclasses__()
        tested.add(each.robust)
    assert tested - {""} == set(ESTIMATORS)


@pytest.mark.parametrize("robust", VOTING_ESTIMATORS)
@pytest.mark.parametrize("rule", AGGREGATION_RULES)
def test_recipe_server_and_rule_refuse_the_same_votes(rule: str, robust: str) -> None:
    """A and B are never averaged apart by a vote."""
    config = AggregationConfig(rule=rule, robust=robust)
    built = begun_rule(rule, trains_a=rule not in FIXED_A_RULES)
    built.open_round()
    if rule in (*CHANGE_VOTE_RULES, *FACTOR_VOTE_RULES):
        assert not list(robust_faults(config))
        assert choose_estimator(config, 5).estimator.name == robust
        built.fold_consensus([], SITES)
        built.close_round()
        return
    assert [fault.key for fault in robust_faults(config)] == ["aggregation.robust"]
    with pytest.raises(ConfigError, match="rule"):
        choose_estimator(config, 5)
    with pytest.raises(ConfigError, match="A and B"):
        built.fold_consensus([], SITES)
