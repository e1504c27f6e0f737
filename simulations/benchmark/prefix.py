"""What the frozen-prefix cache saves: CPU time of a round of LoRA, at every depth and behind the cache.

    python -m simulations.benchmark.prefix [--decoder trained] [--json]

An encoder of SAM ViT-B's size with random weights and rank-8 LoRA at q and v: in all blocks (``full``), in
the last ones (``last``), and in the last ones behind `client.prefix_cache` (``cached``). All go through the
same views, batches and optimiser steps, one after the other, again and again; a ratio is taken within a
repetition.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import click
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import SamVisionConfig

from client.deadline import Deadline
from client.fitting import Schedule, fit
from client.losses import segmentation_loss
from client.prefix_cache import Views, rows_of, run_prefix, shuffled
from common.backbones.base import Backbone, Progress
from common.backbones.sam import SamBackbone
from common.teacher import Teacher

GOAL = 0.30  # a cached round, of a round at full depth
SAME = 1e-5  # largest difference of a trained tensor, relative to its largest value, that counts as equal
RANK = 8
RUN_EPOCHS = 50  # 5 rounds of 10


@dataclass(frozen=True)
class Job:
    """The network and the round that are measured; sizes of SAM ViT-B, at 192 pixels."""

    width: int = 768
    blocks: int = 12
    last: int = 3
    image: int = 192
    views: int = 2
    batch: int = 2
    epochs: int = 3
    repetitions: int = 3
    decoder: bool = False  # trained as well

    @property
    def cut(self) -> int:
        return self.blocks - self.last

    @property
    def steps(self) -> int:
        return self.epochs * self.views // self.batch


@dataclass(frozen=True)
class Timing:
    """CPU seconds of one repetition; ``build`` fills the cache and is no part of ``cached``."""

    full: float
    last: float
    cached: float
    build: float


@dataclass(frozen=True)
class Outcome:
    """Medians over the repetitions; ratios are of pairs within one.

    ``cached_with_build`` builds the cache in every round. ``whole_run`` is computed, not run: `RUN_EPOCHS`
    behind a cache that is built once, as a site's rounds are.
    ``difference`` is between the tensors that ``last`` and ``cached`` trained: beyond `SAME` they are not
    the same job and ``valid`` is false. ``prefix_blocks`` counts those run in a cached round.
    """

    job: Job
    timings: list[Timing]
    cached: float
    cached_with_build: float
    whole_run: float
    last: float
    difference: float
    prefix_blocks: int
    valid: bool
    reached: bool


def build_network(job: Job, blocks: int) -> Teacher:
    """A teacher with LoRA in the last ``blocks`` blocks; the same weights for every number of them."""
    torch.manual_seed(0)
    config = SamVisionConfig(
        hidden_size=job.width, num_hidden_layers=job.blocks, num_attention_heads=max(1, job.width // 64),
        mlp_dim=4 * job.width, patch_size=16, image_size=job.image, output_channels=256, window_size=0,
        initializer_range=0.02,
    )  # fmt: skip
    encoder = SamBackbone(config)
    encoder.split_qkv()
    network = Teacher(encoder, classes=1)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    layers = [f"encoder.{name}" for name in encoder.layers(("q", "v"), blocks)]
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers, bias="none")
    inject_adapter_in_model(lora, network, adapter_name="default")
    for parameter in network.decoder.parameters():
        parameter.requires_grad_(job.decoder)
    return network


def trained_tensors(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


class Contender:
    """One network and its round; every round starts from the same tensors."""

    def __init__(self, job: Job, blocks: int, views: Views) -> None:
        self.job, self.views = job, views
        self.network = build_network(job, blocks)
        self.live = trained_tensors(self.network)
        self._start = {name: parameter.detach().clone() for name, parameter in self.live.items()}

    def round(self, prefix: Progress | None = None) -> float:
        """Train for one round, behind ``prefix`` if there is one; the CPU seconds."""
        job, batches = self.job, shuffled(len(self.views), self.job.batch, seed=1)
        encoder = self.network.encoder
        with torch.no_grad():
            for name, parameter in self.live.items():
                parameter.copy_(self._start[name])

        def loss_at() -> Tensor:
            chosen = next(batches)
            images = self.views.images[chosen]
            if prefix is None:
                logits = self.network(images).logits
            else:
                deep = encoder.run(rows_of(prefix, chosen), job.cut, job.blocks)
                logits = self.network.decode(encoder.finish(deep), images).logits
            return segmentation_loss(logits, self.views.masks[chosen], exclusive=False)

        schedule = Schedule(1e-3, job.steps)
        start = time.process_time()
        fit(list(self.live.values()), schedule, loss_at, Deadline(1e9), "measuring")
        return time.process_time() - start


def measure(job: Job) -> Outcome:
    """Run the three contenders ``job.repetitions`` times in turn, on one thread."""
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(job.views, 3, job.image, job.image, generator=draw)
    views = Views(images, (images.mean(1, keepdim=True) > 0.5).float())
    full, last = Contender(job, job.blocks, views), Contender(job, job.last, views)
    timings: list[Timing] = []
    for _ in range(job.repetitions):
        at_full_depth, uncached = full.round(), last.round()
        reference = {name: parameter.detach().clone() for name, parameter in last.live.items()}
        start = time.process_time()
        prefix = run_prefix(last.network, images, job.cut)
        build = time.process_time() - start
        before = Backbone.blocks_run
        cached = last.round(prefix)
        prefix_blocks = Backbone.blocks_run - before - job.steps * job.last
        timings.append(Timing(at_full_depth, uncached, cached, build))
    difference = max(
        float((last.live[name].detach() - tensor).abs().max() / tensor.abs().max().clamp(min=1e-12))
        for name, tensor in reference.items()
    )
    return summarise(job, timings, difference, prefix_blocks)


def summarise(job: Job, timings: Sequence[Timing], difference: float, prefix_blocks: int) -> Outcome:
    cached = statistics.median(timing.cached / timing.full for timing in timings)
    valid = difference <= SAME
    return Outcome(
        job=job,
        timings=list(timings),
        cached=cached,
        cached_with_build=statistics.median((row.cached + row.build) / row.full for row in timings),
        whole_run=statistics.median(
            (row.cached + row.build * job.epochs / RUN_EPOCHS) / row.full for row in timings
        ),
        last=statistics.median(timing.last / timing.full for timing in timings),
        difference=difference,
        prefix_blocks=prefix_blocks,
        valid=valid,
        reached=valid and cached <= GOAL,
    )


def as_text(outcome: Outcome) -> str:
    job = outcome.job
    lines = [
        f"LoRA q, v, rank {RANK}, {job.blocks} blocks of {job.width}, {job.image} pixels, {job.views} views, "
        f"{job.epochs} epochs, decoder {'trained' if job.decoder else 'frozen'}; CPU seconds a round",
        "  full depth   last blocks   cached   build of the cache",
    ]
    lines += [
        f"{row.full:12.2f} {row.last:13.2f} {row.cached:8.2f} {row.build:20.2f}" for row in outcome.timings
    ]
    lines += [
        f"last {job.last} blocks / full depth         {outcome.last:.3f}",
        f"the same, cached / full depth    {outcome.cached:.3f}   goal {GOAL:.2f}: "
        f"{'reached' if outcome.reached else 'missed' if outcome.valid else 'INVALID, another result'}",
        f"with the cache built each round  {outcome.cached_with_build:.3f}",
        f"built once in {RUN_EPOCHS} epochs (computed)  {outcome.whole_run:.3f}",
        f"prefix blocks run in a cached round: {outcome.prefix_blocks}; trained tensors differ by "
        f"{outcome.difference:.1e}",
    ]
    return "\n".join(lines)


@click.command()
@click.option("--decoder", type=click.Choice(["frozen", "trained"]), default="frozen", show_default=True)
@click.option("--repetitions", type=click.IntRange(1), default=Job.repetitions, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(decoder: str, repetitions: int, as_json: bool) -> None:
    """Measure a round of LoRA with and without the frozen-prefix cache."""
    torch.set_num_threads(1)
    outcome = measure(replace(Job(), decoder=decoder == "trained", repetitions=repetitions))
    click.echo(json.dumps(asdict(outcome), indent=2) if as_json else as_text(outcome))


if __name__ == "__main__":
    main()
