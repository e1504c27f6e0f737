"""What learning from a teacher's kept outputs costs a student: CPU time, beside the same without.

    python -m simulations.benchmark.distillation [--images 96] [--stride 1] [--repetitions 7] [--json]

All trainings are `client.distillation.distil` over the same number of the same images in the same batches:
``kept`` reads the teacher's outputs from the disk and learns from them, ``plain`` learns from masks instead,
and ``labels`` is the recipe's ordinary step on labelled crops, which it draws and augments. Interleaved; a
ratio is taken within a repetition. ``build`` asks the teacher and writes its outputs, ``passes`` only sends
the images through it as often.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import torch
from torch import Tensor

import client.transfer.labelling as labelling
from client.deadline import Deadline
from client.distillation import distil
from client.patients import Patient, Sample, Split
from client.students import build_student
from client.transfer.kept import OutputCache, row_keys
from client.transfer.labelling import Outputs, gather, teacher_logits, teacher_outputs
from client.transfer.sets import TransferSet
from common.adapter import Adapter
from common.config import load_recipe
from common.plan import RunPlan
from common.recipe import TeacherCache
from common.teacher import initial_adapter, resident_teacher
from server.planning import build_plan

EPOCH_GOAL = 1.05  # a kept epoch, of a plain one
BUILD_GOAL = 1.05  # asking and keeping, of asking
FOREVER = Deadline(float("inf"))


@dataclass(frozen=True)
class Job:
    """``images`` of ``size`` pixels, in batches of ``batch``; an epoch takes as many as there are.

    A training of ``epochs`` reads what was kept once, as a site's does.
    """

    images: int = 96
    size: int = 96
    batch: int = 16
    epochs: int = 3
    stride: int = 2  # student.feature_stride
    repetitions: int = 7


@dataclass(frozen=True)
class Timing:
    """CPU seconds of one repetition's trainings; ``kept`` has the reading in it, which is ``read``."""

    plain: float
    labels: float
    kept: float
    read: float
    build: float
    passes: float


@dataclass(frozen=True)
class Outcome:
    """Medians of the ratios within a repetition; ``calls`` of a teacher in all kept epochs together."""

    job: Job
    form: str
    timings: list[Timing]
    epoch: float
    over_labels: float
    build: float
    calls: int
    reached: bool


class Bench:
    """One student, one teacher and one set of random images with random masks; values cost no time."""

    def __init__(self, job: Job, form: TeacherCache, folder: Path) -> None:
        recipe = load_recipe("smoke", [f"data.image_size={job.size}"])
        settings = replace(
            recipe.student, steps=job.epochs * job.images // job.batch, batch_size=job.batch,
            transfer_batch_size=job.batch, teacher_cache=form, feature_stride=job.stride,
        )  # fmt: skip
        plan = build_plan(replace(recipe, student=settings), "benchmark")
        self.labels, self.plan = plan, replace(plan, student=replace(settings, warmup_share=1.0))
        draw = torch.Generator().manual_seed(0)
        images = torch.rand(job.images, 3, job.size, job.size, generator=draw)
        masks = (images.mean(1, keepdim=True) > 0.5).float()
        found = gather((images, masks), None)
        assert found is not None
        self.set, self.folder, self.count = found, folder, 0
        whole = torch.ones(job.size, job.size, dtype=torch.bool)
        samples = [Sample(one, mask.byte(), whole) for one, mask in zip(images, masks, strict=True)]
        self.patients = [
            Patient(str(number), Split.train, (sample,)) for number, sample in enumerate(samples)
        ]
        self.teacher = resident_teacher(plan.teacher, plan.data)
        self.adapter: Adapter = initial_adapter(plan.teacher, plan.data, 0)

    def build(self) -> float:
        """Ask the teacher and keep what it says, in an empty folder; leaves it for `kept`."""
        self.count += 1
        return _cpu(lambda: self._fetch(self._ask))

    def passes(self) -> float:
        with self.teacher.visit(self.adapter) as network:
            return _cpu(lambda: teacher_logits(network, self.set.images, False))

    def kept(self) -> tuple[float, float]:
        """A training from the kept outputs, and the part of it that was reading."""
        parts: list[float] = []

        def epoch() -> None:
            begin = time.process_time()
            said = self._fetch(_never)
            parts.append(time.process_time() - begin)
            self._train(replace(self.set, **vars(said)), self.plan)

        return _cpu(epoch), parts[0]

    def plain(self) -> float:
        return _cpu(lambda: self._train(self.set, self.plan))

    def ordinary(self) -> float:
        return _cpu(lambda: self._train(None, self.labels))

    def _train(self, transfer: TransferSet | None, plan: RunPlan) -> None:
        student = build_student(plan.student.name, plan.data, True, 0)
        distil(student, self.patients, transfer, plan, 0, FOREVER)

    def _fetch(self, make: Callable[[Tensor], Outputs]) -> Outputs:
        cache = OutputCache(self.folder / str(self.count), self.plan.student.teacher_cache, False)
        return cache.fetch(row_keys(self.set, self.adapter, self.plan), make)

    def _ask(self, missing: Tensor) -> Outputs:
        with self.teacher.visit(self.adapter) as network:
            return teacher_outputs(network, self.set.images[missing], False)


def _never(_: Tensor) -> Outputs:
    raise AssertionError("what was kept was not found again")


def _cpu(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def measure(job: Job, form: TeacherCache) -> Outcome:
    timings, calls = [], 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(job, form, Path(folder))
        bench.build(), bench.kept(), bench.plain(), bench.ordinary(), bench.passes()  # warm
        for number in range(job.repetitions):
            build, passes = bench.build(), bench.passes()
            before = labelling.teacher_calls
            order = (bench.kept, bench.plain) if number % 2 else (bench.plain, bench.kept)
            found = {one.__name__: one() for one in order}
            calls += labelling.teacher_calls - before
            kept, read = found["kept"]  # type: ignore[misc]
            timings.append(Timing(found["plain"], bench.ordinary(), kept, read, build, passes))  # type: ignore[arg-type]
    return summarise(job, str(form), timings, calls)


def summarise(job: Job, form: str, timings: Sequence[Timing], calls: int) -> Outcome:
    epoch = statistics.median(one.kept / one.plain for one in timings)
    build = statistics.median(one.build / one.passes for one in timings)
    return Outcome(
        job=job,
        form=form,
        timings=list(timings),
        epoch=epoch,
        over_labels=statistics.median(one.kept / one.labels for one in timings),
        build=build,
        calls=calls,
        reached=epoch <= EPOCH_GOAL and build <= BUILD_GOAL and calls == 0,
    )


def as_text(outcome: Outcome) -> str:
    job = outcome.job
    lines = [
        f"kept as {outcome.form}: {job.images} images of {job.size} pixels in batches of {job.batch}, "
        f"feature_stride {job.stride}; CPU seconds of {job.epochs} epochs",
        "  kept (reading)   plain   labels   build   passes",
    ]
    lines += [
        f"{one.kept:6.2f} ({one.read:5.3f}) {one.plain:9.2f} {one.labels:8.2f} {one.build:7.2f} "
        f"{one.passes:8.2f}"
        for one in outcome.timings
    ]
    lines += [
        f"kept / plain   {outcome.epoch:.3f}   goal {EPOCH_GOAL:.2f}: "
        f"{'reached' if outcome.epoch <= EPOCH_GOAL else 'missed'}",
        f"kept / labels  {outcome.over_labels:.3f}   the labelled step as it is, which draws and augments",
        f"build / passes {outcome.build:.3f}   goal {BUILD_GOAL:.2f}: "
        f"{'reached' if outcome.build <= BUILD_GOAL else 'missed'}",
        f"teacher calls in the kept epochs: {outcome.calls}",
    ]
    return "\n".join(lines)


@click.command()
@click.option("--images", type=click.IntRange(16), default=Job.images, show_default=True)
@click.option("--size", type=click.IntRange(32), default=Job.size, show_default=True)
@click.option("--stride", type=click.IntRange(1), default=Job.stride, show_default=True)
@click.option("--repetitions", type=click.IntRange(1), default=Job.repetitions, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(images: int, size: int, stride: int, repetitions: int, as_json: bool) -> None:
    """Measure an epoch of distillation from kept outputs, beside one without a teacher."""
    torch.set_num_threads(1)
    job = Job(images=images, size=size, stride=stride, repetitions=repetitions)
    found = [measure(job, form) for form in TeacherCache]
    if as_json:
        click.echo(json.dumps([asdict(one) for one in found], indent=2))
    else:
        click.echo("\n\n".join(as_text(one) for one in found))


if __name__ == "__main__":
    main()
