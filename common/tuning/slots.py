"""Adapters in a network: where their tensors sit, how they are written and read in place.

The slots for factors are peft's (Hu et al. 2021, LoRA) with ``lora_alpha = r``, so that a layer's weight
changes by ``lora_B @ lora_A`` and nothing else. A visit to a site only moves tensors: the network is built
once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from common.adapter import Adapter
from common.errors import ArtefactError
from common.seeding import derive_seed
from common.tuning.halves import B_ALONE, BOTH, Halves, without

SLOT = "default"
_Network = TypeVar("_Network", bound=nn.Module)


@dataclass(frozen=True)
class SlotPlan:
    """What an adapter of a network consists of.

    Attributes:
        layers: full names of the layers that carry factors of ``rank``; each linear or a convolution.
        dense: full names of the parameters that are trained as they are.
        train_a: False: the factors A are written but never trained.
    """

    base_sha256: str
    preset: str
    rank: int
    layers: tuple[str, ...]
    dense: tuple[str, ...] = ()
    train_a: bool = True


class AdapterSlots:
    """Slots for the adapters of ``plan`` in ``network``, all of whose other parameters are frozen.

    Guarantees: after ``write(adapter)`` the network computes with exactly the base weights, the folded
    factors and the trained tensors of that adapter; nothing of an earlier visit is left. The tensors of the
    base are never written to, so that several networks may share them; a layer with folded factors gets a
    weight of its own until the next write.
    """

    def __init__(self, network: nn.Module, plan: SlotPlan) -> None:
        self.network, self.plan = network, plan
        self._inject()
        self._dense = {name: network.get_parameter(name) for name in plan.dense}
        for parameter in self._dense.values():
            parameter.data = parameter.data.clone()  # trained in place, so no other network may see it
        self._shipped = {name: parameter.detach().clone() for name, parameter in self._dense.items()}
        self._folded: dict[str, Tensor] = {}  # layer with folded factors -> its weight without them
        for parameter in network.parameters():
            parameter.requires_grad_(False)

    def _inject(self) -> None:
        if self.plan.layers:
            rank, targets = self.plan.rank, list(self.plan.layers)
            config = LoraConfig(
                r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=targets, bias="none"
            )
            inject_adapter_in_model(config, self.network, adapter_name=SLOT)
        found = {
            name: module for name, module in self.network.named_modules() if isinstance(module, LoraLayer)
        }
        # peft matches the ends of names; a layer more or fewer than asked for would train unseen.
        assert set(found) == set(self.plan.layers), sorted(set(found) ^ set(self.plan.layers))
        self._layers = {name: found[name] for name in self.plan.layers}

    def tensors(self) -> dict[str, nn.Parameter]:
        """Adapter name -> live parameter of everything that an adapter of this network holds."""
        found: dict[str, nn.Parameter] = {}
        for name, layer in self._layers.items():
            found[f"{name}.lora_A"] = layer.lora_A[SLOT].weight
            found[f"{name}.lora_B"] = layer.lora_B[SLOT].weight
        return {**found, **self._dense}

    def trainable(self, halves: Halves = BOTH) -> dict[str, nn.Parameter]:
        """Of `tensors`, those that a site trains; of the factors only ``halves``."""
        left = without(halves if self.plan.train_a else halves & B_ALONE)
        return {name: live for name, live in self.tensors().items() if not name.endswith(left)}

    def initial(self, seed: int) -> Adapter:
        """The adapter to start a run from: A uniform as LoRA's authors have it, B zero, dense as shipped.

        The first rows of a layer's A are the same at every rank and in every preset.
        """
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.tensors().items():
            if name in self._shipped:
                tensors[name] = self._shipped[name].clone()
                continue
            shape = parameter.flatten(1).shape
            if name.endswith(".lora_A"):
                generator = torch.Generator().manual_seed(derive_seed(seed, name))
                bound = (1.0 / shape[1]) ** 0.5  # kaiming_uniform with a = sqrt(5)
                tensors[name] = (torch.rand(shape, generator=generator) * 2 - 1) * bound
            else:
                tensors[name] = torch.zeros(shape)
        return self._adapter(tensors)

    @torch.no_grad()
    def write(self, adapter: Adapter) -> None:
        """Load ``adapter`` in place.

        Factors may be folded into any linear layer or convolution, with slots or without.

        Raises ``ArtefactError``, before anything changes, if it belongs to another base, preset or rank, or
        if a name or shape is not the network's.
        """
        self._check(adapter)
        for name, weight in self._folded.items():
            self._base(name).data = weight
        self._folded = {}
        for name in adapter.folded_layers():
            live = self._base(name)
            self._folded[name] = live.data
            folded = adapter.tensors[f"{name}.folded_B"] @ adapter.tensors[f"{name}.folded_A"]
            live.data = live.data + folded.view_as(live)
        for name, parameter in self.tensors().items():
            parameter.copy_(adapter.tensors[name].view_as(parameter))

    @contextmanager
    def visit(self, adapter: Adapter, train: bool, halves: Halves = BOTH) -> Iterator[None]:
        """Write ``adapter``; ``trainable(halves)`` takes gradients inside if ``train``, and never outside."""
        self.write(adapter)
        for parameter in self.trainable(halves).values():
            parameter.requires_grad_(train)
        try:
            yield
        finally:
            for parameter in self.trainable().values():
                parameter.requires_grad_(False)
                parameter.grad = None

    def read(self) -> Adapter:
        """The adapter's own tensors, cloned, without folded factors; factors are (r, in) and (out, r)."""
        tensors = {
            name: (value.detach().flatten(1) if ".lora_" in name else value.detach()).clone()
            for name, value in self.tensors().items()
        }
        return self._adapter(tensors)

    def _adapter(self, tensors: dict[str, Tensor]) -> Adapter:
        return Adapter(tensors, self.plan.base_sha256, self.plan.rank, self.plan.preset)

    def _base(self, layer: str) -> nn.Parameter:
        """The frozen weight of ``layer``. Raises ``AttributeError`` if it has none."""
        module = self.network.get_submodule(layer)
        if isinstance(module, LoraLayer):
            module = module.get_base_layer()
        if not isinstance(module, nn.Linear | nn.Conv2d):
            raise AttributeError(layer)
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def _check(self, adapter: Adapter) -> None:
        self._check_kind(adapter)
        live = self.tensors()
        given = {name for name in adapter.tensors if ".folded_" not in name}
        faults = [f"missing tensor {name}" for name in sorted(set(live) - given)]
        faults += [f"unknown tensor {name}" for name in sorted(given - set(live))]
        for name in sorted(given & set(live)):
            wanted = live[name].flatten(1).shape if ".lora_" in name else live[name].shape
            if adapter.tensors[name].shape != wanted:
                faults.append(f"{name} has shape {tuple(adapter.tensors[name].shape)}, not {tuple(wanted)}")
        faults += [fault for name in adapter.folded_layers() for fault in self._fold_faults(adapter, name)]
        if faults:
            raise ArtefactError("the adapter does not fit this network", faults)

    def _check_kind(self, adapter: Adapter) -> None:
        if adapter.base_sha256 != self.plan.base_sha256:
            raise ArtefactError(
                f"the adapter belongs to base {adapter.base_sha256[:12]}, this network is "
                f"{self.plan.base_sha256[:12]}: use the adapter's own base model"
            )
        faults = []
        if adapter.preset != self.plan.preset:
            faults.append(f"it is of preset {adapter.preset}, this network's is {self.plan.preset}")
        if adapter.rank != self.plan.rank:
            faults.append(f"it is of rank {adapter.rank}, this network's is {self.plan.rank}")
        if faults:
            raise ArtefactError("the adapter is another one: set its own adapter and rank", faults)

    def _fold_faults(self, adapter: Adapter, layer: str) -> list[str]:
        a, b = (adapter.tensors.get(f"{layer}.folded_{half}") for half in "AB")
        try:
            weight = self._base(layer)
        except AttributeError:
            return [f"folded factors for {layer}, which is no linear layer or convolution here"]
        if a is None or b is None:
            return [f"folded factor of {layer} without its partner"]
        if f"{layer}.weight" in self._dense:
            return [f"folded factors for {layer}, whose weight is trained as it is"]
        out, inside = weight.flatten(1).shape
        if a.ndim != 2 or a.shape[1] != inside or b.shape != (out, a.shape[0]):
            return [f"folded factors of {layer} have shapes {tuple(a.shape)} and {tuple(b.shape)}"]
        return []


def sharing_copy(network: _Network) -> _Network:
    """A network of its own whose parameters and buffers are the same memory as those of ``network``."""
    shared: dict[int, Any] = {id(buffer): buffer for buffer in network.buffers()}
    shared |= {id(p): nn.Parameter(p.data, requires_grad=False) for p in network.parameters()}
    return copy.deepcopy(network, shared)
