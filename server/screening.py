"""Screening: an answer is admitted whole, or rejected with reasons, before it changes anything here.

Reasons are fixed words: an answer may hold anything, so nothing of it is repeated, not even a tensor's name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from common.adapter import Adapter, AdapterUpdate
from common.errors import ArtefactError
from common.guard_api import SiteMetrics, StudentNote
from common.plan import PayloadSpec
from common.precision import in_parts, norm
from common.recipe import Start, StyleDetail
from common.style import StyleSummary, style_bounds

# A round of training moves an adapter by a few times its own norm at most; what is a hundred times as
# large is a fault of the site's or an attack, and one such update would own the mean.
NORM_FACTOR = 100.0
BOUND_SLACK = 1e-6


@dataclass(frozen=True)
class Sent:
    """What a site was sent in one message, as far as its answer is checked against it."""

    nonce: str
    digest: str
    base_sha256: str
    preset: str
    rank: int
    norm: float

    @classmethod
    def of(cls, adapter: Adapter, nonce: str) -> Sent:
        size = norm(adapter.trained())
        return cls(nonce, adapter.digest, adapter.base_sha256, adapter.preset, adapter.rank, size)


def admit(
    update: AdapterUpdate, nonce: str, sent: Sent, spec: PayloadSpec, max_weight: float, seen: set[str]
) -> None:
    """Admit one update, or raise ``ArtefactError`` with every reason; only then is its nonce used up.

    Args:
        nonce: that the answer carries back.
        sent: what this site was sent in this round.
        spec: the plan's manifest of the stage, for the variant that the site trains.
        max_weight: cap on the declared patient count.
        seen: nonces of the answers admitted so far in this run; the new one is added.
    """
    tensors = update.adapter.tensors
    faults = []
    if not all(bool(torch.isfinite(part).all()) for tensor in tensors.values() for part in in_parts(tensor)):
        faults.append("a value that is not finite")
    faults += _tensor_faults(tensors, spec)
    if update.adapter.base_sha256 != sent.base_sha256:
        faults.append("another base model")
    if update.adapter.preset != sent.preset:
        faults.append("another preset")
    if update.adapter.rank != sent.rank:
        faults.append("another rank")
    if update.started_from != sent.digest:
        faults.append("started from another adapter than it was sent")
    if nonce in seen:
        faults.append("a replayed answer")
    elif nonce != sent.nonce:
        faults.append("an answer to another message")
    if not (math.isfinite(update.weight) and update.weight > 0):
        faults.append("a weight that is not above 0")
    elif update.weight > max_weight:
        faults.append("a weight above the cap")
    if not faults and not norm(update.adapter) <= NORM_FACTOR * (1 + sent.norm):
        faults.append("values of an absurd size")
    _settle(faults)
    seen.add(nonce)


def admit_style(style: StyleSummary, max_groups: int, detail: StyleDetail = StyleDetail.colour) -> None:
    """Raises ``ArtefactError`` with every reason."""
    faults, bounds = [], style_bounds(detail)
    if not 0 < len(style.groups) <= max_groups:
        faults.append("no style group, or too many")
    for group in style.groups:
        if len(group.mean) != len(bounds) or len(group.std) != len(bounds):
            faults.append("a style of another length")
            continue
        if not 0 <= group.weight <= 1:
            faults.append("a style weight outside 0 to 1")
        for mean, std, (low, high) in zip(group.mean, group.std, bounds, strict=True):
            if not low - BOUND_SLACK <= mean <= high + BOUND_SLACK or not 0 <= std <= high - low:
                faults.append("a style number outside its bounds")
    _settle(faults)


def admit_note(note: StudentNote, site: str) -> None:
    """Raises ``ArtefactError`` with every reason."""
    faults = ["the note of another site"] if note.site != site else []
    counts = (note.params, note.generated, note.kept, note.dropped_inconsistent, note.dropped_copy or 0)
    if min(counts) < 0:
        faults.append("a negative count")
    if not 0 <= (note.copy_rate or 0.0) <= 1:
        faults.append("a copy rate outside 0 to 1")
    if min(note.latency_ms, note.teacher_latency_ms) < 0:
        faults.append("a negative time")
    if note.start not in {"", *Start}:
        faults.append("an unknown start")
    _settle(faults)


def admit_metrics(metrics: SiteMetrics, site: str) -> None:
    """Raises ``ArtefactError`` with every reason."""
    faults = ["the metrics of another site"] if metrics.site != site else []
    counts = metrics.counts
    if counts is not None and min(vars(counts).values()) < 0:
        faults.append("a negative count")
    for metric in metrics.metrics:
        if metric.patients < 0:
            faults.append("a negative count")
        if metric.value is None and not metric.reason:
            faults.append("a missing value without its reason")
        if metric.noise_scale is not None and not metric.noise_scale > 0:
            faults.append("noise of no size")
    _settle(faults)


def _tensor_faults(tensors: Mapping[str, Tensor], spec: PayloadSpec) -> list[str]:
    wanted = {tensor.name: tensor for tensor in spec.tensors}
    faults = []
    if set(tensors) - set(wanted):
        faults.append("an extra tensor")
    if set(wanted) - set(tensors):
        faults.append("a missing tensor")
    shared = set(tensors) & set(wanted)
    if any(list(tensors[name].shape) != wanted[name].shape for name in shared):
        faults.append("a wrong shape")
    if any(str(tensors[name].dtype) != f"torch.{wanted[name].dtype}" for name in shared):
        faults.append("a wrong dtype")
    return faults


def _settle(faults: list[str]) -> None:
    if faults:
        raise ArtefactError("rejected", sorted(set(faults), key=faults.index))
