"""Gather a finished simulation's files into one ``report.json``."""

from __future__ import annotations

import json
import os
import platform
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from client.egress import RECEIPTS
from client.guard import count_patients
from client.measuring import model_path
from client.site import Site
from common import checkpoints
from common.adapter import Adapter
from common.canonical import sha256_of_file
from common.config import recipe_digest
from common.errors import ArtefactError
from common.guard_api import StudentNote
from common.names import POOLED_BASELINES
from common.plan import RunPlan
from common.recipe import Recipe
from common.teacher import resident_teacher
from server.outcome import RunOutcome
from server.phases import TEACHER_FILE
from server.report.schema import (
    EgressEntry,
    RunEntry,
    RunReport,
    SiteEntry,
    StudentEntry,
    SyntheticEntry,
    TeacherEntry,
)
from simulations.baselines import train_pooled
from simulations.crosstest import cross_test, to_cell
from simulations.pictures import site_pictures
from simulations.privacy_record import privacy_entry

PACKAGES = ("wardround", "torch", "flwr", "peft", "diffusers", "monai", "transformers")


def assemble_report(
    recipe: Recipe, out: Path, outcome: RunOutcome, started: tuple[datetime, float, float]
) -> RunReport:
    """Train what only a simulation can, test across sites, draw the pictures, put every number in its place.

    Each site's patients' own values are left in its folder (`simulations.values`).

    Args:
        started: the moment, ``time.perf_counter()`` and processor seconds when this process began the run.
    """
    sites = [Site.open(out / "sites" / name) for name in sorted(outcome.sites)]
    schooled = [site for site in sites if site.name in outcome.notes]
    plan = sites[0].accepted_plan(outcome.plan_sha256)
    adapter = _teacher_adapter(out / TEACHER_FILE, outcome, plan)
    own = [
        to_cell(name, "own", metric)
        for name, answer in sorted(outcome.metrics.items())
        for metric in answer.metrics
    ]
    pooled = [name for name in recipe.baselines if name in POOLED_BASELINES]
    train_pooled(pooled, schooled, plan)
    crossed = cross_test(schooled, plan, adapter, pooled)
    for site in schooled:
        crossed.values[site.name].save(site.folder)
    return RunReport(
        sites=[_site_entry(site, outcome, plan) for site in sites],
        teacher=_teacher_entry(plan, adapter),
        rounds=outcome.rounds,
        benefit=[*own, *crossed.cells],
        students={site.name: _student_entry(site, outcome.notes[site.name]) for site in schooled},
        synthetic={name: _synthetic_entry(note) for name, note in sorted(outcome.notes.items())},
        privacy={site.name: privacy_entry(site, plan) for site in sites},
        egress=_receipts(out / "sites"),
        pictures=[picture for site in schooled for picture in site_pictures(site, plan, adapter)],
        run=_run_entry(recipe, outcome, started),  # last: its times include all of the above
    )


def _run_entry(recipe: Recipe, outcome: RunOutcome, started: tuple[datetime, float, float]) -> RunEntry:
    return RunEntry(
        id=outcome.run_id,
        recipe=recipe.name,
        seed=recipe.run.seed,
        engine=str(recipe.run.engine),
        started=started[0].isoformat(timespec="seconds"),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        wall_s=round(time.perf_counter() - started[1], 1),
        cpu_s=round(sum(os.times()[:4]) - started[2], 1),
        versions={"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        config_sha256=recipe_digest(recipe),
        enforced=False,  # a simulation's guard shares its process with the courier
    )


def _teacher_adapter(path: Path, outcome: RunOutcome, plan: RunPlan) -> Adapter:
    adapter = Adapter.load(path)
    if adapter.digest == outcome.adapter_sha256:
        return adapter
    base = plan.models[plan.teacher.name]
    wrong = "is not the adapter that this run ended with"
    own = plan.variants[0]
    if adapter.base_sha256 != base:
        wrong = f"belongs to base {adapter.base_sha256[:12]}, this run's teacher is {base[:12]}"
    elif (adapter.preset, adapter.rank) != (own.preset, own.rank):
        wrong = f"is {adapter.preset} of rank {adapter.rank}, this run's is {own.preset} of rank {own.rank}"
    raise ArtefactError(f"{path} {wrong}: remove it and run again with --resume, which writes the run's own")


def _site_entry(site: Site, outcome: RunOutcome, plan: RunPlan) -> SiteEntry:
    """Of a site that did not tell its counts, the simulation counts the files itself."""
    answer, note = outcome.metrics.get(site.name), outcome.notes.get(site.name)
    told = answer.counts if answer else None
    counts = told or count_patients(site.patients(plan.data, plan.seed))
    return SiteEntry(
        id=site.name,
        patients=counts.patients,
        images=counts.images,
        train=counts.train,
        val=counts.val,
        test=counts.test,
        student="" if note is None else note.name,
    )


def _teacher_entry(plan: RunPlan, adapter: Adapter) -> TeacherEntry:
    teacher = resident_teacher(plan.teacher, plan.data)
    trainable = sum(parameter.numel() for parameter in teacher.slots.trainable().values())
    return TeacherEntry(
        name=plan.teacher.name,
        params=int(checkpoints.card(plan.teacher.name)["params"]),
        trainable=trainable,
        base_sha256=adapter.base_sha256,
        adapter_sha256=adapter.digest,
    )


def _student_entry(site: Site, note: StudentNote) -> StudentEntry:
    """Where the site withheld the digest, the simulation takes it from the site's own file."""
    digest = note.sha256 or sha256_of_file(model_path(site, "student"))
    return StudentEntry(note.name, note.params, digest, note.latency_ms, note.teacher_latency_ms, note.start)


def _synthetic_entry(note: StudentNote) -> SyntheticEntry:
    dropped = (note.dropped_inconsistent, note.dropped_copy, note.copy_rate)
    return SyntheticEntry(note.generated, note.kept, *dropped)


def _receipts(sites: Path) -> list[EgressEntry]:
    """Every receipt of every site, those that refused included, in the order in which the payloads left."""
    entries = []
    for path in sorted(sites.glob(f"*/{RECEIPTS}")):
        for line in path.read_text().splitlines():
            value = json.loads(line)
            name = value["name"]
            entries.append(
                EgressEntry(
                    site=value["site"],
                    round=value["round"],
                    name=name,
                    bytes=value["bytes"],
                    sha256=value["sha256"],
                    mechanism=value["mechanism"],
                    epsilon_after=value["epsilon_after"],
                )
            )
    return entries
