"""Settling a round: its sites are compared, outliers quarantined, and the rest folded into the open rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common.adapter import Adapter
from common.recipe import AggregationConfig
from server.aggregation import AggregationRule
from server.answers import Answers
from server.geometry import measure
from server.outliers import Findings, compare
from server.report.schema import Rejection
from server.robust import Estimate, choose_estimator
from server.steps import RoundSteps


@dataclass(frozen=True)
class Settled:
    """What came of a round's admitted answers.

    Attributes:
        taken: sites whose updates are in the result, in order.
        rejected: the others, each with its reason, in fixed words.
        notes: plain values for the event log: norms, cosines and what the estimator did.
    """

    taken: list[str]
    rejected: list[Rejection] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)


def settle(
    answers: Answers,
    rule: AggregationRule,
    config: AggregationConfig,
    sent: Mapping[str, Adapter],
    progress: float,
) -> Settled:
    """Fold the round's answers into ``rule``, whose round is open and empty.

    Args:
        answers: as admitted, of steps; the quarantined ones are dropped from it.
        sent: site -> what it was sent (`server.steps.sent_to`).
        progress: share of the stage's rounds that were over before this one (`server.outliers.compare`).

    Raises:
        ConfigError: the rule cannot serve the estimator that ``config`` asks for.
        ArtefactError: an answer cannot be read, or does not fit what its site was sent.
    """
    steps = RoundSteps(answers, sent)
    geometry = measure(steps)
    findings = compare(geometry, progress)
    quarantined = findings.quarantined()
    kept = steps.only(set(steps.sites) - set(quarantined))
    choice = choose_estimator(config, len(kept.sites))
    for site in quarantined:
        answers.drop(site)
    estimate = Estimate([])
    if kept.sites:
        estimate = choice.estimator.fold(kept, geometry.only(kept.sites), rule)
    reasons = quarantined | estimate.left_out
    chosen = {"asked": config.robust, "estimator": choice.estimator.name, "why": choice.why}
    return Settled(
        taken=estimate.counted,
        rejected=[Rejection(site, reasons[site]) for site in sorted(reasons)],
        notes={**chosen, **estimate.notes, **_noted(findings)},
    )


def _noted(findings: Findings) -> dict[str, Any]:
    norms = {site: dict(finding.norms) for site, finding in findings.sites.items()}
    cosines = {site: dict(finding.cosines) for site, finding in findings.sites.items()}
    notes = {"norms": norms, "median_cosines": cosines, "quarantined": findings.quarantined()}
    return notes | {"outliers_spared": findings.spared}
