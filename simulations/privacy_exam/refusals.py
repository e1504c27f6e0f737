"""Items 21 and 26: what a site has opened before it says no, and what its no gives away."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from scipy import stats

from client.account import privacy_plan
from client.app import app as courier
from common import wire
from common.plan import RunPlan, Stage
from simulations.loopback import FIRST_NODE_ID, LoopbackGrid, environment, task_identity
from simulations.privacy_exam.hospital import (
    DECLARED,
    Office,
    Records,
    agreed,
    forget_images,
    make_home,
    order,
    private_plan,
    start,
    without_patient,
)
from simulations.privacy_exam.verdict import Verdict

ROOT = Path(__file__).resolve().parents[2]
ASKED = "asked.json"
# For each folder: does the site agree, its refusal, and how many files of its data Python opened.
WATCHED = """
import json, sys
from pathlib import Path
opened = []
sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
from client.guard import Guard
from client.site import Site
from common.plan import Round, RunPlan, Stage
for home in map(Path, sys.argv[1:]):
    plan = RunPlan.from_json((home / "asked.json").read_text())
    opened.clear()
    answer = Guard(Site.open(home)).propose(plan, Round(plan.digest, Stage.propose, 0, 60.0, "nonce"))
    data = [path for path in opened if home / "data" in Path(path).parents]
    print(json.dumps([answer.agrees, answer.code, answer.field, len(data)]))
"""


def item_21() -> Verdict:
    """Plans over each cap, in a process whose openings of files are all seen; one site has no data at all."""
    plan = private_plan()
    once = privacy_plan(plan.privacy, DECLARED).epsilon()
    caps: dict[str, tuple[dict[str, float], int]] = {
        "run": ({"max_epsilon_per_run": 0.9 * once}, 0),
        "total": ({"max_epsilon_total": 0.9 * once}, 0),
        "spent before": ({"max_epsilon_total": 1.1 * once}, plan.rounds),
        "no data": ({"max_epsilon_per_run": 0.9 * once}, 0),
        "allowed": ({}, 0),
    }
    with tempfile.TemporaryDirectory() as name:
        homes = [_with_caps(Path(name) / case.replace(" ", "-"), plan, *cap) for case, cap in caps.items()]
        shutil.rmtree(homes[3] / "data")
        command = [sys.executable, "-c", WATCHED, *map(str, homes)]
        variables = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=True)
    *refused, allowed = [json.loads(line) for line in run.stdout.splitlines()]
    kinds = [tuple(answer[:3]) for answer in refused]
    per_run, in_all = (False, "REFUSED_POLICY", "max_epsilon_per_run"), (False, "REFUSED_BUDGET", "")
    opened = [answer[3] for answer in refused]
    figure = (
        f"{kinds.count(per_run) + kinds.count(in_all)} of {len(kinds)} refused, {sum(opened)} data files "
        f"opened; a plan that is allowed opens {allowed[3]}"
    )
    passed = kinds == [per_run, in_all, in_all, per_run] and not any(opened)
    passed = passed and allowed[0] and allowed[3] > 0
    return Verdict("21", "plan over a cap: refused unopened", figure, "all; 0", passed)


def _with_caps(folder: Path, plan: RunPlan, caps: dict[str, float], rounds: int) -> Path:
    """A site that went through ``rounds`` of an earlier run, and whose officer then signed ``caps``."""
    home = make_home(folder)
    earlier = replace(plan, run_id="earlier")
    if rounds:
        guard = agreed(home, earlier)
        for index in range(rounds):
            guard.adapt(order(earlier, Stage.adapt, index), start(earlier))
    Office(home, plan).sign(**caps)
    (home / ASKED).write_text(plan.to_json())
    return home


# --- item 26 ------------------------------------------------------------------------------------------


def item_26(count: int, seed: int = 0) -> Verdict:
    """One hospital with a patient and without: the bytes of its no, and how long it takes (Mann and Whitney).

    Time is that of the processor, which a busy machine blurs less than it does what a server would see.
    """
    plan = private_plan()
    once = privacy_plan(plan.privacy, DECLARED).epsilon()
    early = {"max_epsilon_per_run": 0.9 * once}, {"max_epsilon_total": 0.9 * once}
    crowded = replace(plan, data=replace(plan.data, min_patients=50))
    alike, likely = [], []
    with tempfile.TemporaryDirectory() as name:
        for number, (caps, asked) in enumerate([*((caps, plan) for caps in early), ({}, crowded)]):
            home = make_home(Path(name) / f"{number}-with")
            Office(home, asked).sign(**caps)
            other = without_patient(home, Path(name) / f"{number}-without")
            same, times = _compare(home, other, asked, count, random.Random(seed + number))
            alike.append(same)
            likely.append(float(stats.mannwhitneyu(*times).pvalue))
        faults = _faulty_answers(Path(name) / "faulty", plan)
    figure = (
        f"bytes alike in {sum(alike)} of {len(alike)} kinds, {len(faults)} faults of data in "
        f"{len(set(faults))} answer; time p {likely[0]:.3f} (policy), {likely[1]:.3f} (budget), "
        f"{likely[2]:.3f} (too few declared)"
    )
    passed = all(alike) and len(set(faults)) == 1 and min(likely) > 1e-3
    asked = f"{count} refusals with and without one patient"
    return Verdict("26", asked, figure, "identical; p > 0.001", passed)


def _compare(
    home: Path, other: Path, plan: RunPlan, count: int, rng: random.Random
) -> tuple[bool, tuple[list[float], list[float]]]:
    """Ask both in turns, whoever comes first by chance: whether all answers are one, and seconds at each."""
    records = {folder: Records(folder) for folder in (home, other)}
    times: dict[Path, list[float]] = {home: [], other: []}
    answers = set()
    for number in range(count + 1):
        for folder in rng.sample([home, other], 2):
            records[folder].restore()
            forget_images()
            before = time.process_time()
            answers.add(asked_by_courier(folder, plan))
            if number:  # the first ones set things up
                times[folder].append(time.process_time() - before)
    return len(answers) == 1, (times[home], times[other])


def asked_by_courier(home: Path, plan: RunPlan) -> bytes:
    """The content of the message that answers the proposal of ``plan``: all that leaves."""
    grid = LoopbackGrid(courier, 1)
    proposal = wire.encode_proposal(order(plan, Stage.propose), plan)
    with environment({"WARDROUND_SITES": str(home.parent)}), task_identity():
        message = wire.request_message(proposal, FIRST_NODE_ID, Stage.propose, 60.0)
        (reply,) = grid.send_and_receive([message])
    return wire.pack_content(reply.content)


def _faulty_answers(folder: Path, plan: RunPlan) -> list[bytes]:
    """What leaves where an image is damaged, a mask is missing, and the manifest is."""
    answers = []
    for number, spoil in enumerate(SPOILED):
        home = make_home(folder / str(number))
        spoil(home / "data")
        answers.append(asked_by_courier(home, plan))
    return answers


SPOILED: tuple[Callable[[Path], object], ...] = (
    lambda data: (data / "images" / "p000-0.png").write_bytes(b"\x89PNG, and no more"),
    lambda data: (data / "masks" / "p001-0.png").unlink(),
    lambda data: (data / "manifest.csv").unlink(),
)
