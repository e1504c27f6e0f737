"""What every aggregation rule does alike: weights, dense tensors, checks, state.

A rule is driven once a round: ``open_round``, ``fold`` for each reply, ``close_round``; or, where sites vote,
``fold_consensus`` once for all of them (`server.robust.voting`). Before it,
``adapter_for`` says what each site is sent. A reply is added into running sums and then forgotten, so
that memory does not grow with sites. Sums are float64, in the order folded: callers fold in the
sorted order of the sites' names, and then a run is reproducible to the bit.

What is folded in an open round changes nothing that ``adapter_for``, ``global_adapter`` and ``state``
show until ``close_round`` has succeeded.

What is sent down is rounded to the recipe's ``wire_dtype`` here, so that server and sites count from the same
values. Of a dense tensor the rounding's remainder is kept and goes down with a later round (error
feedback); of the factors, each rule says what becomes of it.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import ClassVar

import torch
from torch import Tensor

from common.adapter import FACTOR_SUFFIXES, Adapter, AdapterUpdate
from common.canonical import canonical_json
from common.errors import ArtefactError, ConfigError, FederationError
from common.names import FACTOR_VOTE_RULES
from common.precision import sendable
from common.recipe import AggregationConfig
from common.robust_rules import vote_fault
from common.tuning.halves import B_ALONE, BOTH, Half, Halves
from server.aggregation.momentum import Momentum
from server.aggregation.shares import Share, share_faults


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
        self.momentum = Momentum()  # of dense tensors (and B of `ffa`); set before `start` or `restore`
        self._initial: Adapter | None = None
        self._shares: dict[str, Share] = {}
        self._whole: Share | None = None
        self._dense: dict[str, Tensor] = {}
        self._round: dict[str, float] | None = None  # site -> weight, of the replies folded so far
        self._dense_sums: dict[str, Tensor] = {}

    # ---- what a rule is asked -------------------------------------------------------------------

    def start(self, initial: Adapter, shares: Mapping[str, Share], whole: Share | None = None) -> None:
        """Begin a run from ``initial``, which holds every layer that a site trains, at the highest rank.

        Args:
            shares: what each site trains.
            whole: what the global adapter shows as trainable; None: all that ``initial`` has.

        Raises:
            ConfigError: if a share is not served by this rule; every such site is listed.
            ArtefactError: if ``initial`` lacks a factor.
        """
        self._check_start(initial, shares)
        initial = replace(initial, tensors={k: self._first(k, v) for k, v in initial.tensors.items()})
        self._initial = initial
        self._shares = dict(shares)
        self._whole = whole or Share.of(initial)
        self._dense = {name: t.clone() for name, t in initial.tensors.items() if not is_factor(name)}
        self.momentum = Momentum(self.momentum.factor)
        self._round = None
        self._start_layers(initial)

    def adapter_for(self, site: str) -> Adapter:
        """What ``site`` is sent: factors of its own rank and layers, folded factors if any, dense tensors.

        Raises ``ArtefactError`` for a site that `start` was not told of.
        """
        return self._adapter(self.share_of(site))

    def global_adapter(self) -> Adapter:
        """The teacher's adapter; the same function of an image as what every site of its rank is sent.

        Where a rule folds what a low rank does not hold, and for equal ranks, that is every site.
        """
        return self._adapter(self._whole_share)

    def share_of(self, site: str) -> Share:
        """Raises ``ArtefactError`` for a site that `start` was not told of."""
        if site not in self._shares:
            raise ArtefactError(f"site {site!r} is not in this run; known: {', '.join(sorted(self._shares))}")
        return self._shares[site]

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
        share = self.share_of(site)
        halves = self._halves(share)
        for layer in share.layers:
            # A factor that does not come back is the one that the site was sent.
            factors = {} if halves == BOTH else self._factors(layer, share)
            factors |= {str(half): tensors[f"{layer}.{half}"] for half in halves}
            a, b = factors["lora_A"].to(torch.float64), factors["lora_B"].to(torch.float64)
            self._fold_layer(layer, a, b, weight)
        weights[site] = weight

    def fold_consensus(self, steps: Iterable[tuple[str, Tensor]], sites: Sequence[str]) -> None:
        """Take what ``sites`` agreed on in place of their updates; each is counted once.

        Args:
            steps: name -> by how much it moves: a dense tensor; a layer's whole weight (out, in), for rules
                of ``CHANGE_VOTE_RULES``; the one factor that all sites train (``<layer>.lora_B``), for
                those of ``FACTOR_VOTE_RULES``. What is not named stays. Each is taken before the next one
                is asked for.

        Raises:
            ConfigError: if this rule would have to average A and B apart.
            ArtefactError: if a site is unknown or has been folded, or if a step has another name or shape.
                The round must then be opened anew.
        """
        weights = self._open
        if fault := vote_fault(self.name):
            raise ConfigError(fault)
        for site in sites:
            self.share_of(site)
            self._check_silent(site)
        votes = float(len(sites))
        self._fold_standing(votes)
        for name, step in steps:
            if self._vote_shape(name) != step.shape:
                raise ArtefactError(f"no vote can be taken on {name} in the shape {tuple(step.shape)}")
            if name in self._dense_sums:
                self._dense_sums[name].add_(step, alpha=votes)
            else:
                self._fold_step(name, step, votes)
        weights |= dict.fromkeys(sites, 1.0)

    def close_round(self) -> float:
        """Make the next adapter from the replies folded.

        Returns:
            The relative residual ``||down - mean||_F / ||mean||_F`` over all layers together, where
            ``mean`` is the dense mean of the replying sites' whole weight changes (folded and trained)
            and ``down`` the weight change that the next `global_adapter` carries. 0 if the mean is 0.

        Raises:
            FederationError: if nothing was folded.
        """
        weights = self._open
        if not weights:
            raise FederationError(
                "no site's update was folded in this round, so there is nothing to aggregate"
            )
        total = math.fsum(weights.values())
        before, self.momentum = self.momentum, self.momentum.next_round()
        try:
            error, norm = self._close_layers(total)
        except BaseException:
            self.momentum = before
            raise
        self._dense = {name: self._next_dense(name, part / total) for name, part in self._dense_sums.items()}
        self._round = None
        self._dense_sums = {}
        return math.sqrt(error / norm) if norm > 0 else 0.0

    def state(self) -> dict[str, Tensor]:
        """Everything that `restore` needs, as of the last closed round; an open one is not in it."""
        initial = self._started
        parts: dict[str, Tensor] = {
            "meta/rule": _to_bytes(self.name),
            "meta/base_sha256": _to_bytes(initial.base_sha256),
            "meta/preset": _to_bytes(initial.preset),
            "meta/rank": torch.tensor(initial.rank),
        }
        shares = {"meta/whole": self._whole_share} | {f"share/{site}": s for site, s in self._shares.items()}
        parts |= {name: _to_bytes(canonical_json(asdict(share))) for name, share in shares.items()}
        parts |= {f"initial/{name}": tensor.clone() for name, tensor in initial.tensors.items()}
        parts |= {f"dense/{name}": tensor.clone() for name, tensor in self._dense.items()}
        parts |= {f"layers/{name}": tensor.clone() for name, tensor in self._layer_state().items()}
        parts |= {f"momentum/{name}": tensor for name, tensor in self.momentum.state().items()}
        return parts

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from ``state``, with or without `start` before it; later rounds are bit-identical.

        Raises ``ArtefactError`` if it is a state of another rule or base model, or is not whole.
        """
        try:
            rule, base = _to_text(state["meta/rule"]), _to_text(state["meta/base_sha256"])
            preset, rank = _to_text(state["meta/preset"]), int(state["meta/rank"])
            whole = _to_share(state["meta/whole"])
            shares = {site: _to_share(text) for site, text in _below(state, "share").items()}
        except (KeyError, ValueError, TypeError) as error:
            raise ArtefactError(f"not a state of an aggregation rule: {error}") from error
        if rule != self.name:
            raise ArtefactError(
                f"the state is of rule {rule!r}, the recipe asks for {self.name!r}: set aggregation.rule"
            )
        if self._initial is not None and self._initial.base_sha256 != base:
            raise ArtefactError("the state belongs to another base model than the adapter of this run")
        initial = Adapter(_below(state, "initial"), base, rank, preset)
        dense, layers = _below(state, "dense"), _below(state, "layers")
        wanted_dense = {name for name in initial.tensors if not is_factor(name)}
        wanted_layers = set(self._layer_state_names(initial))
        if set(dense) != wanted_dense or set(layers) != wanted_layers:
            missing = sorted((wanted_dense - set(dense)) | (wanted_layers - set(layers)))
            raise ArtefactError(
                f"the state is not whole; missing: {missing or 'nothing, but it holds strange tensors'}"
            )
        self.momentum.restore(_below(state, "momentum"))
        self._initial = initial
        self._shares, self._whole = shares, whole
        self._dense = dense
        self._round = None
        self._restore_layers(layers)

    # ---- what a rule says of the factors --------------------------------------------------------

    def _halves(self, share: Share) -> Halves:
        """The factors that come back from a site of ``share`` in this round."""
        return BOTH if share.trains_a else B_ALONE

    def _check_shares(self, initial: Adapter, shares: Mapping[str, Share]) -> list[str]:
        """Faults, one line a site. What a rule takes, its name says (`share_faults`)."""
        return share_faults(self.name, initial, shares)

    @abstractmethod
    def _start_layers(self, initial: Adapter) -> None: ...

    @abstractmethod
    def _factors(self, layer: str, share: Share) -> dict[str, Tensor]:
        """Suffix (`FACTOR_SUFFIXES`) -> tensor to send a site of ``share``; never an alias."""

    @abstractmethod
    def _open_layers(self) -> None: ...

    @abstractmethod
    def _fold_layer(self, layer: str, a: Tensor, b: Tensor, weight: float) -> None:
        """Add a site's trained ``a`` (r, in) and ``b`` (out, r), float64, to the layer's sums."""

    def _fold_standing(self, votes: float) -> None:
        """Add ``votes`` sites that sent back what they were sent; of layers, where no change is summed."""
        for name, total in self._dense_sums.items():
            total.add_(self._sendable(self._dense[name]).double(), alpha=votes)

    def _fold_step(self, name: str, step: Tensor, votes: float) -> None:
        """Add that ``votes`` sites moved a layer's weight, or a factor of it, by ``step``, float64."""
        raise NotImplementedError(f"{self.name} is named as a rule with which sites can vote")

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
    def _whole_share(self) -> Share:
        assert self._whole is not None, "start() or restore() comes first"
        return self._whole

    @property
    def _open(self) -> dict[str, float]:
        assert self._round is not None, "open_round() comes first"
        return self._round

    def _sendable(self, tensor: Tensor) -> Tensor:
        return sendable(tensor, self.config.wire_dtype)

    def _first(self, name: str, tensor: Tensor) -> Tensor:
        return self._sendable(tensor) if is_factor(name) else tensor

    def _next_dense(self, name: str, mean: Tensor) -> Tensor:
        """The mean of what the sites trained, and what rounding had kept back from what they started from.

        With momentum it is the move that follows from the mean step, in place of that step.
        """
        return self._moved(name, self._dense[name], mean).to(self._dense[name].dtype)

    def _moved(self, name: str, kept: Tensor, mean: Tensor) -> Tensor:
        """Where a tensor goes, float64, that is ``kept`` here, was sent rounded and came back as ``mean``."""
        sent = self._sendable(kept).double()
        if not self.momentum.factor:
            return mean + (kept.double() - sent)
        return kept.double() + self.momentum.move(name, mean - sent)

    def _adapter(self, share: Share) -> Adapter:
        initial = self._started
        tensors = {name: self._sendable(tensor).clone() for name, tensor in self._dense.items()}
        for layer in initial.layers():
            for suffix, tensor in self._factors(layer, share).items():
                tensors[f"{layer}.{suffix}"] = tensor
        return Adapter(tensors, initial.base_sha256, share.rank, share.preset)

    def _check_start(self, initial: Adapter, shares: Mapping[str, Share]) -> None:
        factors = {name for name in initial.tensors if is_factor(name) and ".lora_" in name}
        layers = {name.rpartition(".")[0] for name in factors}
        halves = {f"{layer}.{suffix}" for layer in layers for suffix in ("lora_A", "lora_B")}
        if factors != halves:
            raise ArtefactError(f"the initial adapter lacks one factor of: {sorted(factors ^ halves)}")
        faults = self._check_shares(initial, shares)
        if not shares:
            faults.append("there is no site")
        if faults:
            raise ConfigError(f"aggregation.rule {self.name!r} cannot serve these adapters", faults)

    def _check_silent(self, site: str) -> None:
        if site in self._open:
            raise ArtefactError(f"site {site!r} has already replied in this round")

    def _vote_shape(self, name: str) -> tuple[int, ...]:
        """Of the step that sites can vote on under ``name``; empty: there is none."""
        tensors = self._started.tensors
        if name in self._dense:
            return tuple(self._dense[name].shape)
        if self.name in FACTOR_VOTE_RULES:
            return tuple(tensors[name].shape) if ".lora_" in name and name in tensors else ()
        if f"{name}.lora_B" not in tensors:
            return ()
        return tensors[f"{name}.lora_B"].shape[0], tensors[f"{name}.lora_A"].shape[1]

    def _check_update(self, site: str, update: AdapterUpdate) -> None:
        self._check_silent(site)
        share = self.share_of(site)
        if not (math.isfinite(update.weight) and update.weight > 0):
            raise ArtefactError(f"site {site!r} declares weight {update.weight}; it must be above 0")
        wanted = {name: tuple(tensor.shape) for name, tensor in self._dense.items()}
        for layer in share.layers:
            a, b = self._started.tensors[f"{layer}.lora_A"], self._started.tensors[f"{layer}.lora_B"]
            shapes = {Half.a: (share.rank, a.shape[1]), Half.b: (b.shape[0], share.rank)}
            wanted |= {f"{layer}.{half}": shapes[half] for half in self._halves(share)}
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


def _to_share(tensor: Tensor) -> Share:
    value = json.loads(_to_text(tensor))
    return Share(value["preset"], value["rank"], tuple(value["layers"]), value["trains_a"])


def _below(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """Copies of the tensors whose names begin with ``part/``, without it."""
    prefix = f"{part}/"
    return {name.removeprefix(prefix): t.clone() for name, t in state.items() if name.startswith(prefix)}
