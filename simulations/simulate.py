"""``wardround simulate``: prepare the hospitals, run the real apps, test across sites, write the report."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from client.holdout import with_holdout
from common.config import save_run_config, save_site
from common.durable import write_atomic
from common.errors import DataError
from common.privacy.budget import Caps
from common.privacy.journal import LEDGER
from common.privacy.ledger import Ledger
from common.privacy.policy import POLICY, signature_path
from common.privacy.report import write_page
from common.privacy.report.record import Inquiry
from common.privacy.witness import read_heads
from common.privacy_rules import declared_patients, declared_test_patients
from common.recipe import Consent, Engine, Recipe, SiteConfig, SiteFile
from server.outcome import RunOutcome
from server.report import REPORT_JSON, rebuild
from server.witness import HEADS_FILE
from simulations.assemble import assemble_report
from simulations.hospitals import cut_sites
from simulations.phantoms import write_site

# Recomputed for each page: 5 s of CPU at 80 steps and 20 s at 300, once for sites of one plan. A longer
# ledger is left to `wardround privacy page`, which recomputes any.
VERIFIED_STEPS = 400

OFFICER_KEY = "officer.key.pub"  # in a simulated site's folder


def simulate(recipe: Recipe, out: Path, resume: bool) -> Path:
    """Run ``recipe`` in the folder ``out`` and return it; with ``resume`` go on where a run there stopped.

    A resumed run ends with the same adapters as an uninterrupted one: every seed is derived from the
    recipe's, and the state is saved after each round.

    Raises:
        ConfigError, DataError: before anything is trained.
        FederationError, DeadlinePassed: the run ended early; its state is kept.
        ArtefactError: the state in ``out`` belongs to another plan, or cannot be written.
    """
    started = (datetime.now(UTC), time.perf_counter(), _cpu_seconds())
    torch.set_num_threads(recipe.run.threads)
    sites = out / "sites"
    if not (sites / ".complete").exists():
        shutil.rmtree(sites, ignore_errors=True)  # a preparation that was cut off is made again
        save_run_config(recipe, out / "config.yaml")
        prepare_sites(recipe, sites)
        (sites / ".complete").touch()
    _engine(recipe.run.engine)(out, sites)
    outcome = RunOutcome.load(out / "state")
    report = assemble_report(recipe, out, outcome, (started[0], started[1], started[2]))
    write_atomic(out / REPORT_JSON, report.to_json().encode())
    rebuild(out)
    kept = out / "state" / HEADS_FILE
    heads = tuple(read_heads(kept)) if kept.exists() else ()
    for site in report.sites:
        write_page(sites / site.id, Inquiry(witnesses=heads, most_steps=VERIFIED_STEPS))
    return out


def _engine(engine: Engine) -> Callable[[Path, Path], None]:
    """Run folder, sites' folder -> nothing: the files in the run folder are the result."""
    if engine == Engine.ray:
        from simulations.ray_engine import run_ray

        return run_ray
    from simulations.loopback import run_loopback

    return run_loopback


def prepare_sites(recipe: Recipe, folder: Path) -> list[str]:
    """One folder a hospital below ``folder``, with its data manifest and its own ``site.yaml``.

    Raises:
        DataError: a manifest that is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cut = {path.parent.parent.name: path for path in cut_sites(recipe, folder)}
    configs = {site.name: site for site in recipe.sites} or {name: SiteConfig(name=name) for name in cut}
    for name, site in configs.items():
        home = folder / name
        home.mkdir(exist_ok=True)
        manifest = Path("data/manifest.csv")
        if site.phantom is not None:
            write_site(site.phantom, home / "data", recipe.run.seed, name)
        elif site.manifest is not None:
            manifest = Path(site.manifest).resolve()
            if not manifest.is_file():
                raise DataError(f"site {name}: {manifest} does not exist; mend sites.{name}.manifest")
        said = SiteFile(name, str(manifest), site.student, site.adapter, site.rank, recipe.policy)
        said = replace(said, consent=Consent.policy)  # nobody sits at a simulated hospital
        if recipe.privacy.asked:
            trained = declared_patients(site, recipe.cohort)
            said = replace(said, patients=trained, test_patients=declared_test_patients(site))
            _open_ledger(home, name, recipe.privacy.delta)
        if site.signed_policy is not None and site.officer_key is not None:
            said = replace(said, officer_key=_take_policy(home, site.signed_policy, site.officer_key))
        save_site(with_holdout(said, recipe.audit.holdout), home / "site.yaml")
    return sorted(configs)


def _take_policy(home: Path, policy: str, officer_key: str) -> str:
    """Put the officer's files into the site's folder, for its guard to check; the key's name there."""
    shutil.copyfile(policy, home / POLICY)
    signature = signature_path(Path(policy))
    if signature.exists():
        shutil.copyfile(signature, signature_path(home / POLICY))
    shutil.copyfile(officer_key, home / OFFICER_KEY)
    return OFFICER_KEY


def _open_ledger(home: Path, site: str, delta: float) -> None:
    """The site's ledger with keys of its own, unless it has one: a ledger is never started again."""
    if not (home / LEDGER).exists():
        Ledger.create(home, site, Caps(delta))


def _cpu_seconds() -> float:
    """Processor time of this process and its finished children, seconds."""
    return sum(os.times()[:4])
