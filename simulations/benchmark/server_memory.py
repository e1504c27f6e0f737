"""What a round costs the server: memory as sites are added, and how quickly an update is folded.

    python -m simulations.benchmark.server_memory [--sites 20,200] [--payload-mb 8] [--kinds dense,factors]
        [--pairs 15] [--json]

The real walk (`server.phases.Walk`) with the default rule, from the proposal to the saved state of the first
round, over a grid whose sites are made up (`MadeUpSites`): nobody trains, and every site answers at once.
Memory is measured in a process of its own for each count: the kernel's high-water mark of resident memory
less what was resident when sites had agreed and the rule had begun (Linux). It is read twice: when all are
compared and folded, which is where more sites could cost more, and at the end, when the round is closed and
saved too.

``dense`` is ``--payload-mb`` of tensors that are averaged as they are; ``factors`` is LoRA of rank 8 on the
24 attention layers of SAM ViT-B; both as they travel, in bfloat16. Rates are bytes of the payload a second of
CPU time on one thread, in turns with ``y += a x`` in float32 on arrays that no cache holds: ``keep`` is
unpacking and writing to the disk, ``read`` reading it back and adding what was sent, ``fold`` the rule's own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common import progress, wire
from common.adapter import Adapter, AdapterUpdate
from common.guard_api import PlanAnswer
from common.plan import Round, RunPlan, Stage
from common.precision import pack, pack_down, unpack
from common.recipe import GeneratorConfig, GeneratorScope, Recipe, RunConfig, SiteConfig, WireDtype
from server.aggregation import AggregationRule, Share, build_rule
from server.answers import Answers
from server.collect import Collector
from server.events import EventLog
from server.phases import Walk
from server.planning import FirstAdapters, build_plan
from server.screening import Sent, admit
from server.steps import RoundSteps
from simulations.benchmark.memory import growth, high_water, resident
from simulations.loopback import task_identity

KINDS = ("dense", "factors")
STEPS = ("decode", "admit", "keep", "read", "fold")
WIRE = WireDtype.bfloat16  # the default of aggregation.wire_dtype
BASE = "ab" * 32
SLOPE_GOAL = 0.1  # payloads a site
BLOCKS, WIDTH, RANK = 12, 768, 8  # SAM ViT-B
AXPY_ELEMENTS = 1 << 25  # 128 MB an array


def first_adapter(kind: str, payload_mb: int) -> Adapter:
    """What the round starts from; what a site sends up has the same shapes. ``payload_mb`` is for dense."""
    if kind == "dense":
        tensors = {f"decoder.{number}.weight": torch.zeros(1000, 500) for number in range(payload_mb)}
        return Adapter(tensors, BASE, 0, "decoder")
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for block in range(BLOCKS):
        for layer, out in (("qkv", 3 * WIDTH), ("proj", WIDTH)):
            name = f"encoder.layers.{block}.attn.{layer}"
            tensors[f"{name}.lora_A"] = torch.randn(RANK, WIDTH, generator=draw) / WIDTH**0.5
            tensors[f"{name}.lora_B"] = torch.zeros(out, RANK)
    return Adapter(tensors, BASE, RANK, "fused")


def payload_bytes(adapter: Adapter) -> int:
    """Of what a site sends up that was sent ``adapter``."""
    return sum(tensor.nbytes for tensor in pack(adapter.trained(), WIRE).tensors.values())


class MadeUpSites:
    """A grid of ``count`` sites. They agree to the plan, and answer an order with noise of small size.

    Of a message it keeps the order and a digest, of the first adapter the shapes. An answer is made when it
    is pulled, and is not kept.
    """

    def __init__(self, first: Adapter, count: int) -> None:
        trained = first.trained()
        self._like = replace(trained, tensors={name: t.to("meta") for name, t in trained.tensors.items()})
        self._nodes = list(range(1, count + 1))
        self._asked: dict[str, tuple[int, Round, str]] = {}

    def get_node_ids(self) -> list[int]:
        return self._nodes

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        return [self._note(message.metadata.dst_node_id, message.content) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Any]:
        return [self._reply(*self._asked.pop(message_id)) for message_id in message_ids]

    def _note(self, node: int, content: wire.Content) -> str:
        order = wire.decode_order(content)
        sent = "" if order.stage == Stage.propose else wire.decode_adapter(content).digest
        self._asked[order.nonce] = (node, order, sent)
        return order.nonce

    def _reply(self, node: int, order: Round, sent: str) -> Any:
        if order.stage == Stage.propose:
            answer = PlanAnswer(site_name(node), True, order.plan_sha256)
            agreed = replace(answer, preset=self._like.preset, rank=self._like.rank)
            content = wire.encode_answer(agreed)
        else:
            content = self.answer(node, order, sent)
        return wire.reply_message(content, wire.request_message(wire.Content(), node, order.stage, 60.0))

    def answer(self, node: int, order: Round, sent: str) -> wire.Content:
        """An update such as a site of this size sends up after a round."""
        draw = torch.Generator().manual_seed(node)
        noise = {
            name: 0.01 * torch.randn(tensor.shape, generator=draw)
            for name, tensor in self._like.tensors.items()
        }
        step = pack(replace(self._like, tensors=noise), WIRE)
        return wire.encode_update(order, AdapterUpdate(step, 10.0, sent))


def site_name(node: int) -> str:
    return f"site-{node:05d}"


def recipe_for(count: int) -> Recipe:
    sites = [SiteConfig(site_name(node)) for node in range(1, count + 1)]
    run = RunConfig(rounds=1, min_sites=count, site_deadline_s=1e6)
    return Recipe("server-memory", run=run, sites=sites, generator=GeneratorConfig(scope=GeneratorScope.none))


class NotingLog(EventLog):
    """The run's events; when a round has all its answers, the high-water mark of memory is noted."""

    collected = 0

    def write(self, event: str, **facts: Any) -> None:
        super().write(event, **facts)
        if facts.get("state") == "closed":
            self.collected = high_water()


@dataclass(frozen=True)
class Cost:
    """One round with ``sites`` sites; MB are 10^6 bytes.

    Attributes:
        collecting_mb: the peak until every answer is folded.
        peak_mb: the peak of the whole round: closed, its state and the teacher saved.
        rig_mb: what making one answer adds for a moment; both peaks may hold it.
        live: the most decoded updates in memory at once.
    """

    kind: str
    payload_mb: float
    sites: int
    collecting_mb: float
    peak_mb: float
    rig_mb: float
    live: int
    cpu_s: float


def own_cost(kind: str, payload_mb: int, count: int) -> Cost:
    """The round in this process."""
    first = first_adapter(kind, payload_mb)
    grid = MadeUpSites(first, count)
    with tempfile.TemporaryDirectory() as place, task_identity():
        folder = Path(place)
        events = NotingLog(folder / "events.jsonl")
        collector = Collector(grid, events)
        walk = Walk(collector, recipe_for(count), folder, FirstAdapters([first], None))
        walk.propose()
        rig = growth(lambda: grid.answer(0, walk.rounds.order(Stage.adapt, 0, ""), ""))
        started, before = time.process_time(), resident()
        walk.adapt()
        seconds = time.process_time() - started
        bytes_added = [payload_bytes(first), events.collected - before, high_water() - before, rig]
    payload, collecting, peak, rig_mb = (size / 1e6 for size in bytes_added)
    return Cost(kind, payload, count, collecting, peak, rig_mb, collector.live.peak, seconds)


def cost(kind: str, payload_mb: int, count: int) -> Cost:
    """`own_cost`, of a process that does nothing else."""
    return Cost(**_in_a_child("--cost-of", kind, "--payload-mb", str(payload_mb), "--sites", str(count)))


@dataclass(frozen=True)
class Rates:
    """GB/s (10^9 bytes), medians: of the payload, and for ``axpy`` of what it moves (x, y read, y written).

    ``ratio`` is the median over the pairs of fold over axpy.
    """

    kind: str
    payload_mb: float
    decode: float
    admit: float
    keep: float
    read: float
    fold: float
    axpy: float
    ratio: float


def own_rates(kind: str, payload_mb: int, pairs: int) -> Rates:
    """Decode, admit and fold ``pairs`` updates one by one, with an axpy in turn."""
    first = first_adapter(kind, payload_mb)
    grid = MadeUpSites(first, pairs)
    plan = build_plan(recipe_for(pairs), "rates", FirstAdapters([first], None))
    rule = build_rule(plan.aggregation)
    rule.start(first, {site_name(node): Share.of(first) for node in range(pairs)})
    rule.open_round()
    x, y = torch.ones(AXPY_ELEMENTS), torch.zeros(AXPY_ELEMENTS)
    with tempfile.TemporaryDirectory() as place:
        answers = Answers(Path(place))
        seconds: list[dict[str, float]] = [
            _one_update(node, Rig(grid, plan, rule, answers))
            | {"axpy": _timed(lambda: y.add_(x, alpha=0.5))[0]}
            for node in range(pairs)
        ]
    size = payload_bytes(first) / 1e9
    rates = [{name: size / each[name] for name in STEPS} for each in seconds]
    axpys = [3 * x.nbytes / 1e9 / each["axpy"] for each in seconds]
    medians = {name: statistics.median(each[name] for each in rates) for name in rates[0]}
    ratio = statistics.median(each["fold"] / axpy for each, axpy in zip(rates, axpys, strict=True))
    return Rates(kind, size * 1e3, **medians, axpy=statistics.median(axpys), ratio=ratio)


class Rig(NamedTuple):
    grid: MadeUpSites
    plan: RunPlan
    rule: AggregationRule
    answers: Answers


def _one_update(node: int, rig: Rig) -> dict[str, float]:
    """Seconds of each step that the server takes with one update."""
    site, order = site_name(node), Round(rig.plan.digest, Stage.adapt, 0, 60.0, f"nonce-{node}")
    adapter = rig.rule.adapter_for(site)
    sent = Sent.of(pack_down(adapter, WIRE), order.nonce)
    content = rig.grid.answer(node, order, sent.digest)
    decode, (nonce, update) = _timed(lambda: wire.decode_update(content))
    spec = rig.plan.variants[0].payload(0)
    admitted, _ = _timed(lambda: admit(update, nonce, sent, spec, 1000.0, set()))
    keep, _ = _timed(lambda: rig.answers.add(site, replace(update, adapter=unpack(update.adapter))))
    steps = RoundSteps(rig.answers, {site: adapter}, [site])
    read, trained = _timed(lambda: steps.trained(site, 10.0))
    fold, _ = _timed(lambda: rig.rule.fold(site, trained))
    return {"decode": decode, "admit": admitted, "keep": keep, "read": read, "fold": fold}


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    answer = work()
    return time.process_time() - started, answer


def rates(kind: str, payload_mb: int, pairs: int) -> Rates:
    """`own_rates`, of a process that does nothing else."""
    return Rates(**_in_a_child("--rates-of", kind, "--payload-mb", str(payload_mb), "--pairs", str(pairs)))


def _in_a_child(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "simulations.benchmark.server_memory", *arguments]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(printed)
    return found


def slope(costs: Sequence[Cost]) -> float:
    """Payloads a site that the collecting peak grows by, from the fewest to the most sites."""
    fewest, most = min(costs, key=lambda one: one.sites), max(costs, key=lambda one: one.sites)
    return (most.collecting_mb - fewest.collecting_mb) / (most.sites - fewest.sites) / most.payload_mb


def report(costs: Sequence[Cost], found: Sequence[Rates]) -> str:
    """Markdown."""
    lines = [
        "| payload | MB | sites | peak MB, collecting | whole round | the rig's answer | updates alive "
        f"| CPU s | payloads a site (goal {SLOPE_GOAL}) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in costs:
        alike = [other for other in costs if other.kind == one.kind]
        grows = f"{slope(alike):.3f}" if len({other.sites for other in alike}) > 1 else "-"
        lines.append(
            f"| {one.kind} | {one.payload_mb:.2f} | {one.sites} | {one.collecting_mb:.0f} "
            f"| {one.peak_mb:.0f} | {one.rig_mb:.0f} | {one.live} | {one.cpu_s:.1f} | {grows} |"
        )
    lines += [
        "",
        "| payload | MB | decode GB/s | admit | keep | read | fold | axpy GB/s | fold of axpy |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for rate in found:
        lines.append(
            f"| {rate.kind} | {rate.payload_mb:.2f} | {rate.decode:.2f} | {rate.admit:.2f} | {rate.keep:.2f} "
            f"| {rate.read:.2f} | {rate.fold:.2f} | {rate.axpy:.1f} | {rate.ratio:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sites", default="20,200")
    parser.add_argument("--payload-mb", type=int, default=8)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--cost-of", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--rates-of", choices=KINDS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    progress.configure(quiet=True)
    counts = [int(count) for count in given.sites.split(",")]
    if given.cost_of:
        answer = json.dumps(asdict(own_cost(given.cost_of, given.payload_mb, counts[0])))
    elif given.rates_of:
        answer = json.dumps(asdict(own_rates(given.rates_of, given.payload_mb, given.pairs)))
    else:
        kinds = given.kinds.split(",")
        costs = [cost(kind, given.payload_mb, count) for kind in kinds for count in counts]
        found = [rates(kind, given.payload_mb, given.pairs) for kind in kinds]
        both = {"costs": [asdict(one) for one in costs], "rates": [asdict(one) for one in found]}
        answer = json.dumps(both, indent=1) if given.json else report(costs, found)
    sys.stdout.write(answer + "\n")


if __name__ == "__main__":
    main()
