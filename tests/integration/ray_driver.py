"""A run on Ray with fake sites, in a process of its own: ``ray_driver RUN SITES``.

Ray leaves open files behind in the process that starts it, which pytest would report as ours. Exits with
the run's code, and with 99 if a process is alive when `run_ray` has returned.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import server.phases
import server.planning
from common.errors import WardroundError
from simulations import ray_engine
from tests.integration import fake_guard

LEFT_BEHIND = 99


def companions(run_dir: Path) -> list[str]:
    """Names of the other live processes that were started for this run, whoever their parent is now."""
    mark = f"WARDROUND_RUN={run_dir.resolve()}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append((entry / "comm").read_text().strip())
            except OSError:
                continue  # it ended while we looked, or is another user's
    return sorted(found)


def main(run_dir: Path, sites_dir: Path) -> int:
    server.planning.first_adapters = server.phases.first_adapters = fake_guard.first_adapters
    server.planning.model_digests = lambda _: {"fake": fake_guard.BASE}
    ray_engine.client_app = fake_guard.FakeSites()
    code = 0
    try:
        ray_engine.run_ray(run_dir, sites_dir)
    except WardroundError as error:
        code = error.exit_code
    if alive := companions(run_dir):
        sys.stderr.write(f"still alive: {alive}\n")
        return LEFT_BEHIND
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
