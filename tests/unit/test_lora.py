"""Slots for adapters in a network, against dense algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from common.adapter import Adapter
from common.errors import ArtefactError
from common.lora import AdapterSlots


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.qkv = nn.Linear(5, 7)
        self.head = nn.Linear(7, 2)

    def forward(self, image: Tensor) -> Tensor:
        result: Tensor = self.head(torch.tanh(self.qkv(self.conv(image).mean((2, 3)))))
        return result


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def slots_of(net: Net) -> AdapterSlots:
    return AdapterSlots(net, ["conv", "qkv"], rank=2, dense=["head.weight", "head.bias"], base_sha256="base")


def random_adapter(slots: AdapterSlots, seed: int, folded: bool = False) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    start = slots.initial(seed)
    tensors = {k: torch.randn(v.shape, generator=generator) for k, v in start.tensors.items()}
    if folded:
        tensors["qkv.folded_A"] = torch.randn(3, 5, generator=generator)
        tensors["qkv.folded_B"] = torch.randn(7, 3, generator=generator)
    return Adapter(tensors, "base", 2)


@pytest.mark.parametrize("folded", [False, True])
def test_a_written_adapter_equals_the_dense_weight_change(net: Net, folded: bool) -> None:
    image = torch.randn(4, 3, 6, 6)
    dense = Net()
    dense.load_state_dict(net.state_dict())
    slots = slots_of(net)
    adapter = random_adapter(slots, 1, folded)
    slots.write(adapter)
    with torch.no_grad():
        dense.qkv.weight += adapter.change("qkv")
        dense.conv.weight += adapter.change("conv").view_as(dense.conv.weight)
        dense.head.weight.copy_(adapter.tensors["head.weight"])
        dense.head.bias.copy_(adapter.tensors["head.bias"])
    assert torch.allclose(net(image), dense(image), atol=1e-5)


def test_write_leaves_nothing_of_an_earlier_visit(net: Net) -> None:
    image = torch.randn(4, 3, 6, 6)
    slots = slots_of(net)
    wanted = random_adapter(slots, 1)
    slots.write(wanted)
    alone = net(image).detach().clone()
    slots.write(random_adapter(slots, 2, folded=True))
    slots.write(wanted)
    assert torch.equal(net(image), alone)


def test_the_initial_adapter_changes_nothing(net: Net) -> None:
    image = torch.randn(4, 3, 6, 6)
    before = net(image).detach().clone()
    slots = slots_of(net)
    slots.write(slots.initial(3))
    assert torch.allclose(net(image), before, atol=1e-6)


def test_the_initial_adapter_is_the_same_after_any_visit(net: Net) -> None:
    slots = slots_of(net)
    before = slots.initial(3).digest
    slots.write(random_adapter(slots, 1))
    assert slots.initial(3).digest == before


def test_read_returns_what_was_written_and_no_alias(net: Net) -> None:
    slots = slots_of(net)
    adapter = random_adapter(slots, 1)
    slots.write(adapter)
    read = slots.read()
    assert read.digest == adapter.digest
    slots.write(random_adapter(slots, 2))
    assert read.digest == adapter.digest


def test_only_slots_and_dense_tensors_take_gradients_and_only_during_a_visit(net: Net) -> None:
    slots = slots_of(net)
    with slots.visit(random_adapter(slots, 1), train=True):
        net(torch.randn(2, 3, 6, 6)).sum().backward()
        trained = {name for name, p in net.named_parameters() if p.grad is not None}
        assert all("lora_" in name or name.startswith("head.") for name in trained)
        assert len(trained) == len(slots.trainable())
    assert not any(p.requires_grad or p.grad is not None for p in net.parameters())


def test_an_adapter_of_another_base_is_refused_before_anything_changes(net: Net) -> None:
    slots = slots_of(net)
    slots.write(random_adapter(slots, 1))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    other = random_adapter(slots, 2)
    with pytest.raises(ArtefactError, match="belongs to base"):
        slots.write(Adapter(other.tensors, "another base", 2))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_every_misfit_is_named_at_once(net: Net) -> None:
    slots = slots_of(net)
    tensors = dict(random_adapter(slots, 1).tensors)
    del tensors["head.bias"]
    tensors["extra"] = torch.zeros(1)
    tensors["qkv.lora_A"] = torch.zeros(9, 9)
    tensors["qkv.folded_A"] = torch.zeros(1, 5)
    with pytest.raises(ArtefactError) as caught:
        slots.write(Adapter(tensors, "base", 2))
    assert len(caught.value.faults) == 4
