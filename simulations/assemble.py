"""Gather a finished simulation's files into one ``report.json``."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from client.site import Site
from common import checkpoints
from common.adapter import Adapter
from common.config import recipe_digest
from common.guard_api import StudentNote
from common.plan import RunPlan
from common.recipe import Recipe
from common.teacher import resident_teacher
from server.outcome import RunOutcome
from server.report.schema import (
    EgressEntry,
    PrivacyEntry,
    PrivacyStage,
    RunEntry,
    RunReport,
    SiteEntry,
    StudentEntry,
    SyntheticEntry,
    TeacherEntry,
)
from simulations.crosstest import cross_test, to_cell
from simulations.pictures import site_pictures

PACKAGES = ("wardround", "torch", "flwr", "peft", "diffusers", "monai", "transformers")


def assemble_report(
    recipe: Recipe, out: Path, outcome: RunOutcome, started: tuple[datetime, float, float]
) -> RunReport:
    """Test across sites, draw the pictures and put every number in its place.

    Args:
        started: the moment, ``time.perf_counter()`` and processor seconds when this process began the run.
    """
    sites = [Site.open(out / "sites" / name) for name in sorted(outcome.notes)]
    plan = sites[0].accepted_plan(outcome.plan_sha256)
    adapter = Adapter.load(out / "teacher" / "adapter.safetensors")
    own = [
        to_cell(name, "own", metric)
        for name, answer in sorted(outcome.metrics.items())
        for metric in answer.metrics
    ]
    return RunReport(
        sites=_site_entries(outcome),
        teacher=_teacher_entry(plan, adapter),
        rounds=outcome.rounds,
        benefit=[*own, *cross_test(sites, plan, adapter)],
        students={name: _student_entry(note) for name, note in sorted(outcome.notes.items())},
        synthetic={name: _synthetic_entry(note) for name, note in sorted(outcome.notes.items())},
        privacy={site.name: _no_guarantee(plan) for site in sites},
        egress=_receipts(sites),
        pictures=[picture for site in sites for picture in site_pictures(site, plan, adapter)],
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


def _site_entries(outcome: RunOutcome) -> list[SiteEntry]:
    entries = []
    for name, answer in sorted(outcome.metrics.items()):
        counts, note = answer.counts, outcome.notes.get(name)
        entries.append(
            SiteEntry(
                id=name,
                patients=counts.patients,
                images=counts.images,
                train=counts.train,
                val=counts.val,
                test=counts.test,
                student="" if note is None else note.name,
            )
        )
    return entries


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


def _student_entry(note: StudentNote) -> StudentEntry:
    return StudentEntry(note.name, note.params, note.sha256, note.latency_ms, note.teacher_latency_ms)


def _synthetic_entry(note: StudentNote) -> SyntheticEntry:
    return SyntheticEntry(note.generated, note.kept, note.dropped_inconsistent)


def _no_guarantee(plan: RunPlan) -> PrivacyEntry:
    """No differential privacy in this version (a recipe that asks for it is refused), so no figure."""
    return PrivacyEntry(stages=[PrivacyStage(str(stage), "none") for stage in plan.stages])


def _receipts(sites: Sequence[Site]) -> list[EgressEntry]:
    """Every receipt of every site, in the order in which the payloads left."""
    entries = []
    for site in sites:
        for line in (site.folder / "receipts.jsonl").read_text().splitlines():
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
