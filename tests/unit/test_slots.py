"""Slots for adapters in a network, against dense algebra."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.adapter import Adapter
from common.errors import ArtefactError
from common.tuning.halves import A_ALONE, B_ALONE, Halves
from common.tuning.slots import AdapterSlots, SlotPlan, sharing_copy


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


PLAN = SlotPlan("base", "lite", 2, layers=("conv", "qkv"), dense=("head.weight", "head.bias"))


def slots_of(net: Net) -> AdapterSlots:
    return AdapterSlots(net, PLAN)


def random_adapter(slots: AdapterSlots, seed: int, folded: bool = False) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    start = slots.initial(seed)
    tensors = {k: torch.randn(v.shape, generator=generator) for k, v in start.tensors.items()}
    if folded:
        tensors["qkv.folded_A"] = torch.randn(3, 5, generator=generator)
        tensors["qkv.folded_B"] = torch.randn(7, 3, generator=generator)
    return Adapter(tensors, "base", 2, "lite")


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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base_sha256": "another base"}, "belongs to base"),
        ({"preset": "base"}, "of preset base, this network's is lite"),
        ({"rank": 3}, "of rank 3, this network's is 2"),
    ],
    ids=["base", "preset", "rank"],
)
def test_an_adapter_of_another_base_preset_or_rank_is_refused_before_anything_changes(
    net: Net, change: dict[str, Any], said: str
) -> None:
    """Its tensors fit to the last element: only what it says of itself is wrong."""
    slots = slots_of(net)
    slots.write(random_adapter(slots, 1))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ArtefactError, match=said) as caught:
        slots.write(replace(random_adapter(slots, 2), **change))
    assert caught.value.exit_code == 12
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_every_misfit_is_named_at_once(net: Net) -> None:
    slots = slots_of(net)
    tensors = dict(random_adapter(slots, 1).tensors)
    del tensors["head.bias"]
    tensors["extra"] = torch.zeros(1)
    tensors["qkv.lora_A"] = torch.zeros(9, 9)
    tensors["qkv.folded_A"] = torch.zeros(1, 5)
    with pytest.raises(ArtefactError) as caught:
        slots.write(Adapter(tensors, "base", 2, "lite"))
    assert len(caught.value.faults) == 4


def folded(out: int, inside: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    """A pair of factors of rank 3: (3, in) and (out, 3)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, inside, generator=generator), torch.randn(out, 3, generator=generator)


def test_factors_fold_into_a_layer_without_slots_and_leave_with_the_next_adapter(net: Net) -> None:
    image = torch.randn(4, 3, 6, 6)
    shipped = net.qkv.weight.detach().clone()
    slots = AdapterSlots(net, replace(PLAN, layers=("conv",)))
    plain = slots.initial(0)
    slots.write(plain)
    before = net(image).clone()
    a, b = folded(7, 5)
    slots.write(replace(plain, tensors={**plain.tensors, "qkv.folded_A": a, "qkv.folded_B": b}))
    assert torch.equal(net.qkv.weight, shipped + b @ a)
    assert not torch.equal(net(image), before)
    slots.write(plain)
    assert torch.equal(net.qkv.weight, shipped)
    assert torch.equal(net(image), before)


@pytest.mark.parametrize(
    ("layer", "sizes", "said"),
    [
        ("nowhere", (7, 5), "no linear layer"),
        ("head", (2, 7), "trained as it is"),
        ("qkv", (5, 7), "have shapes"),
    ],
)
def test_factors_that_cannot_be_folded_are_named(
    net: Net, layer: str, sizes: tuple[int, int], said: str
) -> None:
    slots = slots_of(net)
    adapter = random_adapter(slots, 1)
    a, b = folded(*sizes)
    with pytest.raises(ArtefactError) as caught:
        slots.write(
            replace(adapter, tensors={**adapter.tensors, f"{layer}.folded_A": a, f"{layer}.folded_B": b})
        )
    assert said in caught.value.faults[0]


def test_networks_that_share_a_base_do_not_see_each_others_adapters() -> None:
    """The memory of the base is one; what an adapter changes is each network's own."""
    torch.manual_seed(0)
    image, base = torch.randn(4, 3, 6, 6), Net()
    alone = base(image).detach().clone()
    first, second = sharing_copy(base), sharing_copy(base)
    assert first.qkv.weight.data_ptr() == second.qkv.weight.data_ptr()
    slots, others = slots_of(first), AdapterSlots(second, replace(PLAN, layers=("conv",)))
    others.write(others.initial(1))
    before = second(image).clone()
    with slots.visit(random_adapter(slots, 1, folded=True), train=True):
        first(image).sum().backward()
        torch.optim.SGD(slots.trainable().values(), lr=1.0).step()
    assert torch.equal(second(image), before)
    assert torch.equal(base(image), alone)


def test_a_fixed_a_is_written_and_read_but_takes_no_gradient(net: Net) -> None:
    slots = AdapterSlots(net, replace(PLAN, preset="dp", train_a=False))
    adapter = slots.initial(4)
    with slots.visit(adapter, train=True):
        net(torch.randn(2, 3, 6, 6)).sum().backward()
        assert net.qkv.lora_A["default"].weight.grad is None  # type: ignore[union-attr, index]
        assert net.qkv.lora_B["default"].weight.grad is not None  # type: ignore[union-attr, index]
    assert slots.read().digest == adapter.digest
    assert not any(name.endswith("lora_A") for name in [*slots.trainable(), *adapter.trained().tensors])


@pytest.mark.parametrize(("halves", "kind"), [(A_ALONE, "lora_A"), (B_ALONE, "lora_B")])
def test_only_the_half_whose_turn_it_is_takes_gradients(net: Net, halves: Halves, kind: str) -> None:
    slots = slots_of(net)
    adapter = random_adapter(slots, 4)
    with slots.visit(adapter, train=True, halves=halves):
        net(torch.randn(2, 3, 6, 6)).sum().backward()
        took = {name for name, live in slots.tensors().items() if live.grad is not None}
        assert took == set(slots.trainable(halves)) == set(adapter.trained(halves).tensors)
        assert took == {f"conv.{kind}", f"qkv.{kind}", "head.weight", "head.bias"}
    assert not any(p.requires_grad or p.grad is not None for p in net.parameters())


def test_while_b_is_zero_a_has_no_gradient(net: Net) -> None:
    """Why B has the first turn."""
    slots = slots_of(net)
    with slots.visit(slots.initial(4), train=True):
        net(torch.randn(2, 3, 6, 6)).square().sum().backward()
        gradients = {name: live.grad for name, live in slots.tensors().items() if ".lora_" in name}
    assert all(gradients[f"{layer}.lora_A"].abs().sum() == 0 for layer in PLAN.layers)  # type: ignore[union-attr]
    assert all(gradients[f"{layer}.lora_B"].abs().sum() > 0 for layer in PLAN.layers)  # type: ignore[union-attr]


def test_the_first_rows_of_a_are_the_same_at_every_rank() -> None:
    low, high = (AdapterSlots(Net(), replace(PLAN, rank=rank)).initial(9) for rank in (2, 4))
    assert torch.equal(low.tensors["qkv.lora_A"], high.tensors["qkv.lora_A"][:2])
