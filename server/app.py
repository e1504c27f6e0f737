"""The coordinator: Flower's ServerApp. It finds the run's folder and recipe, and walks the phases."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.config import load_run_config
from common.errors import ConfigError, UsageError
from common.shared_student_rules import deployment_faults
from server.collect import Collector
from server.events import EventLog
from server.phases import run_walk

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run or resume the walk in the run's folder: ``run-dir`` of the run's configuration, or WARDROUND_RUN.

    Raises every `WardroundError` that ends a run; its exit code is the run's outcome. A deployed run of a
    recipe that only a simulation can serve is a ``ConfigError``, before any site is asked.
    """
    run_dir = run_folder(context)
    recipe = load_run_config(run_dir / "config.yaml")
    torch.set_num_threads(recipe.run.threads)  # aggregation is reproducible for one number of threads
    events = EventLog(run_dir / "events.jsonl")
    # Our own engines say how many sites they can work on at a time; Flower's deployment grid takes them all.
    window = getattr(grid, "window", None)
    if window is None and (faults := [str(fault) for fault in deployment_faults(recipe)]):
        raise ConfigError("this recipe cannot run between hospitals", faults)
    run_walk(Collector(grid, events, window), recipe, run_dir)


def run_folder(context: Context) -> Path:
    folder = context.run_config.get("run-dir") or os.environ.get("WARDROUND_RUN")
    if not folder:
        raise UsageError("no run folder: give the run's configuration run-dir=FOLDER, or set WARDROUND_RUN")
    return Path(str(folder))
