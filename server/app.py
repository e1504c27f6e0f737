"""The coordinator: Flower's ServerApp. It finds the run's folder and recipe, and walks the phases."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.config import load_run_config
from common.errors import ConfigError, UsageError
from common.shared_student_rules import deployment_faults
from server.approvals import ask_sites
from server.collect import Collector
from server.ending import told_in
from server.events import EventLog
from server.phases import run_walk
from server.submission import Submission

MODES = ("run", "ask")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run or resume the walk in the run's folder: ``run-dir`` of the run's configuration, or WARDROUND_RUN.

    With ``mode="ask"`` in that configuration the sites are only asked for their approval of the plan that
    was submitted there (`server.approvals`).

    Raises every `WardroundError` that ends a run; its exit code is the run's outcome. A deployed run that was
    not submitted, or of a recipe that only a simulation can serve, is a ``ConfigError``, before any site is
    asked.
    """
    run_dir = run_folder(context)
    # Our own engines say how many sites they can work on at a time; Flower's deployment grid takes them all.
    window = getattr(grid, "window", None)
    with told_in(run_dir) if window is None else nullcontext():
        _work(grid, context, run_dir, window)


def _work(grid: Grid, context: Context, run_dir: Path, window: int | None) -> None:
    recipe, job = load_run_config(run_dir / "config.yaml"), Submission.load(run_dir)
    torch.set_num_threads(recipe.run.threads)  # aggregation is reproducible for one number of threads
    mode = str(context.run_config.get("mode") or MODES[0])
    if mode not in MODES:
        raise UsageError(f"mode={mode!r}: choose from {', '.join(MODES)}")
    if window is None and (faults := [str(fault) for fault in deployment_faults(recipe)]):
        raise ConfigError("this recipe cannot run between hospitals", faults)
    if job is None and (window is None or mode == "ask"):
        raise ConfigError(f"no job was submitted in {run_dir}: wardround consortium submit makes one")
    keys, unseal = (None, None) if job is None else (job.keys, job.unseal)
    collector = Collector(grid, EventLog(run_dir / "events.jsonl"), window, keys, unseal)
    if mode == "ask" and job is not None:
        ask_sites(collector, recipe, job)
    else:
        run_walk(collector, recipe, run_dir, job)


def run_folder(context: Context) -> Path:
    folder = context.run_config.get("run-dir") or os.environ.get("WARDROUND_RUN")
    if not folder:
        raise UsageError("no run folder: give the run's configuration run-dir=FOLDER, or set WARDROUND_RUN")
    return Path(str(folder))
