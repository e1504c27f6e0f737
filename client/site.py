"""One hospital as its own files describe it; nothing here comes from the server."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from client.data import load_patients
from client.holdout import leave_out
from client.patients import Patient
from common.canonical import canonical_json
from common.config import load_site
from common.errors import DataError, PolicyRefusal
from common.plan import RunPlan, Variant, rebuild
from common.recipe import Consent, DataConfig, Holdout, PolicyConfig, TeacherConfig
from common.seeding import derive_seed
from common.tuning.presets import rank_of, site_teacher


@dataclass(frozen=True)
class Site:
    """A folder with ``site.yaml``; what the site produces is written below it and stays there."""

    name: str
    folder: Path
    manifest: Path
    student: str | None
    policy: PolicyConfig
    adapter: str | None = None
    rank: int | None = None
    declared: int | None = None  # labelled training patients, as the site says publicly
    declared_test: int | None = None  # labelled test patients, the same
    officer_key: Path | None = None  # of who signs policy.json
    holdout: Holdout = Holdout.none
    consent: Consent | None = None

    @classmethod
    def open(cls, folder: Path) -> Site:
        """Raises ``ConfigError`` listing every fault of ``site.yaml``."""
        given = load_site(folder / "site.yaml")
        officer = None if given.officer_key is None else folder / given.officer_key
        return cls(
            name=given.name,
            folder=folder,
            manifest=folder / given.manifest,
            student=given.student,
            policy=given.policy,
            adapter=given.adapter,
            rank=given.rank,
            declared=given.patients,
            declared_test=given.test_patients,
            officer_key=officer,
            holdout=given.holdout,
            consent=given.consent,
        )

    def teacher(self, plan: RunPlan) -> TeacherConfig:
        """The settings by which this site trains: the plan's, with the site's own adapter and rank."""
        return site_teacher(plan.teacher, self.adapter, self.rank)

    def variant(self, plan: RunPlan) -> Variant:
        """The variant that this site trains. Raises ``PolicyRefusal`` if the plan lists none such."""
        settings = self.teacher(plan)
        found = plan.variant(settings.adapter, rank_of(settings))
        if found is None:
            raise PolicyRefusal(
                f"this site trains {settings.adapter} of rank {rank_of(settings)}, which the plan does not "
                "list: change site.yaml, or ask for it in the recipe (sites.NAME.adapter, sites.NAME.rank)",
                field="adapter",
            )
        return found

    def patients(self, data: DataConfig, seed: int) -> list[Patient]:
        """The site's patients as the plan reads them, loaded once a process. Raises ``DataError``.

        Those whom the site's coins leave out of training are in the validation split (`client.holdout`).
        """
        split_seed = derive_seed(seed, self.name, "split")
        patients = _patients(self.manifest, canonical_json(_as_dict(data)), split_seed)
        return patients if self.holdout is Holdout.none else leave_out(self.folder, patients)

    def accept(self, plan: RunPlan) -> None:
        (self.folder / "plan.json").write_text(plan.to_json())

    def accepted_plan(self, digest: str) -> RunPlan:
        """The plan this site agreed to. Raises ``PolicyRefusal`` if ``digest`` names another, or none was."""
        path = self.folder / "plan.json"
        plan = RunPlan.from_json(path.read_text()) if path.exists() else None
        if plan is None or plan.digest != digest:
            raise PolicyRefusal("this plan was never agreed to here: send query.propose first", field="plan")
        return plan

    def draw_seed(self, plan: RunPlan, *path: str | int) -> int:
        return derive_seed(plan.seed, self.name, *path)


def _as_dict(data: DataConfig) -> object:
    from dataclasses import asdict

    return asdict(data)


def forget_patients() -> None:
    """Drop every site's images that this process has read."""
    _patients.cache_clear()


@lru_cache(maxsize=16)
def _patients(manifest: Path, data: str, seed: int) -> list[Patient]:
    if not manifest.exists():
        raise DataError(f"{manifest} is missing: name the site's manifest in site.yaml")
    return load_patients(manifest, rebuild(DataConfig, json.loads(data)), seed)
