"""What every aggregation rule does alike: weights, dense tensors, checks, state.

A rule is driven once a round: ``open_round``, ``fold`` for each reply, ``close_round``; before it,
``adapter_for`` says what each site is sent. A reply is added into running sums and then forgotten, so
that memory does not grow with sites. Sums are float64, in the order folded: callers fold in the
sorted order of the sites' names, and then a run is reproducible to the bit.

What is folded in an open round changes nothing that ``adapter_for``, ``global_adapter`` and ``state``
show until ``close_round`` has succeeded.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from common.adapter import FACTOR_SUFFIXES, Adapter, AdapterUpdate
from common.errors import ArtefactError, ConfigError, FederationError
from common.recipe import AggregationConfig


def is_factor(name: str) -> bool:
    """Whether tensor ``name`` is a low-rank factor rather than a dense tensor."""
    return name.rpartition(".")[2] in FACTOR_SUFFIXES


class AggregationRule(ABC):
    """One way to make the next adapter from the sites' updates.

    Subclasses say what happens to the factors of a layer; `start` must come first, or `restore`.
    """

    name: ClassVar[str]

    def __init__(self, config: AggregationConfig) -> None:
        self.config = config
        self._initial: Adapter | None = None
        self._ranks: dict[str, int] = {}
        self._dense: dict[str, Tensor] = {}
        self._round: dict[str, float] | None = None  # site -> weight, of the replies folded so far
        self._dense_sums: dict[str, Tensor] = {}

    # ---- what a rule is asked -------------------------------------------------------------------

    def start(self, initial: Adapter, ranks: Mapping[str, int]) -> None:
        """Begin a run from ``initial``; ``ranks`` gives each site's rank of trainable factors.

        Raises:
            ConfigError: if a rank is not served by this rule; every such site is listed.
            ArtefactError: if ``initial`` lacks a factor.
        """
        self._check_start(initial, ranks)
        self._initial = initial
        self._ranks = dict(ranks)
        self._dense = {
            name: tensor.clone() for name, tensor in initial.tensors.items() if not is_factor(name)
        }
        self._round = None
        self._start_layers(initial)

    def adapter_for(self, site: str) -> Adapter:
        """What ``site`` is sent: trainable factors of its rank, folded factors if any, dense tensors.

        Raises ``ArtefactError`` for a site that `start` was not told of.
        """
        return self._adapter(self._rank_of(site))

    def global_adapter(self) -> Adapter:
        """The teacher's adapter, at the initial adapter's rank: what every site would be sent."""
        return self._adapter(self._started.rank)

    def open_round(self) -> None:
        """Begin a round; whatever an unfinished one had folded is dropped."""
        self._round = {}
        self._dense_sums = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in self._dense.items()}
        self._open_layers()

    def fold(self, site: str, update: AdapterUpdate) -> None:
        """Add one site's update to the running sums; ``update`` may be freed afterwards.

        Raises:
            ArtefactError: if the site is unknown or has been folded, if the weight is not above zero,
                or if names or shapes are not those that the site was sent. Nothing is changed then.
        """
        weights = self._open
        self._check_update(site, update)
        tensors = update.adapter.tensors
        weight = float(update.weight)
        for name, total in self._dense_sums.items():
            total.add_(tensors[name].to(torch.float64), alpha=weight)
        for layer in self._started.layers():
            a = tensors[f"{layer}.lora_A"].to(torch.float64)
            b = tensors[f"{layer}.lora_B"].to(torch.float64)
            self._fold_layer(layer, a, b, weight)
        weights[site] = weight

    def close_round(self) -> float:
        """Make the next adapter from the replies folded.

        Returns:
            The relative residual ``||down - mean||_F / ||mean||_F`` over all layers together, where
            ``mean`` is the dense mean of the replying sites' whole weight changes (folded and trained)
            and ``down`` the weight change that the next `adapter_for` carries. 0 if the mean is 0.

        Raises:
            FederationError: if nothing was folded.
        """
        weights = self._open
        if not weights:
            raise FederationError(
                "no site's update was folded in this round, so there is nothing to aggregate"
            )
        total = math.fsum(weights.values())
        error, norm = self._close_layers(total)
        self._dense = {
            name: (part / total).to(self._dense[name].dtype) for name, part in self._dense_sums.items()
        }
        self._round = None
        self._dense_sums = {}
        return math.sqrt(error / norm) if norm > 0 else 0.0

    def state(self) -> dict[str, Tensor]:
        """Everything that `restore` needs, as of the last closed round; an open one is not in it."""
        initial = self._started
        parts: dict[str, Tensor] = {
            "meta/rule": _to_bytes(self.name),
            "meta/base_sha256": _to_bytes(initial.base_sha256),
            "meta/rank": torch.tensor(initial.rank),
        }
        parts |= {f"rank/{site}": torch.tensor(rank) for site, rank in self._ranks.items()}
        parts |= {f"initial/{name}": tensor.clone() for name, tensor in initial.tensors.items()}
        parts |= {f"dense/{name}": tensor.clone() for name, tensor in self._dense.items()}
        parts |= {f"layers/{name}": tensor.clone() for name, tensor in self._layer_state().items()}
        return parts

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from ``state``, with or without `start` before it; later rounds are bit-identical.

        Raises ``ArtefactError`` if it is a state of another rule or base model, or is not whole.
        """
        try:
            rule, base = _to_text(state["meta/rule"]), _to_text(state["meta/base_sha256"])
            rank = int(state["meta/rank"])
        except (KeyError, ValueError) as error:
            raise ArtefactError(f"not a state of an aggregation rule: {error}") from error
        if rule != self.name:
            raise ArtefactError(
                f"the state is of rule {rule!r}, the recipe asks for {self.name!r}: set aggregation.rule"
            )
        if self._initial is not None and self._initial.base_sha256 != base:
            raise ArtefactError("the state belongs to another base model than the adapter of this run")
        initial = Adapter(_below(state, "initial"), base, rank)
        dense, layers = _below(state, "dense"), _below(state, "layers")
        wanted_dense = {name for name in initial.tensors if not is_factor(name)}
        wanted_layers = set(self._layer_state_names(initial))
        if set(dense) != wanted_dense or set(layers) != wanted_layers:
            missing = sorted((wanted_dense - set(dense)) | (wanted_layers - set(layers)))
            raise ArtefactError(
                f"the state is not whole; missing: {missing or 'nothing, but it holds strange tensors'}"
            )
        self._initial = initial
        self._ranks = {site: int(tensor) for site, tensor in _below(state, "rank").items()}
        self._dense = dense
        self._round = None
        self._restore_layers(layers)

    # ---- what a rule says of the factors --------------------------------------------------------

    @abstractmethod
    def _check_ranks(self, initial: Adapter, ranks: Mapping[str, int]) -> list[str]:
        """Faults, one line a site."""

    @abstractmethod
    def _start_layers(self, initial: Adapter) -> None: ...

    @abstractmethod
    def _factors(self, layer: str, rank: int) -> dict[str, Tensor]:
        """Suffix (`FACTOR_SUFFIXES`) -> tensor to send a site of ``rank``; never an alias."""

    @abstractmethod
    def _open_layers(self) -> None: ...

    @abstractmethod
    def _fold_layer(self, layer: str, a: Tensor, b: Tensor, weight: float) -> None:
        """Add a site's trained ``a`` (r, in) and ``b`` (out, r), float64, to the layer's sums."""

    @abstractmethod
    def _close_layers(self, total: float) -> tuple[float, float]:
        """Commit every layer; squared Frobenius norms of ``down - mean`` and of ``mean``, over all layers."""

    @abstractmethod
    def _layer_state(self) -> dict[str, Tensor]: ...

    @abstractmethod
    def _layer_state_names(self, initial: Adapter) -> Iterable[str]: ...

    @abstractmethod
    def _restore_layers(self, layers: dict[str, Tensor]) -> None: ...

    # ---- inside ---------------------------------------------------------------------------------

    @property
    def _started(self) -> Adapter:
        assert self._initial is not None, "start() or restore() comes first"
        return self._initial

    @property
    def _open(self) -> dict[str, float]:
        assert self._round is not None, "open_round() comes first"
        return self._round

    def _rank_of(self, site: str) -> int:
        if site not in self._ranks:
            raise ArtefactError(f"site {site!r} is not in this run; known: {', '.join(sorted(self._ranks))}")
        return self._ranks[site]

    def _adapter(self, rank: int) -> Adapter:
        initial = self._started
        tensors = {name: tensor.clone() for name, tensor in self._dense.items()}
        for layer in initial.layers():
            for suffix, tensor in self._factors(layer, rank).items():
                tensors[f"{layer}.{suffix}"] = tensor
        return Adapter(tensors, initial.base_sha256, rank)

    def _check_start(self, initial: Adapter, ranks: Mapping[str, int]) -> None:
        factors = {name for name in initial.tensors if is_factor(name) and ".lora_" in name}
        halves = {f"{layer}.{suffix}" for layer in initial.layers() for suffix in ("lora_A", "lora_B")}
        if factors != halves:
            raise ArtefactError(f"the initial adapter lacks one factor of: {sorted(factors ^ halves)}")
        faults = self._check_ranks(initial, ranks)
        if not ranks:
            faults.append("there is no site")
        if faults:
            raise ConfigError(f"aggregation.rule {self.name!r} cannot serve these ranks", faults)

    def _check_update(self, site: str, update: AdapterUpdate) -> None:
        if site in self._open:
            raise ArtefactError(f"site {site!r} has already replied in this round")
        rank = self._rank_of(site)
        if not (math.isfinite(update.weight) and update.weight > 0):
            raise ArtefactError(f"site {site!r} declares weight {update.weight}; it must be above 0")
        wanted = {name: tuple(tensor.shape) for name, tensor in self._dense.items()}
        for layer in self._started.layers():
            a, b = self._started.tensors[f"{layer}.lora_A"], self._started.tensors[f"{layer}.lora_B"]
            wanted[f"{layer}.lora_A"] = (rank, a.shape[1])
            wanted[f"{layer}.lora_B"] = (b.shape[0], rank)
        got = {name: tuple(tensor.shape) for name, tensor in update.adapter.tensors.items()}
        faults = [f"{name}: wanted shape {shape}" for name, shape in wanted.items() if got.get(name) != shape]
        if strange := len(got.keys() - wanted.keys()):
            # Not by name: what a site calls its tensors could carry anything into the server's log.
            faults.append(f"{strange} tensors that it was not sent")
        if faults:
            raise ArtefactError(f"the update of site {site!r} does not fit what it was sent", faults)


def _to_bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _to_text(tensor: Tensor) -> str:
    return bytes(tensor.tolist()).decode()


def _below(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """Copies of the tensors whose names begin with ``part/``, without it."""
    prefix = f"{part}/"
    return {name.removeprefix(prefix): t.clone() for name, t in state.items() if name.startswith(prefix)}
