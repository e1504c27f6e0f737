"""What can be trained under the mechanism, and what is refused before a patient's image is read.

A gradient that is one patient's alone needs a network that treats each image by itself, and parameters each
of which is used once, by a layer that says how. Everything else is named here.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from common.errors import ConfigError, PolicyRefusal

Trained = Mapping[str, nn.Parameter]  # name in an adapter -> live parameter


class Use(NamedTuple):
    """``module`` at ``path`` has a trained parameter at its ``attribute``, called ``name`` in an adapter."""

    path: str
    module: nn.Module
    attribute: str
    name: str


@dataclass(frozen=True)
class TrainedLayer:
    """A layer, and what of it is trained: attribute (``weight``, ``bias``) -> name in an adapter."""

    path: str
    module: nn.Module
    names: Mapping[str, str]


class Layout:
    """Where each of ``trained`` lies in one long row of numbers.

    A patient's gradient is one row: its norm is taken and it is scaled as a whole.

    Attributes:
        width: of a row.
        places: name -> its part of a row.
    """

    def __init__(self, trained: Trained) -> None:
        self.width = 0
        self.places: dict[str, slice] = {}
        self._shapes = {name: parameter.shape for name, parameter in trained.items()}
        for name, shape in self._shapes.items():
            self.places[name] = slice(self.width, self.width + shape.numel())
            self.width += shape.numel()

    def split(self, row: Tensor) -> dict[str, Tensor]:
        """``row`` (width,) as name -> tensor of the parameter's shape, sharing memory."""
        return {name: row[place].view(self._shapes[name]) for name, place in self.places.items()}


def trained_layers(network: nn.Module, trained: Trained) -> list[TrainedLayer]:
    """The layers of ``network`` that hold ``trained``, each once."""
    layers: dict[str, dict[str, str]] = {}
    for use in _uses(network, trained):
        layers.setdefault(use.path, {})[use.attribute] = use.name
    return [TrainedLayer(path, network.get_submodule(path), names) for path, names in layers.items()]


def refuse_untrainable(
    network: nn.Module, trained: Trained, known: Container[type[nn.Module]] | None = None
) -> None:
    """Refuse what would break the promise of one clipped gradient a patient.

    Args:
        network: all that the loss runs through.
        trained: what the mechanism noises.
        known: exact types of layers that the one-pass path has a rule for; None: the reference, for all.

    Raises:
        ConfigError: listing every fault with the name of the parameter or layer.
    """
    faults = [*_mixing_layers(network), *_outside(network, trained), *_misplaced(network, trained)]
    if known is not None:
        faults += _without_rule(network, trained, known)
    if faults:
        raise ConfigError("this network cannot be trained with differential privacy", faults)


def refuse_uncovered(outgoing: Iterable[str], trained: Container[str]) -> None:
    """Refuse to send a tensor that no noised step made.

    Raises:
        PolicyRefusal: naming every such tensor; one alone ends a site's whole guarantee.
    """
    if strange := sorted(name for name in outgoing if name not in trained):
        raise PolicyRefusal(
            f"not made by the private mechanism: {', '.join(strange)}; send only what it trains",
            field="payload.outbound",
        )


def _uses(network: nn.Module, trained: Trained) -> list[Use]:
    names = {id(parameter): name for name, parameter in trained.items()}
    return [
        Use(path, module, attribute, names[id(parameter)])
        for path, module in network.named_modules()
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(parameter) in names
    ]


def _mixing_layers(network: nn.Module) -> list[str]:
    """Layers whose output for one image depends on other images, or that keep something of them."""
    faults = []
    for path, module in network.named_modules():
        if isinstance(module, _BatchNorm):
            faults.append(f"{path} is a batch norm, which mixes patients: use group or layer norm")
        elif getattr(module, "track_running_stats", False):
            faults.append(f"{path} keeps running statistics of patients: switch track_running_stats off")
        elif isinstance(module, AveragedModel):
            faults.append(f"{path or 'the network'} keeps an average of weights: average what was sent")
    return faults


def _outside(network: nn.Module, trained: Trained) -> list[str]:
    inside = {id(parameter) for parameter in trained.values()}
    return [
        f"{name} takes gradients, and the mechanism does not know it: freeze it"
        for name, parameter in network.named_parameters()
        if parameter.requires_grad and id(parameter) not in inside
    ]


def _misplaced(network: nn.Module, trained: Trained) -> list[str]:
    places: dict[str, list[Use]] = {name: [] for name in trained}
    for use in _uses(network, trained):
        places[use.name].append(use)
    faults = []
    for name, uses in places.items():
        if not uses:
            faults.append(f"{name} is no parameter of the network: train what the loss runs through")
        elif len(uses) > 1:
            paths = " and ".join(use.path or "the network itself" for use in uses)
            faults.append(f"{name} is used by {paths}: a parameter may be used once")
        elif isinstance(uses[0].module, nn.Embedding | nn.EmbeddingBag):
            faults.append(f"{name} is an embedding table, which shows what rows were used: freeze it")
    return faults


def _without_rule(network: nn.Module, trained: Trained, known: Container[type[nn.Module]]) -> list[str]:
    return [
        f"{use.name} belongs to a {type(use.module).__name__}, which has no one-pass rule: "
        "freeze it, or take the reference path"
        for use in _uses(network, trained)
        if type(use.module) not in known and not isinstance(use.module, nn.Embedding | nn.EmbeddingBag)
    ]
