"""A guard without images: deterministic "training" on tiny tensors, and faults on demand.

``behaviour.json`` in a site's folder says what it does wrong: ``{"adapt:0": "raise"}``. So the same fake
serves sites in this process and in Ray's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

import client.app
from client.egress import Egress
from common import guard_api
from common.adapter import Adapter, AdapterUpdate
from common.errors import DataError, DeadlinePassed, PolicyRefusal
from common.guard_api import Metric, PlanAnswer, SiteCounts, SiteMetrics, StudentNote
from common.plan import Round, RunPlan, Stage
from common.precision import pack, unpack
from common.privacy.heads import SignedHead
from common.recipe import GeneratorScope, Recipe
from common.seeding import derive_seed
from common.shared_student import SHARED_STUDENT
from common.style import STYLE_BOUNDS, StyleGroup, StyleSummary
from common.tuning.halves import trained_halves
from common.tuning.presets import GENERATOR
from server.planning import FirstAdapters

BASE = "ab" * 32
WIRE = torch.bfloat16  # the default of aggregation.wire_dtype
PLANTED_PATH = "/data/clinic/patient_0017.png"
PLANTED_ID = "MRN-8841-Miller"


def late() -> None:
    """Lets time pass: a test moves its clock here."""


def first_adapter(rank: int = 2) -> Adapter:
    """Two layers of LoRA and a dense head; the first rows are the same at every rank."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for layer in ("encoder.layers.0.attn.qkv", "encoder.layers.1.attn.qkv"):
        tensors[f"{layer}.lora_A"] = torch.randn(3, 8, generator=generator)[:rank]
        tensors[f"{layer}.lora_B"] = torch.zeros(12, rank)
    tensors["decoder.head.weight"] = torch.randn(3, 4, generator=generator)
    return Adapter(tensors, BASE, rank, "base")


def first_adapters(recipe: Recipe) -> FirstAdapters:
    """In place of `server.planning.first_adapters`, which loads real models."""
    federated = recipe.generator.scope is GeneratorScope.federated
    generator = replace(first_adapter(), preset=GENERATOR)
    ranks = dict.fromkeys([2, *(site.rank for site in recipe.sites if site.rank is not None)])
    student = replace(first_adapter(), preset=SHARED_STUDENT, rank=0)
    student = replace(student, tensors={"head.weight": student.tensors["decoder.head.weight"]})
    return FirstAdapters(
        [first_adapter(rank) for rank in ranks],
        generator if federated else None,
        student if recipe.student.federated else None,
    )


class FakeGuard:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.site = folder.name
        self.behaviour = json.loads((folder / "behaviour.json").read_text())

    # ---- the verbs ------------------------------------------------------------------------------

    def propose(self, plan: RunPlan, order: Round) -> PlanAnswer:
        (self.folder / "plan.json").write_text(plan.to_json())
        (self.folder / "threads.txt").write_text(str(torch.get_num_threads()))
        wrong = self._wrong(order)
        if wrong == "disagree":
            answer = PlanAnswer(self.site, False, plan.digest, "REFUSED_POLICY", "max_rounds")
        else:
            name = "a" if wrong == "impostor" else self.site
            rank = 3 if wrong == "another rank" else 2
            answer = PlanAnswer(name, True, plan.digest, preset="base", rank=rank)
        self._egress().release_numbers(Stage.propose, 0, "answer", asdict(answer))
        return answer

    def adapt(self, order: Round, adapter: Adapter) -> AdapterUpdate:
        return self._train(order, adapter)

    def train_generator(self, order: Round, adapter: Adapter) -> AdapterUpdate:
        return self._train(order, adapter)

    def train_shared_student(self, order: Round, student: Adapter) -> AdapterUpdate:
        return self._train(order, student)

    def style(self, order: Round) -> StyleSummary:
        self._wrong(order)
        middle = [(low + high) / 2 for low, high in STYLE_BOUNDS]
        summary = StyleSummary([StyleGroup(1.0, middle, [0.1] * len(middle))])
        self._egress().release_numbers(Stage.style, 0, "style", asdict(summary))
        return summary

    def train_student(
        self,
        order: Round,
        adapter: Adapter,
        styles: dict[str, StyleSummary],
        generator: Adapter | None,
        student: Adapter | None = None,
    ) -> StudentNote:
        self._wrong(order)
        digest = unpack(student or generator or adapter).digest
        note = StudentNote(self.site, "fake", 10 + len(styles), digest, 1.0, 2.0, 5, 4, 1)
        self._egress().release_numbers(Stage.student, 0, "note", asdict(note))
        return note

    def evaluate(self, order: Round, adapter: Adapter) -> SiteMetrics:
        self._wrong(order)
        counts = SiteCounts(10, 20, 6, 2, 2)
        cells = [
            Metric("student", "dice", "foreground", 0.8, (0.7, 0.9), 6),
            Metric("teacher", "dice", "foreground", None, None, 2, "fewer patients than the site shows"),
        ]
        metrics = SiteMetrics(self.site, counts, cells)
        self._egress().release_numbers(Stage.evaluate, 0, "metrics", asdict(metrics))
        return metrics

    # ---- inside ---------------------------------------------------------------------------------

    def _plan(self) -> RunPlan:
        return RunPlan.from_json((self.folder / "plan.json").read_text())

    def _egress(self) -> Egress:
        plan = self._plan()
        rank = 3 if self.behaviour.get("propose:0") == "another rank" else 2
        return Egress(self.site, self.folder, plan, plan.variant("base", rank))

    def _train(self, order: Round, adapter: Adapter) -> AdapterUpdate:
        wrong = self._wrong(order)
        generator = torch.Generator().manual_seed(derive_seed(3, self.site, order.stage, order.index))
        sent = unpack(adapter)
        halves = trained_halves(sent.preset, self._plan().aggregation.rule, order.index)
        steps = {
            name: 0.1 * (torch.randn(tensor.shape, generator=generator) - tensor)
            for name, tensor in sorted(sent.trained(halves).tensors.items())
        }
        step = pack(replace(sent, tensors=steps), self._plan().aggregation.wire_dtype)
        weight = 4.0 + ord(self.site[-1]) % 7
        update = AdapterUpdate(step, weight, adapter.digest, losses=(1.0, 0.5))
        if wrong in TAMPER:  # a site whose egress is broken or hostile: the server must notice
            return TAMPER[wrong](update)
        return self._egress().release_update(order.stage, order.index, update)

    def _wrong(self, order: Round) -> str:
        if order.notice:
            with (self.folder / "notices.txt").open("a") as log:
                log.write(f"{order.stage}:{order.index} {order.notice}\n")
        wrong = str(self.behaviour.get(f"{order.stage}:{order.index}", ""))
        if wrong == "raise":
            raise RuntimeError(f"cannot read {PLANTED_PATH} of {PLANTED_ID}")
        if wrong == "exit":
            raise SystemExit(f"cannot read {PLANTED_PATH} of {PLANTED_ID}")
        if wrong == "bad data":
            raise DataError(f"{PLANTED_PATH}: empty mask", faults=[PLANTED_ID])
        if wrong == "refuse":
            raise PolicyRefusal(f"{PLANTED_ID} has opted out", field="allow_generator")
        if wrong == "own deadline":
            raise DeadlinePassed(f"stopped in {PLANTED_PATH}")
        if wrong == "late":
            late()
        if wrong == "interrupt":
            raise KeyboardInterrupt
        return wrong


def _with(update: AdapterUpdate, **tensors: torch.Tensor) -> AdapterUpdate:
    changed = {**update.adapter.tensors, **{name.replace("__", "."): t for name, t in tensors.items()}}
    return replace(update, adapter=replace(update.adapter, tensors=changed))


def head(value: float) -> torch.Tensor:
    return torch.full((3, 4), value, dtype=WIRE)


def _still(update: AdapterUpdate) -> AdapterUpdate:
    """It learnt nothing at all."""
    return _with(update, **{name: torch.zeros_like(step) for name, step in update.adapter.tensors.items()})


def _other_half(update: AdapterUpdate) -> AdapterUpdate:
    """Its factors are of the half whose turn it is not: A in the shape of its layer, for a B that was due."""
    kept = {name: t for name, t in update.adapter.tensors.items() if not name.endswith(".lora_B")}
    layers = [name for name in update.adapter.tensors if name.endswith(".lora_B")]
    other = {name.replace("lora_B", "lora_A"): torch.zeros(2, 8, dtype=WIRE) for name in layers}
    return replace(update, adapter=replace(update.adapter, tensors={**kept, **other}))


TAMPER: dict[str, Callable[[AdapterUpdate], AdapterUpdate]] = {
    "nan": lambda update: _with(update, decoder__head__weight=head(float("nan"))),
    "extra": lambda update: _with(update, patient_0017=torch.ones(2, dtype=WIRE)),
    "half": _other_half,
    "still": _still,
    "shape": lambda update: _with(update, decoder__head__weight=head(1.0).T),
    "base": lambda update: replace(update, adapter=replace(update.adapter, base_sha256="cd" * 32)),
    "preset": lambda update: replace(update, adapter=replace(update.adapter, preset="lite")),
    "rank": lambda update: replace(update, adapter=replace(update.adapter, rank=1)),
    "stale": lambda update: replace(update, started_from="ef" * 32),
    "heavy": lambda update: replace(update, weight=1e9),
    "far": lambda update: _with(update, decoder__head__weight=head(60.0)),
    "headed": lambda update: replace(update, ledger_head=SignedHead("a", 1, "a" * 64, "b" * 64, "c" * 128)),
    "huge": lambda update: _with(update, decoder__head__weight=head(1e9)),
}


def connect(address: str) -> FakeGuard:
    return FakeGuard(Path(address.removeprefix("in-process:")))


class FakeSites(ClientApp):
    """The real ClientApp, connected to fake guards; Ray's processes import it by name."""

    def __call__(self, message: Message, context: Context) -> Message:
        real = guard_api.connect
        guard_api.connect = connect
        try:
            return client.app.app(message, context)
        finally:
            guard_api.connect = real


def make_sites(folder: Path, behaviour: dict[str, dict[str, str]]) -> Path:
    for site, wrong in behaviour.items():
        (folder / site).mkdir(parents=True)
        (folder / site / "behaviour.json").write_text(json.dumps(wrong))
    return folder
