"""Items 15 and 25: tensors that no noised step made, and what a server or a patched courier may ask."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import client.rounds as rounds
from client.account import MECHANISM, Account, privacy_plan
from client.dp.mechanism import ClippedSum, Execution, PrivateGradient
from client.dp.randomness import SystemRandomness
from client.dp.rehearsal import check_noise
from client.dp.tasks import segmentation_task
from client.egress import RECEIPTS, Egress, Noised
from client.guard import Guard
from client.patients import Patient, Split, of_split
from client.private_adaptation import learning_rate
from client.site import Site
from common.adapter import Adapter, AdapterUpdate
from common.errors import ConfigError, PolicyRefusal, WardroundError
from common.generator import initial_adapter
from common.plan import Round, RunPlan, Stage, TensorSpec
from common.precision import SCALE, pack, unpack
from common.privacy.entries import EntryType
from common.recipe import PrivacyConfig
from common.teacher import ResidentTeacher, Teacher
from simulations.privacy_exam.hospital import (
    DECLARED,
    Office,
    agreed,
    entries,
    make_home,
    order,
    private_plan,
    start,
)
from simulations.privacy_exam.verdict import Verdict

STRANGERS = (
    "decoder.ema.head.weight",
    "encoder.norm.weight",
    "decoder.norm.running_mean",
    "optimiser.exp_avg",
)


def item_15(rounds: int) -> Verdict:
    """What leaves an honest round; then tensors beside it, on the plan's list or not; then such networks."""
    plan = private_plan(f"privacy.steps={rounds}")
    with tempfile.TemporaryDirectory() as name:
        home = make_home(Path(name))
        guard, uncovered = agreed(home, plan), 0
        trained = set(ResidentTeacher(plan.teacher, plan.data).slots.trainable())
        for index in range(rounds):
            sent = unpack(guard.adapt(order(plan, Stage.adapt, index), start(plan)).adapter)
            uncovered += set(sent.tensors) != trained
        planted = [*STRANGERS, *(f"{name}{SCALE}" for name in sorted(trained))]
        step = PaidStep(home, plan)
        refused = sum(step.stays(name, listed) for name in planted for listed in (True, False))
        networks = [_untrainable(home, plan, plant) for plant in NETWORKS]
    figure = (
        f"{uncovered} of {rounds} rounds sent another tensor; refused {refused} of {2 * len(planted)} "
        f"planted, {sum(networks)} of {len(networks)} networks"
    )
    passed = uncovered == 0 and refused == 2 * len(planted) and all(networks)
    return Verdict("15", "what leaves is what noised steps made", figure, "0; all", passed)


def _train(home: Path, plan: RunPlan) -> list[Patient]:
    return of_split(Site.open(home).patients(plan.data, plan.seed), Split.train)


class PaidStep:
    """One noised step at ``home``, reserved, made and ready to leave; tensors are planted beside it."""

    def __init__(self, home: Path, plan: RunPlan) -> None:
        self._home, self._plan, site = home, replace(plan, run_id="planted"), Site.open(home)
        self._account = Account(site, self._plan)
        self._account.check()
        self._account.begin()
        train, self._sent = _train(home, plan), start(plan)
        paid = self._account.reserve(train)
        made = rounds.private_teacher_step(site, plan, self._sent, train, order(plan, Stage.adapt), paid)
        self._packed = pack(made.step, plan.aggregation.wire_dtype)
        self._noised = Noised(paid, frozenset(made.step.tensors))

    def stays(self, stranger: str, listed: bool) -> bool:
        """Whether nothing leaves or is on a receipt with ``stranger``, ``listed`` by the plan, beside it."""
        variant, before = self._plan.variants[0], (self._home / RECEIPTS).read_bytes()
        if listed:
            payload = variant.payload(0)
            more = [*payload.tensors, TensorSpec(stranger, [2], "bfloat16")]
            variant = replace(variant, payloads=[replace(payload, tensors=more)])
        tensors = {**self._packed.tensors, stranger: torch.ones(2, dtype=torch.bfloat16)}
        update = AdapterUpdate(replace(self._packed, tensors=tensors), 3.0, self._sent.digest, MECHANISM)
        egress = Egress(self._home.name, self._home, self._plan, variant, self._account)
        try:
            egress.release_update(Stage.adapt, 0, update, self._noised)
        except WardroundError:
            return (self._home / RECEIPTS).read_bytes() == before
        return False


def _untrainable(home: Path, plan: RunPlan, plant: Callable[[Teacher], None]) -> bool:
    """Whether the mechanism refuses the site's teacher once something is planted in it."""
    teacher, adapter = ResidentTeacher(plan.teacher, plan.data), start(plan)
    with teacher.visit(adapter, train=True) as network:
        task = segmentation_task(network, adapter, _train(home, plan), plan, None)
        trained = teacher.slots.trainable()
        ClippedSum(task, trained, 1.0, Execution())  # as it is, it can be trained
        plant(network)
        try:
            ClippedSum(task, trained, 1.0, Execution())
        except ConfigError:
            return True
    return False


def _averaged(network: Teacher) -> None:
    network.decoder.add_module("planted", AveragedModel(nn.Linear(2, 2)).requires_grad_(False))


def _counting(network: Teacher) -> None:
    """A buffer that every image changes."""
    network.decoder.register_buffer("planted", torch.zeros(()))

    def count(module: nn.Module, _: object, out: object) -> None:
        module.planted = module.planted + 1  # type: ignore[operator, assignment]

    network.decoder.register_forward_hook(count)


NETWORKS: tuple[Callable[[Teacher], None], ...] = (
    lambda network: network.decoder.add_module("planted", nn.LayerNorm(4)),  # takes gradients
    lambda network: network.decoder.add_module("planted", nn.BatchNorm2d(4).requires_grad_(False)),
    lambda network: network.decoder.add_module("planted", nn.InstanceNorm2d(4, track_running_stats=True)),
    _averaged,
    _counting,
)


# --- item 25 ------------------------------------------------------------------------------------------


def more_epsilon(plan: RunPlan) -> RunPlan:
    return replace(plan, privacy=replace(plan.privacy, noise_multiplier=1.2))


def more_metrics(plan: RunPlan) -> RunPlan:
    open_to = replace(plan.privacy, release_metrics=True)
    return replace(plan, stages=[*plan.stages, Stage.evaluate], privacy=open_to)


def other_code(plan: RunPlan) -> RunPlan:
    return replace(plan, code_sha256="c0" * 32)


def other_base(plan: RunPlan) -> RunPlan:
    return replace(plan, models=dict.fromkeys(plan.models, "ee" * 32))


ASKED: tuple[Callable[[RunPlan], RunPlan], ...] = (more_epsilon, more_metrics, other_code, other_base)


def _generator(plan: RunPlan) -> Adapter:
    return initial_adapter(plan.generator, plan.seed)


def _other_order(plan: RunPlan) -> Round:
    return replace(order(plan, Stage.adapt), plan_sha256=more_epsilon(plan).digest)


# What a courier may call that was changed to get something out without noise. Orders of another stage cost a
# step, for the guard looks at the stage when the noised step is about to leave.
VERBS: tuple[Callable[[Guard, RunPlan], object], ...] = (
    lambda guard, plan: _agrees(guard, replace(plan, privacy=PrivacyConfig())),
    lambda guard, plan: _agrees(guard, replace(plan, privacy=replace(plan.privacy, noise_multiplier=1e-3))),
    lambda guard, plan: guard.adapt(_other_order(plan), start(plan)),
    lambda guard, plan: guard.train_generator(order(plan, Stage.generator), _generator(plan)),
    lambda guard, plan: guard.train_generator(order(plan, Stage.adapt), _generator(plan)),
    lambda guard, plan: guard.style(order(plan, Stage.style)),
    lambda guard, plan: guard.style(order(plan, Stage.student)),
    lambda guard, plan: guard.evaluate(order(plan, Stage.evaluate), start(plan)),
    lambda guard, plan: guard.evaluate(order(plan, Stage.student), start(plan)),
    lambda guard, plan: guard.adapt(order(plan, Stage.generator), start(plan)),
    lambda guard, plan: guard.adapt(order(plan, Stage.student), start(plan)),
    lambda guard, plan: guard.adapt(order(plan, Stage.adapt), _not_finite(start(plan))),
)
COSTING = 2


def item_25(rounds: int) -> Verdict:
    """A server that asks for more; a courier whose code was changed; and the guard's own code changed."""
    plan = private_plan(f"privacy.steps={rounds}", f"privacy.spare_steps={COSTING}")
    with tempfile.TemporaryDirectory() as name:
        home = make_home(Path(name))
        terms = privacy_plan(plan.privacy, DECLARED)
        Office(home, plan).sign(max_epsilon_per_run=1.001 * terms.epsilon())
        guard = agreed(home, plan)
        server = sum(_refused(lambda ask=ask: _agrees(guard, ask(plan))) for ask in ASKED)
        verbs = sum(_refused(lambda verb=verb: verb(guard, plan)) for verb in VERBS)
        noised = sum(_is_noised(guard, plan) for _ in range(rounds))
        verbs += _refused(lambda: guard.adapt(order(plan, Stage.adapt), start(plan)))  # beyond the plan
        noised -= abs(rounds - len(entries(home, EntryType.commit)))
        leaves, found = _patched_inside(Path(name) / "patched")
    figure = (
        f"server: {server} of {len(ASKED)} refused; courier: {verbs} of {len(VERBS) + 1} refused, one round "
        f"asked {rounds} times noised and booked {noised} times; the guard's own code without noise, in one "
        f"process: {'leaves' if leaves else 'stays'}, and its rehearsal {'fails' if found else 'PASSES'}"
    )
    passed = server == len(ASKED) and verbs == len(VERBS) + 1 and noised == rounds and found
    return Verdict("25", "more asked than allowed; code changed", figure, "all refused or noised", passed)


def _agrees(guard: Guard, plan: RunPlan) -> object:
    """Raises what the guard does, or ``PolicyRefusal`` where its answer is no."""
    answer = guard.propose(plan, order(plan, Stage.propose))
    if not answer.agrees:
        raise PolicyRefusal(answer.code, answer.field)
    return answer


def _refused(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except WardroundError:
        return True
    return False


def _not_finite(adapter: Adapter) -> Adapter:
    return replace(adapter, tensors={name: part * float("inf") for name, part in adapter.tensors.items()})


def _is_noised(guard: Guard, plan: RunPlan) -> bool:
    """Whether the update of round 0, which may have been sent before, is as long as its noise makes it."""
    update = guard.adapt(order(plan, Stage.adapt), start(plan))
    return update.mechanism == MECHANISM and abs(_length(plan, update) - 1) < 0.03


def _length(plan: RunPlan, update: AdapterUpdate) -> float:
    """Of an update's numbers, root mean square, in units of the plan's noise."""
    terms = privacy_plan(plan.privacy, DECLARED)
    numbers = torch.cat([part.flatten() for part in unpack(update.adapter).tensors.values()])
    noise = learning_rate(plan, 0) * terms.noise_std / terms.expected_batch
    return float(numbers.double().square().mean().sqrt()) / noise


def _patched_inside(folder: Path) -> tuple[bool, bool]:
    """With the noise taken out of the mechanism: whether a guard in this process sends what comes of it, and
    whether its rehearsal fails.
    """
    plan = private_plan()

    def bare(self: PrivateGradient, clipped_sum: Tensor) -> Tensor:
        return clipped_sum / self.terms.expected_batch

    guard = agreed(make_home(folder), plan)
    with patch.object(PrivateGradient, "_noised", bare):
        sent = guard.adapt(order(plan, Stage.adapt), start(plan))
        passed = check_noise(SystemRandomness(), 1.0, 1.0, 20_000).passed
    return _length(plan, sent) < 0.5, not passed
