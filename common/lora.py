"""Low-rank adapters in a network: where they sit, how they are written and read in place.

The slots are peft's (Hu et al. 2021, LoRA) with ``lora_alpha = r``, so that a layer's weight changes by
``lora_B @ lora_A`` and nothing else. A visit to a site only copies tensors: the network is built once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from common.adapter import Adapter
from common.errors import ArtefactError

SLOT = "default"


class AdapterSlots:
    """LoRA slots of ``rank`` in the layers of ``network`` whose names end with one of ``targets``.

    ``dense`` names parameters of ``network`` that are trained as they are (a decoder). Everything else is
    frozen.

    Guarantee: after ``write(adapter)`` the network computes with exactly the base weights, the folded
    factors and the trainable factors of that adapter; nothing of an earlier visit is left.
    """

    def __init__(
        self, network: nn.Module, targets: Sequence[str], rank: int, dense: Sequence[str], base_sha256: str
    ) -> None:
        self.network, self.rank, self.base_sha256 = network, rank, base_sha256
        self._dense = {name: network.get_parameter(name) for name in dense}
        config = LoraConfig(
            r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(targets), bias="none"
        )
        inject_adapter_in_model(config, network, adapter_name=SLOT)
        self._layers = {
            name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)
        }
        # As shipped: the live values are those of whichever visit was last.
        self._pristine = {name: self._base(layer).detach().clone() for name, layer in self._layers.items()}
        self._shipped = {name: parameter.detach().clone() for name, parameter in self._dense.items()}
        for parameter in network.parameters():
            parameter.requires_grad_(False)

    @staticmethod
    def _base(layer: LoraLayer) -> Tensor:
        weight = layer.get_base_layer().weight
        assert isinstance(weight, Tensor)
        return weight

    def trainable(self) -> dict[str, nn.Parameter]:
        """Adapter name -> live parameter of everything that a site trains."""
        found: dict[str, nn.Parameter] = {}
        for name, layer in self._layers.items():
            found[f"{name}.lora_A"] = layer.lora_A[SLOT].weight
            found[f"{name}.lora_B"] = layer.lora_B[SLOT].weight
        return {**found, **self._dense}

    def initial(self, seed: int) -> Adapter:
        """The adapter to start a run from: A uniform as LoRA's authors have it, B zero, dense as shipped."""
        generator = torch.Generator().manual_seed(seed)
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.trainable().items():
            if name in self._shipped:
                tensors[name] = self._shipped[name].clone()
                continue
            shape = parameter.flatten(1).shape
            if name.endswith(".lora_A"):
                bound = (1.0 / shape[1]) ** 0.5  # kaiming_uniform with a = sqrt(5)
                tensors[name] = (torch.rand(shape, generator=generator) * 2 - 1) * bound
            else:
                tensors[name] = torch.zeros(shape)
        return Adapter(tensors, self.base_sha256, self.rank)

    @torch.no_grad()
    def write(self, adapter: Adapter) -> None:
        """Load ``adapter`` in place. Raises ``ArtefactError``, before anything changes, if it is no fit."""
        self._check(adapter)
        for name, layer in self._layers.items():
            weight = self._base(layer)
            weight.copy_(self._pristine[name])
            if f"{name}.folded_A" in adapter.tensors:
                folded = adapter.tensors[f"{name}.folded_B"] @ adapter.tensors[f"{name}.folded_A"]
                weight.add_(folded.view_as(weight))
        for name, parameter in self.trainable().items():
            parameter.copy_(adapter.tensors[name].view_as(parameter))

    @contextmanager
    def visit(self, adapter: Adapter, train: bool) -> Iterator[None]:
        """Write ``adapter``; its tensors take gradients inside the block if ``train``, and never outside."""
        self.write(adapter)
        for parameter in self.trainable().values():
            parameter.requires_grad_(train)
        try:
            yield
        finally:
            for parameter in self.trainable().values():
                parameter.requires_grad_(False)
                parameter.grad = None

    def read(self) -> Adapter:
        """The trained tensors, cloned; factors are (r, in) and (out, r)."""
        tensors = {
            name: (value.detach().flatten(1) if ".lora_" in name else value.detach()).clone()
            for name, value in self.trainable().items()
        }
        return Adapter(tensors, self.base_sha256, self.rank)

    def _check(self, adapter: Adapter) -> None:
        if adapter.base_sha256 != self.base_sha256:
            raise ArtefactError(
                f"the adapter belongs to base {adapter.base_sha256[:12]}, this network is "
                f"{self.base_sha256[:12]}: use the adapter's own base model"
            )
        live = self.trainable()
        given = {name for name in adapter.tensors if ".folded_" not in name}
        faults = [f"missing tensor {name}" for name in sorted(set(live) - given)]
        faults += [f"unknown tensor {name}" for name in sorted(given - set(live))]
        for name in sorted(given & set(live)):
            if adapter.tensors[name].numel() != live[name].numel():
                faults.append(f"{name} has shape {tuple(adapter.tensors[name].shape)}")
        for name in sorted(set(adapter.tensors) - given):
            layer, _, kind = name.rpartition(".")
            partner = f"{layer}.{'folded_B' if kind == 'folded_A' else 'folded_A'}"
            if layer not in self._layers or partner not in adapter.tensors:
                faults.append(f"folded factor without its layer or partner: {name}")
        if faults:
            raise ArtefactError("the adapter does not fit this network", faults)
