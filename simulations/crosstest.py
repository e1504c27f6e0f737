"""Every site's models on every site's test patients.

Only a simulation can do this: students never travel between hospitals, and neither do test images. It reads
the sites' folders directly, after the run, and what it finds goes into this machine's report.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from client.evaluation import evaluate_patients, release_metrics
from client.measuring import Forward, opened_models
from client.patients import Patient, Split, of_split
from client.site import Site
from common import progress
from common.adapter import Adapter
from common.guard_api import Metric
from common.plan import RunPlan
from common.seeding import derive_seed
from server.report.schema import BenefitCell

Values = dict[str, dict[str, NDArray[np.float64]]]  # metric -> class -> one value a patient


def cross_test(sites: Sequence[Site], plan: RunPlan, adapter: Adapter) -> list[BenefitCell]:
    """Cells ``tested_on: all``: means over the test patients of every site together."""
    tests = [of_split(site.patients(plan.data, plan.seed), Split.test) for site in sites]
    cells: list[BenefitCell] = []
    progress.stage("testing every model at every site", len(sites))
    teacher: Values | None = None  # one federated teacher for all: tested once
    for site in sites:
        with opened_models(site, plan, adapter) as models:
            for name, make_ready in models.items():
                if name == "teacher" and teacher is not None:
                    values = teacher
                else:
                    values = _everywhere(make_ready(), tests, plan)
                teacher = values if name == "teacher" else teacher
                seed = derive_seed(plan.seed, site.name, "bootstrap", "all")
                found = release_metrics(name, values, plan.evaluation, site.policy, seed)
                cells += [to_cell(site.name, "all", metric) for metric in found]
        progress.step(f"{site.name}: {len(models)} models")
    progress.end()
    return cells


def _everywhere(forward: Forward, tests: Sequence[Sequence[Patient]], plan: RunPlan) -> Values:
    parts = [evaluate_patients(forward, test, plan.data, plan.evaluation) for test in tests if test]
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
