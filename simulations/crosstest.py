"""Every site's models on every site's test patients.

Only a simulation can do this: students never travel between hospitals, and neither do test images. It reads
the sites' folders directly, after the run, and what it finds goes into this machine's report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from client.evaluation import evaluate_patients, release_metrics
from client.measuring import Forward, model_path, opened_models
from client.patients import Patient, Split, of_split
from client.publishing import TEACHER
from client.site import Site
from common import progress
from common.adapter import Adapter
from common.canonical import sha256_of_file
from common.guard_api import Metric
from common.plan import RunPlan
from common.seeding import derive_seed
from server.report.schema import BenefitCell
from simulations.values import SiteValues, Values, columns_of

PerSite: TypeAlias = Mapping[str, Values]  # tested site -> values of its test patients
Tests: TypeAlias = Mapping[str, Sequence[Patient]]


@dataclass
class CrossTest:
    """What came of it.

    Attributes:
        cells: ``tested_on: all``, means over the test patients of every site together; and ``own`` of the
            models that the sites did not measure themselves.
        values: tested site -> its patients' values of every model.
    """

    cells: list[BenefitCell]
    values: dict[str, SiteValues]


@dataclass
class _Tested:
    """Tests each set of weights once, however many sites have it."""

    tests: Tests
    plan: RunPlan
    known: dict[str, PerSite] = field(default_factory=dict)

    def everywhere(self, weights: str, make_ready: Callable[[], Forward]) -> PerSite:
        if weights not in self.known:
            forward = make_ready()
            self.known[weights] = {
                name: evaluate_patients(forward, test, self.plan.data, self.plan.evaluation)
                for name, test in self.tests.items()
                if test
            }
        return self.known[weights]


def cross_test(
    sites: Sequence[Site], plan: RunPlan, adapter: Adapter, beside: Sequence[str] = ()
) -> CrossTest:
    """Every model of every site on every site's test patients.

    Args:
        beside: models in the sites' folders that the plan does not name, and no site has measured.
    """
    tests = {site.name: of_split(site.patients(plan.data, plan.seed), Split.test) for site in sites}
    found = CrossTest([], {name: SiteValues(name, plan.run_id, plan.seed, []) for name in tests})
    tested = _Tested(tests, plan)
    progress.stage("testing every model at every site", len(sites))
    for site in sites:
        with opened_models(site, plan, adapter, beside) as models:
            for name, make_ready in models.items():
                # One federated teacher for all; of the rest, the same file is the same model.
                weights = TEACHER if name == TEACHER else sha256_of_file(model_path(site, name))
                values = tested.everywhere(weights, make_ready)
                _take(found, site, plan, name, values)
                if name in beside and site.name in values:
                    seed = site.draw_seed(plan, "bootstrap")
                    own = release_metrics(name, values[site.name], plan.evaluation, site.policy, seed)
                    found.cells += [to_cell(site.name, "own", metric) for metric in own]
        progress.step(f"{site.name}: {len(models)} models")
    progress.end()
    return found


def _take(found: CrossTest, site: Site, plan: RunPlan, model: str, values: PerSite) -> None:
    for tested, mine in values.items():
        found.values[tested].columns.extend(columns_of(model, site.name, mine))
    seed = derive_seed(plan.seed, site.name, "bootstrap", "all")
    released = release_metrics(model, _together(values), plan.evaluation, site.policy, seed)
    found.cells += [to_cell(site.name, "all", metric) for metric in released]


def _together(values: PerSite) -> Values:
    parts = list(values.values())
    return {
        metric: {name: np.concatenate([part[metric][name] for part in parts]) for name in by_class}
        for metric, by_class in parts[0].items()
    }


def to_cell(site: str, tested_on: str, metric: Metric) -> BenefitCell:
    return BenefitCell(
        site=site,
        model=metric.model,
        tested_on=tested_on,
        metric=metric.metric,
        class_name=metric.class_name,
        value=metric.value,
        ci95=None if metric.ci95 is None else list(metric.ci95),
        patients=metric.patients,
        reason=metric.reason,
        noise_scale=metric.noise_scale,
    )
