"""What a student costs in every format, beside the teachers that it stands for.

``python -m simulations.benchmark.students [RUN] [--manifest FILE] [--size 256] [--repeats 15] [--json FILE]``

With a run's folder its sites' students are measured at their own tile size, else one fresh student of
each kind at ``--size``. Latencies are processor seconds of one tile on one thread; all networks take turns
within a repeat, so that a busy machine disturbs them alike; ratios are medians of the repeats' own ratios.
SAM ViT-B has random weights, which cost the same. Without ``--manifest`` int8 is calibrated, and Dice
measured, on procedural phantoms.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from client.export import FORMATS, ExportRequest, export_student, load_runnable
from client.export.probing import probe_tiles
from client.prediction import evaluate_manifest
from client.students import STUDENTS, build_student, load_student, save_student
from common import checkpoints, progress
from common.backbones import build_backbone
from common.errors import UsageError
from common.foundation.catalogue import CATALOGUE
from common.recipe import Anatomy, ClassConfig, DataConfig, PhantomConfig
from common.teacher import Teacher, shipped_teacher
from simulations.phantoms import write_site

SAM, EMBEDDED = "sam-vit-b", "ward-sam-tiny"
GOAL = 1 / 20  # of SAM ViT-B's latency
FILES = {"safetensors": "student.safetensors", "onnx": "a.onnx", "onnx-int8": "b.onnx", "torchscript": "a.ts"}
Run = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One network in one format; ``ratio`` is its latency over that of each teacher."""

    student: str
    format: str
    size: int
    params: int
    bytes: int
    latency_ms: float
    ratio: dict[str, float]
    dice: float | None


def teachers(size: int) -> dict[str, Teacher]:
    """SAM ViT-B with a random decoder, and the teacher that ships, for tiles of ``size`` pixels."""
    known = CATALOGUE[SAM]
    config = {**known.config, "image_size": size, "initializer_range": 0.02}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        large = Teacher(build_backbone(known.family, config), 1)
    return {SAM: large.eval(), EMBEDDED: shipped_teacher(EMBEDDED, size).eval()}


def interleaved(runs: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    """Processor milliseconds of each run, one a repeat, in turn within it; the first turn does not count."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            for name, run in runs.items():
                started = time.process_time()
                run()
                if repeat:
                    found[name].append(1000 * (time.process_time() - started))
    return found


def measure(weights: Path, manifest: Path, repeats: int, folder: Path) -> list[Row]:
    """Every format of one student against both teachers, on one tile."""
    card = load_student(weights).card
    paths = {"safetensors": weights} | {
        kind: folder / name for kind, name in FILES.items() if kind in FORMATS
    }
    for kind, path in paths.items():
        if kind in FORMATS:
            calibrate = manifest if FORMATS[kind].calibrated else None
            export_student(weights, ExportRequest(kind, path, calibrate))
    tile = probe_tiles(1, card.image_size, card.image_size)
    networks: dict[str, Callable[[Tensor], object]] = {k: load_runnable(p).module for k, p in paths.items()}
    large = teachers(card.image_size)
    runs: dict[str, Run] = {name: _run(network, tile) for name, network in {**networks, **large}.items()}
    taken = interleaved(runs, repeats)
    rows = [_teacher_row(name, large[name], card.image_size, taken) for name in large]
    for kind, path in paths.items():
        rows.append(
            Row(
                card.name, kind, card.image_size, card.params, path.stat().st_size,
                float(np.median(taken[kind])), _ratios(taken, kind), _dice(path, manifest),
            )
        )  # fmt: skip
        progress.step(f"{card.name} {kind}")
    return rows


def _run(network: Callable[[Tensor], object], tile: Tensor) -> Run:
    return lambda: network(tile)


def _teacher_row(name: str, teacher: Teacher, size: int, taken: dict[str, list[float]]) -> Row:
    params = sum(parameter.numel() for parameter in teacher.parameters())
    # Both are stored as float32.
    return Row(
        name, "torch", size, params, 4 * params, float(np.median(taken[name])), _ratios(taken, name), None
    )


def _ratios(taken: dict[str, list[float]], name: str) -> dict[str, float]:
    return {teacher: float(np.median(np.divide(taken[name], taken[teacher]))) for teacher in (SAM, EMBEDDED)}


def _dice(path: Path, manifest: Path) -> float | None:
    values = [cell.value for cell in evaluate_manifest(path, manifest) if cell.metric == "dice"]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def table(rows: Sequence[Row]) -> str:
    """Markdown, a row a network and format."""
    head = [
        "network", "format", "tile", "parameters", "file, KB", "CPU ms, batch 1",
        f"of {SAM}", f"of {EMBEDDED}", "Dice",
    ]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        ratios = [f"1/{1 / row.ratio[name]:.1f}" for name in (SAM, EMBEDDED)]
        dice = "-" if row.dice is None else f"{row.dice:.4f}"
        size, latency = f"{row.bytes / 1000:,.0f}", f"{row.latency_ms:.1f}"
        cells = [row.student, row.format, row.size, f"{row.params:,}", size, latency, *ratios, dice]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def fresh_students(size: int, folder: Path) -> list[Path]:
    """One student of each kind, from its shipped weights where it has some."""
    data = DataConfig(image_size=size, classes=[ClassConfig("cell", 255, "blob")])
    found = []
    for name in STUDENTS:
        path = folder / name / FILES["safetensors"]
        student = build_student(name, data, name in checkpoints.names(), 0)
        save_student(student, path, name, data, {"run_id": "benchmark", "model": "student"})
        found.append(path)
    return found


def phantoms(size: int, folder: Path) -> Path:
    config = PhantomConfig(
        anatomy=Anatomy.cells, train_patients=8, val_patients=0, test_patients=6, image_size=size
    )
    return write_site(config, folder, 0, "phantoms")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path, help="a run's folder")
    parser.add_argument("--manifest", type=Path, help="labelled images to calibrate int8 and measure Dice on")
    parser.add_argument("--size", type=int, default=256, help="tile of fresh students, pixels")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write every value here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = sorted(given.run.glob("sites/*/student.safetensors")) if given.run else None
        if found == []:
            raise UsageError(f"{given.run} has no sites/*/student.safetensors: give the folder of a run")
        manifest = given.manifest or phantoms(given.size, folder / "phantoms")
        students = found or fresh_students(given.size, folder / "fresh")
        progress.stage("students", len(students) * len(FILES))
        rows: list[Row] = []
        for number, weights in enumerate(students):
            rows += measure(weights, manifest, given.repeats, folder / f"exports{number}")
        progress.end()
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    sys.stdout.write(table(rows) + "\n")
    best = {row.student: row.ratio[SAM] for row in rows if row.format == "safetensors"}
    for student, ratio in best.items():
        word = "reached" if ratio <= GOAL else "missed"
        sys.stdout.write(f"{SAM} -> {student}: 1/{1 / ratio:.1f} of the latency; goal 1/20 {word}\n")


if __name__ == "__main__":
    main()
