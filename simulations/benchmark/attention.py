"""CPU time and memory of one attention layer of SAM ViT-B (12 heads of 64): eager, masked and folded.

``python -m simulations.benchmark.attention [--json] [--tokens 196 1024 4096] [--rounds 3]``

Times are CPU time of this process on one thread; the three take turns, and a ratio is the median over the
rounds' own ratios. Memory is measured in a process of its own for each: the kernel's high-water mark of
resident memory during one call less what was resident before it (Linux). Every row names
the greatest difference to transformers' eager module too: fast and different is not fast.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionAttention

from common.backbones.attention import RelativeAttention
from simulations.benchmark.memory import growth

HEADS, HEAD_WIDTH = 12, 64
WAYS = ("eager", "masked", "folded")
MODES = ("forward", "forward and backward")

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Row:
    """One way at one size: milliseconds of CPU, megabytes (10^6 bytes), and both over eager's.

    ``difference`` is the greatest absolute one to eager's output and, with a backward pass, gradient.
    """

    tokens: int
    mode: str
    way: str
    cpu_ms: float
    cpu_ratio: float
    peak_mb: float
    peak_ratio: float
    difference: float


def layer(way: str, tokens: int) -> nn.Module:
    """The layer on a square grid of ``tokens``, with random position tables; all ways share weights."""
    torch.manual_seed(0)
    side = math.isqrt(tokens)
    config = SamVisionConfig(hidden_size=HEADS * HEAD_WIDTH, num_attention_heads=HEADS, qkv_bias=True)
    eager: nn.Module = SamVisionAttention(config, window_size=side)
    for name in ("rel_pos_h", "rel_pos_w"):
        setattr(eager, name, nn.Parameter(0.1 * torch.randn(2 * side - 1, HEAD_WIDTH)))
    if way == "eager":
        return eager
    ours = RelativeAttention(copy.deepcopy(eager))
    ours.fold_from = 0 if way == "folded" else tokens + 1
    return ours


def image(tokens: int) -> Tensor:
    side = math.isqrt(tokens)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, side, side, HEADS * HEAD_WIDTH, generator=generator)


def call(module: nn.Module, hidden: Tensor, mode: str) -> Results:
    """The output and, with a backward pass, the gradient at ``hidden``."""
    if mode == MODES[0]:
        with torch.no_grad():
            return (module(hidden)[0],)
    hidden = hidden.clone().requires_grad_()
    output: Tensor = module(hidden)[0]
    torch.autograd.backward(output.square().mean())
    module.zero_grad()
    assert hidden.grad is not None
    return output.detach(), hidden.grad


def turns(tokens: int, mode: str, rounds: int) -> tuple[dict[str, list[float]], dict[str, Results]]:
    """Milliseconds of every round, and what came out of the last one, a way; every round runs all ways."""
    modules, hidden = {way: layer(way, tokens) for way in WAYS}, image(tokens)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    results: dict[str, Results] = {}
    warm_up(mode)
    for _ in range(rounds):
        for way in WAYS:
            start = time.process_time()
            results[way] = call(modules[way], hidden, mode)
            times[way].append(1e3 * (time.process_time() - start))
    return times, results


def warm_up(mode: str) -> None:
    """What torch sets up at its first call is not the layer's."""
    for way in WAYS:
        call(layer(way, 16), image(16), mode)


def own_peaks(way: str, tokens: int) -> list[float]:
    """Megabytes that one call adds to this process at most, one number a mode."""
    module, hidden = layer(way, tokens), image(tokens)
    found = []
    for mode in MODES:
        warm_up(mode)
        found.append(growth(lambda mode=mode: call(module, hidden, mode)) / 1e6)  # type: ignore[misc]
    return found


def peaks(way: str, tokens: int) -> list[float]:
    """`own_peaks`, of a process that does nothing else."""
    module = "simulations.benchmark.attention"
    command = [sys.executable, "-m", module, "--peaks-of", way, "--tokens", str(tokens)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: list[float] = json.loads(printed)
    return found


def measure(tokens: int, rounds: int) -> list[Row]:
    """All ways in both modes at one size."""
    memory = {way: peaks(way, tokens) for way in WAYS}
    rows = []
    for index, mode in enumerate(MODES):
        times, results = turns(tokens, mode, rounds)
        for way in WAYS:
            ratios = [mine / eager for mine, eager in zip(times[way], times["eager"], strict=True)]
            peak, eagers = memory[way][index], memory["eager"][index]
            cost = statistics.median(times[way]), statistics.median(ratios), peak, peak / eagers
            pairs = zip(results[way], results["eager"], strict=True)
            difference = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
            rows.append(Row(tokens, mode, way, *cost, difference))
    return rows


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| Tokens | Pass | Attention | CPU ms | of eager | Peak MB | of eager | Differs from eager by |",
        "|---:|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.tokens} | {row.mode} | {row.way} | {row.cpu_ms:.0f} | {row.cpu_ratio:.2f} "
            f"| {row.peak_mb:.0f} | {row.peak_ratio:.2f} | {row.difference:.0e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--tokens", type=int, nargs="+", default=[196, 1024, 4096], help="square numbers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peaks-of", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.peaks_of:
        sys.stdout.write(json.dumps(own_peaks(given.peaks_of, given.tokens[0])) + "\n")
        return
    rows = [row for tokens in given.tokens for row in measure(tokens, given.rounds)]
    document = {"torch": torch.__version__, "threads": 1, "rows": [asdict(row) for row in rows]}
    sys.stdout.write((json.dumps(document, indent=1) if given.json else table(rows)) + "\n")


if __name__ == "__main__":
    main()
