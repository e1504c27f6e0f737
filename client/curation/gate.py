"""What the tests of a set of synthetic images add up to: blocked, or no copy found, and never more than that.

Two questions that are not the same: is an image of the set a training patient's (`client.curation.copies`),
and does the generator remember its patients (`client.curation.memorising`)? Either one blocks the set.
Distances alone would not do: the second tells sets apart that pass them (Yao et al. 2025, arXiv 2505.01524).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from torch import Tensor

from client.curation.copies import (
    CopyTest,
    Likeness,
    copied_by_any,
    covered_patients,
    upper_coverage,
)
from client.curation.encodings import encoders
from client.patients import Patient, Split
from common.plan import RunPlan
from common.privacy.auditing import Area
from common.privacy.membership import Membership
from common.recipe import GeneratorScope

FOUND_NOTHING = "NO COPY FOUND BY THESE TESTS"


class Verdict(StrEnum):
    not_applicable = "NOT APPLICABLE"  # nobody's image trained the generator: there is nothing to remember
    not_tested = "NOT TESTED"
    blocked = "BLOCKED"
    found_nothing = FOUND_NOTHING


@dataclass(frozen=True)
class Examined:
    """Images held against a site's patients.

    Attributes:
        found: by each encoding.
        patients, holdout: how many the generator was trained on, and how many others set the limits.
    """

    images: int
    patients: int
    holdout: int
    found: Mapping[str, Likeness]

    @property
    def copied(self) -> Tensor:
        """(G,) bool."""
        return copied_by_any(self.found)

    @property
    def covered(self) -> int:
        """How many training patients there is a copy of: the headline."""
        return len(covered_patients(self.found))

    @property
    def coverage_limit(self) -> float:
        """The share of patients that may yet be copied, at one-sided 95 %."""
        return upper_coverage(self.covered, self.patients)

    def to_json(self) -> dict[str, Any]:
        """Counts and limits; no image, no patient."""
        return {
            "images": self.images,
            "patients": self.patients,
            "holdout": self.holdout,
            "copied": int(self.copied.sum()),
            "copy_rate": int(self.copied.sum()) / max(1, self.images),
            "covered_patients": self.covered,
            "coverage_upper": self.coverage_limit,
            "encodings": {name: _likeness_json(one) for name, one in self.found.items()},
        }

    def lines(self) -> list[str]:
        """For people."""
        lines = [
            f"COPIES  {self.covered} of {self.patients} training patients have a copy among {self.images} "
            f"images (at most {self.coverage_limit:.1%} of patients, one-sided 95 %)",
            f"  {int(self.copied.sum())} images are copies; the limits are {self.holdout} other patients'",
        ]
        for name, one in self.found.items():
            lines.append(
                f"  {name}: {int(one.near.sum())} nearer than {one.limits.tau:.3f}, where chance has "
                f"{one.limits.null_rate * self.images:.1f} (p {one.p_value:.2g}), of them copies "
                f"{int(one.copied.sum())}"
            )
            lines.append(
                f"    worth a look, decides nothing: {one.triage} with a small NNDR, clique of {one.clique}"
            )
        return lines


@dataclass(frozen=True)
class Findings:
    """All that was tested; None: was not.

    Attributes:
        why: for which reason something was not, in words.
    """

    examined: Examined | None
    attacked: Membership | None
    trained: bool
    why: str = ""

    @property
    def reasons(self) -> list[str]:
        """Why the set is blocked; empty if it is not."""
        found = []
        if self.examined is not None and self.examined.covered:
            found.append("there are copies of training patients")
        if self.attacked is not None and self.attacked.auc.low > 0.5:
            found.append("the generator tells whom it was trained on")
        return found

    @property
    def verdict(self) -> Verdict:
        if self.reasons:
            return Verdict.blocked
        if self.examined is not None and self.attacked is not None:
            return Verdict.found_nothing
        return Verdict.not_tested if self.trained else Verdict.not_applicable

    def to_json(self) -> dict[str, Any]:
        return {
            "verdict": str(self.verdict),
            "reasons": self.reasons,
            "trained_on_patients": self.trained,
            "copies": None if self.examined is None else self.examined.to_json(),
            "membership": None if self.attacked is None else self.attacked.to_json(),
            "not_tested": self.why,
        }

    def lines(self) -> list[str]:
        lines = [] if self.examined is None else self.examined.lines()
        if self.attacked is not None:
            lines += _attack_lines(self.attacked)
        lines += [f"not tested: {self.why}"] if self.why else []
        said = {
            Verdict.not_applicable: ": the generator was never trained on a patient",
            Verdict.found_nothing: " (that is all it says)",
        }
        return [
            *lines,
            f"VERDICT  {self.verdict}{said.get(self.verdict, '')}",
            *(f"  - {one}" for one in self.reasons),
        ]


def trains_on_patients(plan: RunPlan) -> bool:
    """Whether the plan's generator is shown images of patients."""
    return plan.generator.scope in (GeneratorScope.local, GeneratorScope.federated)


def sides(patients: Sequence[Patient]) -> tuple[list[Patient], list[Patient]]:
    """Those that a generator is trained on, and all others, whom none of the two scopes shows to it."""
    shown = [patient.split is Split.train and patient.labelled for patient in patients]
    train, holdout = (
        [patient for patient, was in zip(patients, shown, strict=True) if was is wanted]
        for wanted in (True, False)
    )
    return train, holdout


def examine(images: Tensor, patients: Sequence[Patient], plan: RunPlan) -> Examined | None:
    """``images`` (G, 3, S, S) held against the site's ``patients``; None: no image, or nobody left out."""
    train, holdout = sides(patients)
    if not train or not holdout or not len(images):
        return None
    test = CopyTest(train, holdout, encoders(plan), images.shape[-1])
    return Examined(len(images), len(train), len(holdout), test.examine(images))


def _likeness_json(one: Likeness) -> dict[str, Any]:
    return {
        **asdict(one.limits),
        "near": int(one.near.sum()),
        "copied": int(one.copied.sum()),
        "p_value": one.p_value,
        "low_nndr": one.triage,
        "largest_clique": one.clique,
    }


def _attack_lines(found: Membership) -> list[str]:
    lines = [
        f"MEMBERSHIP  {found.members} patients trained on, {found.others} others: AUC {_span(found.auc)} "
        "(0.5 is guessing)"
    ]
    for rate in found.rates:
        if rate.value is None or rate.low is None or rate.high is None:
            lines.append(f"  TPR at {rate.fpr:.0%} FPR: not measurable with {found.others} others")
        else:
            lines.append(f"  TPR at {rate.fpr:.0%} FPR: {_span(Area(rate.value, rate.low, rate.high))}")
    return lines


def _span(found: Area) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
