"""Every site's patients in one place: what benchmarks on images train on together and test on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from client.evaluation import Forward, foreground
from client.patients import Patient, Sample, Split, of_split
from client.site import Site
from common.plan import RunPlan
from common.recipe import Recipe, SiteConfig
from server.planning import build_plan
from simulations.simulate import prepare_sites


@dataclass(frozen=True)
class Pool:
    """One recipe with one seed, its sites cut and their images read.

    Attributes:
        recipe: names a manifest for every site, wherever its images came from: another run of it, with
            other settings, has the same patients and reads them no second time.
        train: labelled training patients of all sites.
        tests: site -> its test patients.
    """

    recipe: Recipe
    plan: RunPlan
    train: list[Patient]
    tests: dict[str, list[Patient]]

    @classmethod
    def prepare(cls, recipe: Recipe, folder: Path) -> Pool:
        """Cut the sites into ``folder``, which the pool's recipe goes on pointing into.

        Raises:
            ConfigError, DataError: as `prepare_sites` does.
        """
        opened = {name: Site.open(folder / name) for name in prepare_sites(recipe, folder)}
        asked = {site.name: site for site in recipe.sites}
        sites = [
            replace(asked.get(name, SiteConfig(name)), manifest=str(site.manifest), cut=None, phantom=None)
            for name, site in opened.items()
        ]
        plan = build_plan(recipe, "pool")
        patients = {name: site.patients(plan.data, plan.seed) for name, site in opened.items()}
        return cls(
            recipe=replace(recipe, cohort=None, sites=sites),
            plan=plan,
            train=[p for found in patients.values() for p in of_split(found, Split.train) if p.labelled],
            tests={name: of_split(found, Split.test) for name, found in patients.items()},
        )

    def dice(self, forward: Forward) -> dict[str, float]:
        """Mean Dice over the test patients: ``all`` of them, and each ``site NAME``'s and ``group NAME``'s.

        ``all`` is the report's figure for a model tested on all sites: every patient counts once.
        """
        return {key: float(np.mean(found)) for key, found in sorted(self.each(forward).items())}

    def each(self, forward: Forward) -> dict[str, list[float]]:
        """The Dice of every test patient behind `dice`'s means, the same patients in the same order."""
        values: dict[str, list[float]] = {}
        for site, patients in self.tests.items():
            for patient in patients:
                found = [
                    self._overlap(forward, sample) for sample in patient.samples if sample.mask is not None
                ]
                for key in ("all", f"site {site}", f"group {patient.samples[0].group or site}"):
                    values.setdefault(key, []).append(float(np.mean(found)))
        return values

    def _overlap(self, forward: Forward, sample: Sample) -> float:
        """Mean Dice over the classes of one image; 1 where a class is absent and none was found."""
        assert sample.mask is not None
        found = foreground(forward, sample, self.plan.data, self.plan.evaluation.overlap)
        truth = sample.mask.bool()
        both, total = (found & truth).sum((1, 2)), found.sum((1, 2)) + truth.sum((1, 2))
        return float(torch.where(total > 0, 2 * both / total.clamp(min=1), 1.0).mean())
