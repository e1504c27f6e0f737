"""A whole run with fake guards: the real ServerApp and ClientApp, real messages, real state."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import simulations.loopback
from common.adapter import Adapter, AdapterUpdate
from common.config import save_run_config
from common.precision import unpack
from common.recipe import (
    AggregationConfig,
    GeneratorConfig,
    GeneratorScope,
    PhantomConfig,
    Recipe,
    RunConfig,
    SiteConfig,
    TeacherConfig,
)
from server.outcome import RunOutcome
from tests.integration import fake_guard

SITES = ("a", "b", "c")
Behaviour = dict[str, dict[str, str]]


def recipe(scope: GeneratorScope = GeneratorScope.style, sites: tuple[str, ...] = SITES) -> Recipe:
    return Recipe(
        name="walk",
        run=RunConfig(seed=5, rounds=3, min_sites=2, site_deadline_s=60.0),
        sites=[SiteConfig(name=site, phantom=PhantomConfig()) for site in sites],
        teacher=TeacherConfig(rank=2),
        aggregation=AggregationConfig(max_rank=8),
        generator=GeneratorConfig(scope=scope, rounds=2, rank=2),
    )


def next_adapter(sent: Adapter, update: AdapterUpdate) -> Adapter:
    """What a federation of one site sends next: ``sent``, moved by the site's ``update``."""
    before = unpack(sent)
    trained = before.advanced(unpack(update.adapter))
    return replace(before, tensors={**before.tensors, **trained.tensors})


class Consortium:
    """A run's folder and its sites' folders; ``go`` is a new process' view of them."""

    def __init__(self, root: Path, settings: Recipe, behaviour: Behaviour | None = None) -> None:
        self.run_dir, self.sites_dir = root / "run", root / "sites"
        names = [site.name for site in settings.sites]
        fake_guard.make_sites(self.sites_dir, {name: (behaviour or {}).get(name, {}) for name in names})
        save_run_config(settings, self.run_dir / "config.yaml")

    def behave(self, site: str, wrong: dict[str, str]) -> None:
        (self.sites_dir / site / "behaviour.json").write_text(json.dumps(wrong))

    def go(self) -> RunOutcome:
        simulations.loopback.run_loopback(self.run_dir, self.sites_dir)
        return RunOutcome.load(self.run_dir / "state")

    def events(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in (self.run_dir / "events.jsonl").read_text().splitlines()]


def rejected(outcome: RunOutcome, stage: str, index: int = 0) -> dict[str, str]:
    record = next(r for r in outcome.rounds if r.stage == stage and r.index == index)
    return {rejection.site: rejection.reason for rejection in record.rejected}


def answered(outcome: RunOutcome, stage: str, index: int = 0) -> list[str]:
    return next(r for r in outcome.rounds if r.stage == stage and r.index == index).sites


@pytest.fixture(autouse=True)
def fake_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.planning.first_adapters", fake_guard.first_adapters)
    monkeypatch.setattr("server.phases.first_adapters", fake_guard.first_adapters)
    # A file that is saved during a test run would otherwise be another plan, and refuse a resume.
    monkeypatch.setattr("server.planning.code_sha256", lambda: "c0" * 32)
    monkeypatch.setattr("server.planning.model_digests", lambda _: {"fake": fake_guard.BASE})
    monkeypatch.setattr("simulations.loopback.client_app", fake_guard.FakeSites())
