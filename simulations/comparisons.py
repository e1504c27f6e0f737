"""Two models on the same patients: paired intervals and tests, over all seeds of one recipe.

A patient's value is the mean over classes. Tested on ``own``, a patient is seen by the two models of its own
site; on ``all``, by those of every site, whose mean difference counts as one.

* The difference is the report's: of ``own`` the mean over sites, of ``all`` the mean over patients; then the
  mean over seeds.
* Its 95 % interval is a bootstrap of patients, drawn within each site and each seed (Efron and
  Tibshirani 1993, percentiles). Seeds are blocks: each keeps its own cut, and all of them count alike. It
  says how sure these seeds are, not what another seed would bring: each seed's own difference stands beside.
* p is Wilcoxon's signed-rank test on all differences (Wilcoxon 1945), two-sided, corrected over the family of
  all comparisons of the table (Holm 1979). Where seeds cut one data set, a patient may be in the test splits
  of several, and is then not independent of itself: p is a little too small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wilcoxon

from common.errors import ArtefactError
from common.seeding import derive_seed
from server.report.schema import RunReport
from simulations.values import FILE, SiteValues

FloatArray = NDArray[np.float64]
WHERE = ("own", "all")
RESAMPLES = 2000
ALPHA = 0.05
RIVALS = (
    ("over the averaged student", "student", "fedavg"),
    ("over FedProx", "student", "fedprox"),
    ("over FedBN", "student", "fedbn"),
    ("over the ensemble of local teachers", "student", "feddf"),
    ("over all labels in one place", "student", "centralised"),
    ("over task-agnostic distillation", "student", "task_agnostic"),
    ("over MAE of the site's own images", "student", "local_only_mae"),
    ("over MoCo v3 of the site's own images", "student", "local_only_moco"),
    ("feature terms", "student", "no_features"),
    ("over region recolouring", "student", "recolour"),
    ("over procedural paint", "student", "paint"),
    ("over histogram matching", "student", "histogram"),
    ("over FedDG amplitude", "student", "amplitude"),
    ("over strong augmentation", "student", "augment"),
    ("over random colours", "student", "random_colour"),
)


@dataclass(frozen=True)
class Goal:
    """``better`` minus the mean of those of ``rivals`` that are there is at least ``least``.

    ``worst``: at every site, on its own patients, and not on average.
    """

    what: str
    rivals: tuple[str, ...]
    where: str
    least: float
    better: str = "student"
    worst: bool = False


GOALS = (
    Goal("over local training of the same start, all sites", ("local_only",), "all", 0.05),
    Goal("over local training of the same start, worst site", ("local_only",), "own", -0.01, worst=True),
    Goal("over FedAvg of the same student, own site", ("fedavg",), "own", 0.0),
    Goal("over FedAvg of the same student, all sites", ("fedavg",), "all", 0.0),
    Goal(
        "over task-agnostic distillation, MAE and MoCo v3, on average, all sites",
        ("task_agnostic", "local_only_mae", "local_only_moco"),
        "all",
        0.05,
    ),
    Goal("synthetic images over region recolouring, all sites", ("recolour",), "all", 0.0),
    Goal("synthetic images over strong augmentation, all sites", ("augment",), "all", 0.0),
)


@dataclass(frozen=True)
class SeedValues:
    """Of one run: (model, site that has it) -> tested site -> a value a patient, NaN where there is none."""

    seed: int
    values: Mapping[tuple[str, str], Mapping[str, FloatArray]]

    @classmethod
    def load(cls, run: Path, metric: str = "dice") -> SeedValues:
        """Raises ``ArtefactError`` where a run has no patients' values."""
        sites = sorted(path.parent for path in run.glob(f"sites/*/{FILE}"))
        if not sites:
            raise ArtefactError(f"no patients' values below {run / 'sites'}: simulate the run again")
        columns: dict[tuple[str, str], dict[str, list[FloatArray]]] = {}
        seed = 0
        for folder in sites:
            found = SiteValues.load(folder)
            seed = found.seed
            for one in found.columns:
                if one.metric == metric:
                    values = np.array([np.nan if value is None else value for value in one.values])
                    by_site = columns.setdefault((one.model, one.trained_at), {})
                    by_site.setdefault(found.site, []).append(values)
        return cls(seed, {key: _mean_of_classes(by_site) for key, by_site in columns.items()})

    @property
    def models(self) -> set[str]:
        return {model for model, _ in self.values}

    def differences(self, better: str, worse: Iterable[str], where: str) -> dict[str, FloatArray]:
        """Tested site -> ``better`` minus the mean of ``worse``, a patient each; undefined ones left out.

        Without ``worse`` the value of ``better`` itself.
        """
        rivals = list(worse)
        trainers = sorted({site for model, site in self.values if model == better})
        found: dict[str, FloatArray] = {}
        for tested in sorted({site for by_site in self.values.values() for site in by_site}):
            seen_by = [tested] if where == "own" else trainers
            one = [self._gap(better, rivals, site, tested) for site in seen_by]
            known = [gap for gap in one if gap is not None]
            if known:
                gaps = np.mean(known, axis=0)
                found[tested] = gaps[np.isfinite(gaps)]
        return {site: gaps for site, gaps in found.items() if len(gaps)}

    def _gap(self, better: str, rivals: Sequence[str], trainer: str, tested: str) -> FloatArray | None:
        parts = [self.values.get((model, trainer), {}).get(tested) for model in (better, *rivals)]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        return known[0] - np.mean(known[1:], axis=0) if rivals else known[0]


@dataclass(frozen=True)
class Compared:
    """One difference, over seeds.

    Attributes:
        each: of every seed, in their order.
        ci95: of the mean over seeds.
        p: two-sided, not corrected.
        lowest: the smallest difference of a site, mean over seeds; sites by their names.
    """

    mean: float
    each: list[float]
    ci95: tuple[float, float]
    p: float
    lowest: float


def compare(
    seeds: Sequence[SeedValues], better: str, worse: Sequence[str], where: str, resamples: int = RESAMPLES
) -> Compared | None:
    """None where a seed has not both sides. Without ``worse``: ``better`` itself, of which p says nothing."""
    found = [seed.differences(better, worse, where) for seed in seeds]
    if not found or not all(found):
        return None
    each = [_statistic({s: gaps.mean() for s, gaps in one.items()}, one, where) for one in found]
    draws = [
        _resampled(one, where, derive_seed(seed.seed, "comparison"), resamples)
        for seed, one in zip(seeds, found, strict=True)
    ]
    low, high = np.percentile(np.mean(draws, axis=0), [2.5, 97.5])
    everyone = np.concatenate([gaps for one in found for gaps in one.values()])
    at_sites = [[one[site].mean() for one in found if site in one] for site in sorted(set().union(*found))]
    lowest = min(float(np.mean(means)) for means in at_sites)
    return Compared(float(np.mean(each)), each, (float(low), float(high)), signed_rank(everyone), lowest)


def signed_rank(differences: FloatArray) -> float:
    """Wilcoxon's p, two-sided; 1 where no patient differs."""
    if not np.any(differences):
        return 1.0
    return float(wilcoxon(differences).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): the k-th smallest of m times (m - k + 1), never below one before it."""
    order = sorted(range(len(p)), key=p.__getitem__)
    adjusted, highest = [0.0] * len(p), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - place) * p[index]))
        adjusted[index] = highest
    return adjusted


def comparison_table(
    seeds: Sequence[SeedValues], pairs: Sequence[tuple[str, str, str]], resamples: int = RESAMPLES
) -> list[str]:
    """A row for each of ``pairs`` (title, better, worse) that every seed has; Holm over all of the table."""
    rows = [
        (pair, where, compare(seeds, pair[1], [pair[2]], where, resamples))
        for pair in pairs
        for where in WHERE
    ]
    known = [(pair, where, found) for pair, where, found in rows if found is not None]
    adjusted = holm([found.p for _, _, found in known])
    lines = [
        "| what is compared | difference | tested on | mean (seeds) | 95 % interval | p, Holm | |",
        "|---|---|---|---|---|---|---|",
    ]
    for ((title, better, worse), where, found), p in zip(known, adjusted, strict=True):
        each = f" ({' '.join(f'{value:+.3f}' for value in found.each)})" if len(found.each) > 1 else ""
        interval = f"{found.ci95[0]:+.3f} to {found.ci95[1]:+.3f}"
        mark = "significant" if p < ALPHA else ""
        lines.append(
            f"| {title} | {better} - {worse} | {where} | {found.mean:+.3f}{each} | {interval} "
            f"| {p:.2g} | {mark} |"
        )
    return lines


def goal_lines(seeds: Sequence[SeedValues], resamples: int = RESAMPLES) -> Iterator[str]:
    """``met`` or ``missed`` for each of `GOALS` whose models are there, with the number behind it."""
    present = set.intersection(*(seed.models for seed in seeds))
    for goal in GOALS:
        rivals = [name for name in goal.rivals if name in present]
        found = compare(seeds, goal.better, rivals, goal.where, resamples) if rivals else None
        if found is None:
            continue
        value = round(found.lowest if goal.worst else found.mean, 6) + 0.0  # no -0.000
        verdict = "met" if value >= goal.least else "missed"
        absent = sorted(set(goal.rivals) - set(rivals))
        without = f"; without {', '.join(absent)}" if absent else ""
        interval = "" if goal.worst else f" [{found.ci95[0]:+.3f}, {found.ci95[1]:+.3f}]"
        yield f"- {verdict}: {goal.what}: {value:+.3f}{interval}, wanted {goal.least:+.2f} or more{without}"


def load_seeds(runs: Sequence[tuple[Path, RunReport]]) -> list[SeedValues]:
    """The values of every run, by seed. Raises ``ArtefactError`` where one has none."""
    ordered = sorted(runs, key=lambda run: run[1].run.seed)
    return [SeedValues.load(folder) for folder, _ in ordered]


def _statistic(means: Mapping[str, FloatArray], gaps: Mapping[str, FloatArray], where: str) -> float:
    """From the means of the sites: over sites for ``own``, over patients for ``all``."""
    weights = None if where == "own" else [len(gaps[site]) for site in means]
    return float(np.average(list(means.values()), weights=weights))


def _resampled(gaps: Mapping[str, FloatArray], where: str, seed: int, resamples: int) -> FloatArray:
    """The statistic of ``resamples`` drawings of as many patients, with replacement, within each site.

    The same drawings for every pair of models: `differences` keeps the order of the patients.
    """
    rng = np.random.default_rng(seed)
    drawn = [part[rng.integers(len(part), size=(resamples, len(part)))].mean(1) for part in gaps.values()]
    weights = None if where == "own" else [len(part) for part in gaps.values()]
    return np.asarray(np.average(drawn, axis=0, weights=weights))


def _mean_of_classes(by_site: Mapping[str, Sequence[FloatArray]]) -> dict[str, FloatArray]:
    """Mean over the classes that a patient has a value for; NaN where it has none."""
    found = {}
    for site, columns in by_site.items():
        stacked = np.array(columns)
        known = np.isfinite(stacked)
        total = np.where(known, stacked, 0.0).sum(0)
        found[site] = np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)
    return found
