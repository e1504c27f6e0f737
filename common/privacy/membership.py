"""Can anyone tell from an artefact whose images it was trained on? An attack's scores, judged.

An accounting's epsilon is an upper bound that holds for every attack; what one attack finds is a lower bound.
The two contradict each other or they do not: that they do not is no proof. Where nothing is claimed, or
nobody threw a coin over who was used, an audit cannot contradict anything, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from common.privacy.accounting import epsilon
from common.privacy.attacker import true_positive_rates
from common.privacy.auditing import ALPHA, Area, OneRun, Rate, area, one_run, rate_at, roc
from common.privacy.budget import booked_epsilon
from common.privacy.events import Event

FALSE_POSITIVE_RATES = (0.01, 0.1)
ATTACK = "calibrated loss"
NOT_RUN = ("boundary loss", "RMIA", "LiRA", "malicious server", "gradient inversion")


class Assignment(StrEnum):
    by_coin = "coin"  # an independent fair coin a patient
    by_split = "split"  # whoever the manifest or a deal put into training: no bound follows from it


class Verdict(StrEnum):
    consistent = "CONSISTENT"
    inconsistent = "INCONSISTENT"
    no_claim = "NO CLAIM"


@dataclass(frozen=True)
class Claim:
    """What the accounting says of an artefact.

    Attributes:
        upper: on epsilon at ``delta``; None: nothing is claimed.
        limits: the largest true-positive rate of any attack, by false-positive rate; empty without a claim.
    """

    upper: float | None = None
    delta: float = 1e-5
    limits: dict[float, float] = field(default_factory=dict)


def claim_of(events: Sequence[Event], delta: float) -> Claim:
    """The claim of an artefact made by ``events`` alone; none if one of them has no noise."""
    upper = booked_epsilon(epsilon(events, delta))
    if upper is None:
        return Claim(None, delta)
    rates = true_positive_rates(events, FALSE_POSITIVE_RATES)
    return Claim(upper, delta, dict(zip(FALSE_POSITIVE_RATES, rates, strict=True)))


@dataclass(frozen=True)
class Membership:
    """What an attack found on one artefact.

    Attributes:
        artefact, artefact_sha256: its name and digest.
        plain: the area of the same attack without the calibration.
        bound: of the guesses; all zeros where no coin decided.
    """

    artefact: str
    artefact_sha256: str
    assignment: Assignment
    members: int
    others: int
    claim: Claim
    alpha: float
    bound: OneRun
    auc: Area
    plain: Area
    rates: tuple[Rate, ...]
    curve: tuple[tuple[float, float], ...]

    @property
    def verdict(self) -> Verdict:
        if self.assignment is not Assignment.by_coin or self.claim.upper is None:
            return Verdict.no_claim
        return Verdict.inconsistent if self.bound.lower > self.claim.upper else Verdict.consistent

    def to_json(self) -> dict[str, Any]:
        """``audits/artefact-NAME.json``."""
        return {
            "schema": 1,
            "kind": "artefact",
            "artefact": self.artefact,
            "artefact_sha256": self.artefact_sha256,
            "attack": ATTACK,
            "unit": "patient",
            "assignment": str(self.assignment),
            "members": self.members,
            "others": self.others,
            "auc": asdict(self.auc),
            "plain_auc": asdict(self.plain),
            "tpr": [
                {**asdict(rate), "limit": self.claim.limits.get(rate.fpr), "measurable": rate.measurable}
                for rate in self.rates
            ],
            "roc": [list(point) for point in self.curve],
            **{name: value for name, value in asdict(self.bound).items() if name != "canaries"},
            "alpha": self.alpha,
            "delta": self.claim.delta,
            "upper": self.claim.upper,
            "verdict": str(self.verdict),
            "not_run": list(NOT_RUN),
        }

    def lines(self) -> list[str]:
        """For people."""
        by = "by fair coin" if self.assignment is Assignment.by_coin else "by a fixed split, not by coin"
        upper = "none" if self.claim.upper is None else f"{_up(self.claim.upper):.2f}"
        return [
            f"AUDIT  artefact: {self.artefact}   attack: {ATTACK}   unit: patient",
            f"  {self.members + self.others} patients assigned {by}: {self.members} in",
            f"  AUC {_span(self.auc)}   without calibration {_span(self.plain)}",
            *(f"  {self._rate_line(rate)}" for rate in self.rates),
            *self._bound_lines(),
            f"  claimed upper bound: {upper}   {self._verdict_line()}",
            f"  attacks NOT run: {', '.join(NOT_RUN)}",
        ]

    def _rate_line(self, rate: Rate) -> str:
        name, limit = f"TPR at {rate.fpr:.0%} FPR:", self.claim.limits.get(rate.fpr)
        bounded = "" if limit is None else f"   limit from accounting {_up(limit):.2f}"
        if rate.value is None or rate.low is None or rate.high is None:
            return f"{name} not measurable with {self.others} others{bounded}"
        return f"{name} {_span(Area(rate.value, rate.low, rate.high))}{bounded}"

    def _bound_lines(self) -> list[str]:
        if self.assignment is not Assignment.by_coin:
            return [
                "  no lower bound: that wants patients left out by fair coins (holdout: coin in site.yaml)",
                "  this audit could not have reported more than 0.00, whatever leaked",
            ]
        return [
            f"  one-run bound: {self.bound.right}/{self.bound.guesses} right -> eps >= "
            f"{_down(self.bound.lower):.2f} ({1 - self.alpha:.0%}, delta {self.claim.delta:g})",
            f"  this audit could not have reported more than {_up(self.bound.ceiling):.2f}, even for a fully "
            "leaking model",
        ]

    def _verdict_line(self) -> str:
        proof = " (not proof)" if self.verdict is Verdict.consistent else ""
        return f"{self.verdict}{proof}"


def judged(
    artefact: tuple[str, str],
    scores: Sequence[tuple[float, float]],
    inside: Sequence[bool],
    assignment: Assignment,
    claim: Claim,
    alpha: float = ALPHA,
) -> Membership:
    """Judge an attack on an artefact.

    Args:
        artefact: its name and its digest.
        scores: for each patient the calibrated score, and the plain one; higher where used.
        inside: who was used.

    Raises:
        ValueError: nobody was used, or everybody, or a score is not finite.
    """
    calibrated, plain = [score for score, _ in scores], [score for _, score in scores]
    (used, others), (used_plain, others_plain) = (_sides(values, inside) for values in (calibrated, plain))
    bound = OneRun(len(scores), 0, 0, 0.0, 0.0)
    if assignment is Assignment.by_coin:
        bound = one_run(calibrated, inside, claim.delta, alpha)
    return Membership(
        *artefact,
        assignment=assignment,
        members=len(used),
        others=len(others),
        claim=claim,
        alpha=alpha,
        bound=bound,
        auc=area(used, others),
        plain=area(used_plain, others_plain),
        rates=tuple(rate_at(rate, used, others) for rate in FALSE_POSITIVE_RATES),
        curve=tuple(roc(used, others)),
    )


def _sides(values: Sequence[float], inside: Sequence[bool]) -> tuple[list[float], list[float]]:
    used = [value for value, coin in zip(values, inside, strict=True) if coin]
    others = [value for value, coin in zip(values, inside, strict=True) if not coin]
    if not all(map(math.isfinite, values)):
        raise ValueError("a score is not finite")
    return used, others


def _span(found: Area) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _up(value: float) -> float:
    """Never looser than it is: to two digits, upwards."""
    return math.ceil(value * 100 - 1e-9) / 100


def _down(value: float) -> float:
    return math.floor(value * 100 + 1e-9) / 100
