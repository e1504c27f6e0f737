"""What cannot be trained with differential privacy is refused, by name, before a patient's image is used."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from client.dp.mechanism import ClippedSum, Execution, PrivateGradient
from client.dp.randomness import SeededRandomness
from client.dp.trained import refuse_uncovered
from common.errors import ConfigError, PolicyRefusal
from tests.unit.dp_tasks import PATIENTS, TableTask, Terms, dino, lora_task, sam, trained_of


class Shared(nn.Module):
    """Two layers, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, given: Tensor) -> Tensor:
        return self.two(self.one(given))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, given: Tensor) -> Tensor:
        return self.layer(self.layer(given))


class Bypassed(nn.Module):
    """The layer is run, and its weight is used again past it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, given: Tensor) -> Tensor:
        return self.layer(given) + F.linear(given, self.layer.weight)


class Mixing(nn.Module):
    """Images see their batch's mean: no layer is suspicious."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.layer(given)
        return hidden - hidden.mean(0, keepdim=True)


class TokensFirst(nn.Module):
    """(B, 8) as 4 tokens a row, handed to the layer with the tokens along the first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, given: Tensor) -> Tensor:
        return self.layer(given.view(len(given), 4, 2).transpose(0, 1)).transpose(0, 1)


class Counting(nn.Module):
    """Keeps the mean of all that passes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, given: Tensor) -> Tensor:
        self.seen = self.seen + given.detach().mean()
        return self.layer(given)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.positions = nn.Linear(4, 4), nn.Parameter(torch.zeros(4))

    def forward(self, given: Tensor) -> Tensor:
        return self.layer(given + self.positions)


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, given: Tensor) -> Tensor:
        return self.layer(given)


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)

    def forward(self, given: Tensor) -> Tensor:
        return self.table(given.argmax(1))


def after_linear(last: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(4, 4), last)


def mirrored() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"))


BOTH_WAYS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm": (after_linear(nn.BatchNorm1d(4)), "network.1 is a batch norm"),
    "batch norm at rest": (after_linear(nn.BatchNorm1d(4).eval().requires_grad_(False)), "batch norm"),
    "running statistics": (
        after_linear(nn.InstanceNorm1d(1, track_running_stats=True)),
        "running statistics",
    ),
    "moving average": (lambda: AveragedModel(nn.Linear(4, 4)), "keeps an average of weights"),
    "embedding table": (Rows, "network.table.weight is an embedding table"),
    "shared parameter": (Shared, "network.one.weight is used by network.one and network.two"),
    "images mixed": (Mixing, "network.layer.weight"),
    "buffer": (Counting, "network.seen changes as images pass"),
}
ONE_PASS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "run twice": (Twice, "network.layer is run twice"),
    "used past its layer": (Bypassed, "network.layer.weight"),
    "not run": (Idle, "network.idle"),
    "bare parameter": (Positions, "network.positions belongs to a Positions"),
    "layer without a rule": (after_linear(nn.PReLU()), "network.1.weight belongs to a PReLU"),
    "padding by reflection": (mirrored, "network.1.weight"),
}


def table_task(network: nn.Module, width: int = 4) -> TableTask:
    torch.manual_seed(0)
    return TableTask(network, torch.rand(7, width), PATIENTS)


def build(task: TableTask, reference: bool = False) -> ClippedSum:
    return ClippedSum(task, trained_of(task), 1.0, Execution(8, reference))


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("what", BOTH_WAYS)
def test_no_way_trains(what: str, reference: bool) -> None:
    network, said = BOTH_WAYS[what]
    with pytest.raises(ConfigError) as refusal:
        build(table_task(network()), reference)
    assert said in str(refusal.value)


@pytest.mark.parametrize("what", ONE_PASS)
def test_one_pass_does_not_train(what: str) -> None:
    network, said = ONE_PASS[what]
    with pytest.raises(ConfigError) as refusal:
        build(table_task(network()))
    assert said in str(refusal.value)


@pytest.mark.parametrize("what", ONE_PASS)
def test_the_reference_trains_what_one_pass_does_not(what: str) -> None:
    build(table_task(ONE_PASS[what][0]()), reference=True)([[0]])


def test_one_pass_does_not_train_layers_with_the_tokens_first() -> None:
    with pytest.raises(ConfigError, match=r"network\.layer"):
        build(table_task(TokensFirst(), width=8))


def test_a_tensor_that_takes_gradients_outside_the_mechanism_is_refused() -> None:
    task = lora_task(sam(3), 1)
    trained = trained_of(task)
    task.network.decoder.head.bias.requires_grad_(True)
    task.network.encoder.vision_encoder.layers[0].layer_norm1.weight.requires_grad_(True)
    with pytest.raises(ConfigError) as refusal:
        ClippedSum(task, trained, 1.0, Execution())
    assert [fault.split()[0] for fault in refusal.value.faults] == [
        "network.encoder.vision_encoder.layers.0.layer_norm1.weight",
        "network.decoder.head.bias",
    ]


def test_a_tensor_that_the_network_does_not_have_is_refused() -> None:
    task = table_task(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="stranger is no parameter"):
        ClippedSum(task, {**trained_of(task), "stranger": nn.Parameter(torch.ones(1))}, 1.0, Execution())


@pytest.mark.parametrize(
    "planted", ["decoder.ema", "encoder.norm.weight", "running_mean", "optimiser.exp_avg"]
)
def test_an_outgoing_tensor_that_no_noised_step_made_is_refused(planted: str) -> None:
    names = trained_of(lora_task(dino(), 1))
    refuse_uncovered(names, names)
    with pytest.raises(PolicyRefusal, match=planted) as refusal:
        refuse_uncovered([*names, planted], names)
    assert refusal.value.field == "payload.outbound"


def test_a_batch_too_small_for_one_patient_is_refused() -> None:
    task = table_task(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="max_images_per_patient 3"):
        PrivateGradient(task, trained_of(task), Terms(), SeededRandomness(0), Execution(2))


@pytest.mark.parametrize("reference", [False, True])
def test_probing_reads_no_image_and_changes_no_weight(reference: bool) -> None:
    """The table is not a number anywhere: one look at it would spoil the probe."""
    task = table_task(nn.Linear(4, 4))
    task.table.fill_(torch.nan)
    before = {name: live.detach().clone() for name, live in trained_of(task).items()}
    build(task, reference)
    assert all(torch.equal(live, before[name]) for name, live in trained_of(task).items())
