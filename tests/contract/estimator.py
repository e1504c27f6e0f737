"""What every robust estimator promises: the base class that each one's test class inherits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from common.recipe import AggregationConfig
from server.aggregation import AggregationRule
from server.collect import LiveUpdates
from server.geometry import measure
from server.robust import Estimate, RobustEstimator, choose_estimator
from tests.contract.moved_sites import (
    FACTOR_VALUES,
    SITES,
    alike,
    answered,
    begun_rule,
    dense_change,
    random_steps,
    whole,
)

Steps = Mapping[str, Mapping[str, Tensor]]
ATTACKS: dict[str, Callable[[Tensor], Tensor]] = {
    "a hundred times as far": lambda step: 100 * step,
    "the other way": lambda step: -step,
    "the other way, a hundred times as far": lambda step: -100 * step,
    "a huge constant": lambda step: torch.full_like(step, 1e6),
}


class EstimatorContract:
    """Inherited by one class an estimator. Five sites of one rank, which train alike; the last may be bad."""

    robust: ClassVar[str] = ""
    rule: ClassVar[str] = "exact_split"
    trains_a: ClassVar[bool] = True

    def oracle(self, changes: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """(n, d) dense changes and their weights -> (d,) what the global adapter changes by; plain numpy."""
        raise NotImplementedError

    def assert_borne(self, result: Tensor, changes: Mapping[str, Tensor], bad: Sequence[str]) -> None:
        """No coordinate of ``result`` is outside what the honest sites sent."""
        honest = torch.stack([change for site, change in changes.items() if site not in bad])
        low, high = honest.min(0).values, honest.max(0).values
        slack = 1e-9 * float(honest.abs().max())
        assert bool(((low - slack <= result) & (result <= high + slack)).all())

    def begun(self) -> AggregationRule:
        return begun_rule(self.rule, trains_a=self.trains_a)

    def estimator(self, sites: int = len(SITES)) -> RobustEstimator:
        config = AggregationConfig(rule=self.rule, robust=self.robust)
        choice = choose_estimator(config, sites)
        assert (choice.estimator.name, choice.why) == (self.robust, "")
        return choice.estimator

    def settled(
        self,
        folder: Path,
        moved: Steps,
        weights: Mapping[str, float] | None = None,
        rule: AggregationRule | None = None,
    ) -> tuple[Tensor, Estimate]:
        """(d,) the change of the global adapter in one round, and what the estimator says of it."""
        rule = rule or self.begun()
        before = whole(rule.global_adapter())
        steps = answered(folder, rule, moved, weights)
        rule.open_round()
        estimate = self.estimator(len(moved)).fold(steps, measure(steps), rule)
        rule.close_round()
        return whole(rule.global_adapter()) - before, estimate

    def moved(self, seed: int = 1) -> dict[str, dict[str, Tensor]]:
        rule = self.begun()
        return alike({site: rule.adapter_for(site) for site in SITES}, seed)

    def changes(self, moved: Steps) -> dict[str, Tensor]:
        sent = self.begun().adapter_for("a")
        return {site: dense_change(sent, steps) for site, steps in moved.items()}

    def test_it_is_the_plain_computation_in_numpy(self, tmp_path: Path) -> None:
        moved, weights = self.moved(), dict(zip(SITES, (12.0, 12.0, 9.0, 30.0, 2.0), strict=True))
        moved["e"] = {name: 3 * step for name, step in moved["e"].items()}
        stacked = torch.stack(list(self.changes(moved).values())).numpy()
        result, _ = self.settled(tmp_path, moved, weights)
        expected = self.oracle(stacked, np.array(list(weights.values())))
        assert result.numpy() == pytest.approx(expected, abs=1e-9 * float(np.abs(stacked).max()))

    def test_identical_sites_give_the_plain_mean(self, tmp_path: Path) -> None:
        steps = self.moved()["a"]
        result, estimate = self.settled(tmp_path, dict.fromkeys(SITES, steps))
        assert torch.allclose(result, self.changes({"a": steps})["a"], atol=1e-9)
        assert len(estimate.counted) + len(estimate.left_out) == len(SITES)

    def test_permutation_of_sites_changes_nothing(self, tmp_path: Path) -> None:
        moved, weights = self.moved(), dict(zip(SITES, (12.0, 12.0, 9.0, 30.0, 2.0), strict=True))
        moved["e"] = {name: 3 * step for name, step in moved["e"].items()}
        other = dict(zip(SITES, ("d", "a", "e", "c", "b"), strict=True))
        result, estimate = self.settled(tmp_path / "one", moved, weights)
        renamed, again = self.settled(
            tmp_path / "other",
            {other[site]: steps for site, steps in moved.items()},
            {other[site]: weight for site, weight in weights.items()},
        )
        assert torch.allclose(result, renamed, atol=1e-9)
        assert sorted(other[site] for site in estimate.counted) == again.counted

    @pytest.mark.parametrize("attack", ATTACKS)
    def test_one_bad_site_is_borne(self, attack: str, tmp_path: Path) -> None:
        moved = self.moved()
        moved[SITES[-1]] = {name: ATTACKS[attack](step) for name, step in moved[SITES[-1]].items()}
        result, _ = self.settled(tmp_path, moved)
        self.assert_borne(result, self.changes(moved), SITES[-1:])

    def test_changes_of_zero_are_no_change(self, tmp_path: Path) -> None:
        sent = self.begun().adapter_for("a")
        result, _ = self.settled(tmp_path, dict.fromkeys(SITES, random_steps(sent, 1, scale=0.0)))
        assert float(result.abs().max()) <= 1e-12

    def test_one_site_that_moved_nothing_divides_by_nothing(self, tmp_path: Path) -> None:
        moved = self.moved()
        moved["c"] = {name: torch.zeros_like(step) for name, step in moved["c"].items()}
        result, _ = self.settled(tmp_path, moved)
        assert bool(torch.isfinite(result).all())
        assert bool(result[:FACTOR_VALUES].any())
        assert bool(result[FACTOR_VALUES:].any())

    def test_every_site_is_counted_or_left_out_with_a_reason(self, tmp_path: Path) -> None:
        _, estimate = self.settled(tmp_path, self.moved())
        assert sorted([*estimate.counted, *estimate.left_out]) == list(SITES)
        assert all(estimate.left_out.values())

    def test_at_most_one_whole_update_is_in_memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rule, live = self.begun(), LiveUpdates()
        fold = rule.fold

        def watched(site: str, update: object) -> None:
            live.watch(update)
            fold(site, update)

        monkeypatch.setattr(rule, "fold", watched)
        self.settled(tmp_path, self.moved(), rule=rule)
        assert live.peak <= 1
