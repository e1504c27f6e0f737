"""Settling a round: outliers are dropped by name, the rest is folded, and the log hears why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.canonical import canonical_json
from common.errors import ConfigError, FederationError
from common.names import AGGREGATION_RULES, FIXED_A_RULES, ROBUST_ESTIMATORS, VOTING_ESTIMATORS
from common.recipe import AggregationConfig
from common.robust_rules import vote_fault
from common.tuning.halves import trained_halves, without
from server.aggregation import AggregationRule
from server.answers import Answers
from server.collect import LiveUpdates
from server.outliers import OPPOSED, TOO_LARGE
from server.report.schema import Rejection
from server.robust.multi_krum import LEFT_OUT
from server.settling import Settled, settle
from server.steps import sent_to
from tests.contract.dense_algebra import play
from tests.contract.moved_sites import SITES, alike, as_update, begun_rule, dense_change, whole

WEIGHTS = dict(zip(SITES, (12.0, 7.0, 12.0, 30.0, 2.0), strict=True))
Moved = Mapping[str, Mapping[str, Tensor]]


def moved_by(rule: AggregationRule) -> dict[str, dict[str, Tensor]]:
    """Of the factors, what has its turn in the first round."""
    moved = alike({site: rule.adapter_for(site) for site in SITES}, seed=1)
    resting = without(trained_halves("base", rule.name, 0))
    return {
        site: {name: step for name, step in steps.items() if not name.endswith(resting)}
        for site, steps in moved.items()
    }


def settled(
    folder: Path, rule: AggregationRule, moved: Moved, progress: float = 0.0, **config: object
) -> Settled:
    """One round, opened and closed."""
    sent, answers = sent_to(rule, moved), Answers(folder)
    for site, steps in moved.items():
        answers.add(site, as_update(sent[site], steps, WEIGHTS[site]))
    rule.open_round()
    found = settle(answers, rule, AggregationConfig(rule=rule.name, **config), sent, progress)
    rule.close_round()
    assert set(answers.sites()) >= set(found.taken)
    return found


def begun(name: str = "exact_split") -> AggregationRule:
    return begun_rule(name, trains_a=name not in FIXED_A_RULES)


@pytest.mark.parametrize("name", AGGREGATION_RULES)
def test_without_an_outlier_the_default_is_the_rules_own_weighted_mean(name: str, tmp_path: Path) -> None:
    """To the bit: what sites trained, folded as if it had never been taken apart."""
    rule, plain = begun(name), begun(name)
    moved = moved_by(rule)
    found = settled(tmp_path, rule, moved)
    sent = {site: plain.adapter_for(site) for site in SITES}
    trained = {
        site: {key: sent[site].tensors[key].double() + step.double() for key, step in steps.items()}
        for site, steps in moved.items()
    }
    play(plain, {site: as_update(sent[site], steps, WEIGHTS[site]) for site, steps in trained.items()})
    assert rule.global_adapter().digest == plain.global_adapter().digest
    assert (found.taken, found.rejected) == (list(SITES), [])


@pytest.mark.parametrize("name", AGGREGATION_RULES)
@pytest.mark.parametrize("robust", ROBUST_ESTIMATORS)
def test_every_rule_with_every_estimator(name: str, robust: str, tmp_path: Path) -> None:
    """It is served with a finite result that moved, or refused before anything is folded."""
    rule = begun(name)
    before = whole(rule.global_adapter())
    if robust in VOTING_ESTIMATORS and vote_fault(name):
        with pytest.raises(ConfigError, match="does not go with the rule"):
            settled(tmp_path, rule, moved_by(rule), robust=robust)
        return
    found = settled(tmp_path, rule, moved_by(rule), robust=robust)
    change = whole(rule.global_adapter()) - before
    assert bool(torch.isfinite(change).all())
    assert float(change.norm()) > 0.1
    assert sorted([*found.taken, *(one.site for one in found.rejected)]) == list(SITES)


@pytest.mark.parametrize("robust", ROBUST_ESTIMATORS)
def test_a_site_a_hundred_times_as_far_is_quarantined_by_name(robust: str, tmp_path: Path) -> None:
    rule, without = begun(), begun()
    moved = moved_by(rule)
    moved["c"] = {name: 100 * step for name, step in moved["c"].items()}
    found = settled(tmp_path / "all", rule, moved, robust=robust)
    assert Rejection("c", TOO_LARGE) in found.rejected
    assert found.notes["quarantined"] == {"c": TOO_LARGE}
    others = {site: steps for site, steps in moved.items() if site != "c"}
    settled(tmp_path / "others", without, others, robust=robust)
    assert rule.global_adapter().digest == without.global_adapter().digest


@pytest.mark.parametrize("robust", ROBUST_ESTIMATORS)
def test_a_site_turned_round_is_quarantined_by_name(robust: str, tmp_path: Path) -> None:
    rule = begun()
    moved = moved_by(rule)
    moved["e"] = {name: -step for name, step in moved["e"].items()}
    assert Rejection("e", OPPOSED) in settled(tmp_path, rule, moved, robust=robust).rejected


def test_late_in_a_run_a_site_turned_round_is_borne_by_the_estimator(tmp_path: Path) -> None:
    """No coordinate leaves what the honest sites sent, though nobody is quarantined."""
    rule = begun()
    before, moved = whole(rule.global_adapter()), moved_by(rule)
    honest = torch.stack([dense_change(rule.adapter_for(site), moved[site]) for site in SITES[:-1]])
    moved["e"] = {name: -step for name, step in moved["e"].items()}
    assert settled(tmp_path, rule, moved, progress=0.5, robust="auto").rejected == []
    change = whole(rule.global_adapter()) - before
    assert bool((change >= honest.min(0).values - 1e-9).all())
    assert bool((change <= honest.max(0).values + 1e-9).all())


def test_a_quarantined_answer_is_dropped_from_the_disk(tmp_path: Path) -> None:
    rule = begun()
    moved = moved_by(rule)
    moved["c"] = {name: 100 * step for name, step in moved["c"].items()}
    settled(tmp_path, rule, moved)
    assert [path.stem for path in sorted(tmp_path.iterdir())] == ["a", "b", "d", "e"]


def test_what_an_estimator_leaves_out_is_rejected_with_its_reason(tmp_path: Path) -> None:
    found = settled(tmp_path, begun(), moved_by(begun()), robust="multi_krum")
    assert [one.reason for one in found.rejected] == [LEFT_OUT]
    assert len(found.taken) == 4


def test_the_notes_are_plain_and_finite_and_say_what_was_done(tmp_path: Path) -> None:
    """They go into the event log as they are."""
    for robust in ROBUST_ESTIMATORS:
        rule = begun()
        moved = moved_by(rule)
        moved["b"] = {name: 2.5 * step for name, step in moved["b"].items()}
        notes = json.loads(canonical_json(settled(tmp_path / robust, rule, moved, robust=robust).notes))
        assert notes["asked"] == robust
        assert notes["norms"]["a"].keys() == notes["median_cosines"]["a"].keys() == {"factors", "dense"}
        assert (notes["quarantined"], notes["outliers_spared"]) == ({}, [])
        if robust == "norm_bound":
            assert list(notes["shortened"]) == ["b"]
            assert list(notes["weights_bounded"]) == ["d"]
        if robust == "auto":
            assert (notes["estimator"], notes["cut_at_each_end"]) == ("trimmed_mean", 1)


def test_too_few_sites_are_noted(tmp_path: Path) -> None:
    rule = begun()
    moved = {site: steps for site, steps in moved_by(rule).items() if site in "ab"}
    notes = settled(tmp_path, rule, moved, robust="multi_krum").notes
    assert notes["estimator"] == "norm_bound"
    assert "multi_krum needs 5 sites" in notes["why"]


@pytest.mark.parametrize("name", AGGREGATION_RULES)
def test_sites_that_moved_nothing_leave_everything_as_it_was(name: str, tmp_path: Path) -> None:
    for robust in ROBUST_ESTIMATORS:
        if robust in VOTING_ESTIMATORS and vote_fault(name):
            continue
        rule = begun(name)
        before = whole(rule.global_adapter())
        still = {
            site: {key: torch.zeros_like(step) for key, step in steps.items()}
            for site, steps in moved_by(rule).items()
        }
        assert settled(tmp_path / robust, rule, still, robust=robust).notes["quarantined"] == {}
        assert float((whole(rule.global_adapter()) - before).abs().max()) <= 1e-12


def test_a_round_that_nobody_answered_folds_nothing(tmp_path: Path) -> None:
    rule = begun()
    rule.open_round()
    assert settle(Answers(tmp_path), rule, AggregationConfig(robust="auto"), {}, 0.0).taken == []
    with pytest.raises(FederationError):
        rule.close_round()


def test_the_mean_of_a_hospital_of_one_site_is_that_site(tmp_path: Path) -> None:
    for robust in ROBUST_ESTIMATORS:
        rule = begun()
        before, moved = whole(rule.global_adapter()), {"a": moved_by(rule)["a"]}
        change = dense_change(rule.adapter_for("a"), moved["a"])
        assert settled(tmp_path / robust, rule, moved, robust=robust).taken == ["a"]
        assert torch.allclose(whole(rule.global_adapter()) - before, change, atol=1e-9)


@pytest.mark.parametrize("robust", ROBUST_ESTIMATORS)
def test_at_most_two_whole_updates_are_in_memory(
    robust: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer that is read, and the update that is folded."""
    live, read = LiveUpdates(), Answers.update

    def watched(answers: Answers, site: str) -> object:
        update = read(answers, site)
        live.watch(update)
        return update

    rule = begun()
    fold = rule.fold

    def folding(site: str, update: object) -> None:
        live.watch(update)
        fold(site, update)

    monkeypatch.setattr(Answers, "update", watched)
    monkeypatch.setattr(rule, "fold", folding)
    settled(tmp_path, rule, moved_by(rule), robust=robust)
    assert live.now == 0
    assert live.peak <= 2


def test_what_is_sent_is_held_once_for_sites_that_train_the_same() -> None:
    rule = begun()
    sent = sent_to(rule, SITES)
    assert len({id(adapter) for adapter in sent.values()}) == 1
    assert all(adapter.digest == rule.adapter_for(site).digest for site, adapter in sent.items())
