"""What a differentially private step costs: CPU time and memory, of a step without privacy.

    python -m simulations.benchmark.dp [--tokens 64] [--only NAME ...] [--json]

The network is a DINOv2 encoder of random weights with rank-8 LoRA at all attention projections and a 1 x 1
head; DINOv2 because all of Opacus's modes are right for tokens in one row (on SAM's windows only ours and
``vmap`` are). ``--tokens 0`` measures the shipped teacher's decoder behind cached features instead.

Every contender does a whole step: gradients, clip, sum, noise, update. Ours includes the draw and the noise
of the keystream; Opacus draws its noise with torch's generator, and ``vmap`` is ours with `torch.func` in it.
They take turns within a repetition, and a ratio is taken within one; the table has the median of ratios
and between which values half of them lie. A contender whose noiseless update is not that of a plain loop over
patients is reported as wrong and not as fast. Memory is the growth of resident memory over one step, the
median of three processes that do nothing else.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import isqrt
from typing import Any

import click
import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F

from client.dp.mechanism import Execution, PrivateGradient
from client.dp.poisson import micro_batches
from client.dp.randomness import SystemRandomness
from client.dp.reference import plain_gradients
from client.dp.tasks import PatientCrops, PrivateTask, SegmentationTask
from client.dp.trained import Layout
from client.prefix_cache import run_prefix
from common.backbones.dino import build_dinov2
from common.teacher import shipped_teacher
from simulations.benchmark.memory import growth

SAME = 1e-4  # relative norm of the difference from the plain loop's update that counts as equal
RANK, WIDTH, BLOCKS, PATCH = 8, 192, 6, 8
CLIP = 0.05  # below every patient's norm, so that clipping works
LEARNING_RATE = 1e-3
DECODER_PIXELS = 96
GOALS = {64: 1.10, 256: 1.05, 1024: 1.05, 4096: 1.05}
TOKENS = click.Choice(["0", *map(str, GOALS)])
PEAKS = 3  # processes that a peak is the median of

Gradients = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Job:
    """``tokens`` an image and ``batch`` patients of one image; 0 tokens: the decoder behind its cache."""

    tokens: int = 64
    batch: int = 8
    repetitions: int = 15
    memory: bool = True
    only: tuple[str, ...] = ()  # contenders; empty: all


@dataclass(frozen=True)
class Terms:
    """Of a step that takes every patient, so that all contenders have the same to do."""

    expected_batch: float
    noise_std: float
    max_grad_norm: float = CLIP
    steps: int = 10**9
    sample_rate: float = 1.0
    max_images_per_patient: int = 1


class LoraTask(PrivateTask):
    """Random images through the encoder and a head, against random masks at the tokens' resolution."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        torch.manual_seed(0)
        side = isqrt(job.tokens)
        self.encoder = build_dinov2(
            {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 3, "mlp_ratio": 4,
             "image_size": side * PATCH, "patch_size": PATCH, "attn_implementation": "sdpa"}
        )  # fmt: skip
        self.head = nn.Conv2d(WIDTH, 1, 1)
        layers = self.encoder.layers(("q", "k", "v", "out"))
        lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers, bias="none")
        self.encoder.requires_grad_(False)
        inject_adapter_in_model(lora, self.encoder, adapter_name="default")
        for name, parameter in self.encoder.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)  # from zero, no gradient would reach A
        self.patients = [[row] for row in range(job.batch)]
        self._images = torch.rand(job.batch, 3, side * PATCH, side * PATCH)
        self._masks = (torch.rand(job.batch, 1, side, side) > 0.5).float()
        self.eval()

    def inputs(self, rows: Tensor) -> tuple[Tensor, ...]:
        return self._images[rows], self._masks[rows]

    def forward(self, *inputs: Tensor) -> Tensor:
        # Contiguous: Opacus reads a convolution's input as if it were.
        logits = self.head(self.encoder(inputs[0]).tokens.contiguous())
        return F.binary_cross_entropy_with_logits(logits, inputs[1], reduction="none").mean((1, 2, 3))


def decoder_task(job: Job) -> SegmentationTask:
    torch.manual_seed(0)
    network = shipped_teacher("ward-sam-tiny", DECODER_PIXELS).eval().requires_grad_(False)
    images = torch.rand(job.batch, 3, DECODER_PIXELS, DECODER_PIXELS)
    masks = (torch.rand(job.batch, 5, DECODER_PIXELS, DECODER_PIXELS) > 0.5).float()
    crops = PatientCrops(images, masks, [[row] for row in range(job.batch)])
    depth = len(network.encoder.blocks)
    task = SegmentationTask(network, crops, False, run_prefix(network, images, depth), depth)
    network.decoder.requires_grad_(True)
    return task


def build_task(job: Job) -> PrivateTask:
    return LoraTask(job) if job.tokens else decoder_task(job)


def trained_of(task: PrivateTask) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}


def plain(task: PrivateTask, sigma: float) -> Gradients:
    """A step without clip and noise: what the others are compared with."""
    rows, trained = torch.arange(len(task.patients)), trained_of(task)

    def gradients() -> dict[str, Tensor]:
        task.zero_grad(set_to_none=True)
        task(*task.inputs(rows)).mean().backward()
        return {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}

    return gradients


def ours(task: PrivateTask, sigma: float, reference: bool = False) -> Gradients:
    batch = len(task.patients)
    terms = Terms(float(batch), sigma * CLIP)
    mechanism = PrivateGradient(
        task, trained_of(task), terms, SystemRandomness(), Execution(batch, reference)
    )
    return lambda: mechanism.step(mechanism.steps_taken)


def vmapped(task: PrivateTask, sigma: float) -> Gradients:
    return ours(task, sigma, reference=True)


def opacus(task: PrivateTask, sigma: float, functorch: bool = False) -> Gradients:
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    rows, trained = torch.arange(len(task.patients)), trained_of(task)
    task.train()  # Opacus's hooks see nothing else; there is no dropout
    wrapped = GradSampleModule(task, strict=False, force_functorch=functorch)
    optimiser = DPOptimizer(
        torch.optim.SGD(trained.values(), lr=0.0),
        noise_multiplier=sigma, max_grad_norm=CLIP, expected_batch_size=len(rows),
    )  # fmt: skip

    def gradients() -> dict[str, Tensor]:
        optimiser.zero_grad()
        wrapped(*task.inputs(rows)).mean().backward()
        optimiser.pre_step()
        return {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}

    return gradients


def functorch(task: PrivateTask, sigma: float) -> Gradients:
    return opacus(task, sigma, functorch=True)


def ghost(task: PrivateTask, sigma: float) -> Gradients:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    rows, trained = torch.arange(len(task.patients)), trained_of(task)
    task.train()
    wrapped = GradSampleModuleFastGradientClipping(task, strict=False, max_grad_norm=CLIP)
    optimiser = DPOptimizerFastGradientClipping(
        torch.optim.SGD(trained.values(), lr=0.0),
        noise_multiplier=sigma, max_grad_norm=CLIP, expected_batch_size=len(rows),
    )  # fmt: skip

    def gradients() -> dict[str, Tensor]:
        optimiser.zero_grad()
        losses = wrapped(*task.inputs(rows))
        DPTensorFastGradientClipping(wrapped, optimiser, losses).backward()
        optimiser.pre_step()
        return {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}

    return gradients


CONTENDERS: dict[str, Callable[[PrivateTask, float], Gradients]] = {
    "plain": plain,
    "one pass": ours,
    "vmap": vmapped,
    "opacus hooks": opacus,
    "opacus functorch": functorch,
    "opacus ghost": ghost,
}


def step(task: PrivateTask, gradients: Gradients) -> None:
    trained, found = trained_of(task), gradients()
    with torch.no_grad():
        for name, gradient in found.items():
            trained[name].sub_(gradient, alpha=LEARNING_RATE)


def wanted(task: PrivateTask) -> dict[str, Tensor]:
    """The clipped mean by a plain loop over patients, without noise."""
    batch = next(micro_batches(task.patients, len(task.patients)))
    each = plain_gradients(task, trained_of(task), task.inputs(batch.rows), batch)
    clipped = [row * min(1.0, CLIP / float(row.norm())) for row in each]
    return Layout(trained_of(task)).split(torch.stack(clipped).mean(0))


def difference(name: str, job: Job) -> float | None:
    """Of the noiseless update from the plain loop's, relative; None: the contender does not run at all."""
    task = build_task(job)
    target = wanted(task)
    try:
        found = CONTENDERS[name](task, 0.0)()
    except Exception as error:
        click.echo(f"{name}: {type(error).__name__}: {str(error)[:90]}", err=True)
        return None
    off = torch.cat([(found[key] - part).flatten() for key, part in target.items()]).norm()
    return float(off / torch.cat([part.flatten() for part in target.values()]).norm())


@dataclass(frozen=True)
class Row:
    """``ratio`` to the plain step, the median of pairs, half of which lie in ``spread``; milliseconds."""

    contender: str
    difference: float | None
    milliseconds: float
    ratio: float
    spread: tuple[float, float]
    peak_mb: float


@dataclass(frozen=True)
class Outcome:
    """``noise_ms`` is the keystream's part of our step; ``limit_mb`` the plain peak and B x trained x 4 B."""

    job: Job
    trained: int
    rows: list[Row]
    noise_ms: float
    limit_mb: float
    goal: float | None


def measure(job: Job) -> Outcome:
    names = [name for name in CONTENDERS if name == "plain" or name in (job.only or CONTENDERS)]
    found = {name: 0.0 if name == "plain" else difference(name, job) for name in names}
    right = [name for name, off in found.items() if off is not None and off <= SAME]
    tasks = {name: build_task(job) for name in right}
    steps = {name: CONTENDERS[name](tasks[name], 1.0) for name in right}
    times: dict[str, list[float]] = {name: [] for name in right}
    for repetition in range(job.repetitions + 1):
        for name in right if repetition % 2 else reversed(right):
            start = time.process_time()
            step(tasks[name], steps[name])
            if repetition:  # the first round sets things up
                times[name].append(1e3 * (time.process_time() - start))
    trained = sum(parameter.numel() for parameter in trained_of(tasks["plain"]).values())
    rows = [_row(name, found[name], times, job) for name in names]
    limit = rows[0].peak_mb + job.batch * trained * 4 / 1e6
    return Outcome(job, trained, rows, _noise_ms(tasks["plain"]), limit, GOALS.get(job.tokens))


def _row(name: str, off: float | None, times: dict[str, list[float]], job: Job) -> Row:
    if name not in times:
        nothing = float("nan")
        return Row(name, off, nothing, nothing, (nothing, nothing), nothing)
    ratios = [own / plain for own, plain in zip(times[name], times["plain"], strict=True)]
    low, middle, high = (float(part) for part in np.percentile(ratios, (25, 50, 75)))
    peaks = [peak_of(name, job) for _ in range(PEAKS)] if job.memory else [float("nan")]
    return Row(name, off, statistics.median(times[name]), middle, (low, high), statistics.median(peaks))


def _noise_ms(task: PrivateTask, repetitions: int = 20) -> float:
    source, width = SystemRandomness(), Layout(trained_of(task)).width
    start = time.process_time()
    for _ in range(repetitions):
        source.normals((width,))
    return 1e3 * (time.process_time() - start) / repetitions


def own_peak(name: str, job: Job) -> float:
    """Megabytes that one step adds to this process at most, after one that set things up."""
    task = build_task(job)
    gradients = CONTENDERS[name](task, 1.0)
    step(task, gradients)
    task.zero_grad(set_to_none=True)
    return growth(lambda: step(task, gradients)) / 1e6


def peak_of(name: str, job: Job) -> float:
    """`own_peak`, of a process that does nothing else."""
    module = "simulations.benchmark.dp"
    sizes = ["--tokens", str(job.tokens), "--batch", str(job.batch)]
    command = [sys.executable, "-m", module, *sizes, "--peak-of", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def as_text(outcome: Outcome) -> str:
    job = outcome.job
    what = f"LoRA of rank {RANK}, {job.tokens} tokens" if job.tokens else "decoder behind cached features"
    lines = [
        f"{what}, {job.batch} patients, {outcome.trained} trained; CPU, one thread; goal {outcome.goal}",
        "contender           differs      ms   ratio  half of the pairs   peak MB",
    ]
    for row in outcome.rows:
        off = "fails" if row.difference is None else f"{row.difference:.0e}"
        wrong = row.difference is not None and row.difference > SAME
        half = f"{row.spread[0]:.3f} to {row.spread[1]:.3f}"
        numbers = f"{row.milliseconds:7.1f} {row.ratio:7.3f} {half:>18} {row.peak_mb:9.1f}"
        lines.append(f"{row.contender:18} {off:>8} {'   WRONG' if wrong else numbers}")
    lines.append(
        f"keystream noise in our step: {outcome.noise_ms:.2f} ms; memory allowed {outcome.limit_mb:.1f}"
    )
    return "\n".join(lines)


@click.command()
@click.option(
    "--tokens", type=click.Choice(["0", "64", "256", "1024", "4096"]), default="64", show_default=True
)
@click.option("--batch", type=click.IntRange(1), default=Job.batch, show_default=True)
@click.option("--repetitions", type=click.IntRange(1), default=Job.repetitions, show_default=True)
@click.option("--memory/--no-memory", default=True, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(CONTENDERS)), help="Beside the plain step.")
@click.option("--peak-of", type=click.Choice(list(CONTENDERS)), hidden=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(tokens: str, peak_of: str | None, as_json: bool, **settings: Any) -> None:
    """Measure a private step beside a plain one; 0 tokens: the decoder behind cached features."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Opacus warns of hooks that its own wrapper sets
    job = Job(int(tokens), **settings)
    if peak_of:
        click.echo(own_peak(peak_of, job))
        return
    outcome = measure(job)
    click.echo(json.dumps(asdict(outcome), indent=2) if as_json else as_text(outcome))


if __name__ == "__main__":
    main()
