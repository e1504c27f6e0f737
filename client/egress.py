"""The one exit of a hospital: what leaves passes here, is checked against the plan, and is on a receipt.

The plan that the site agreed to lists every tensor (name, shape, dtype) and every number (by its path,
``metrics.metrics.value``) of each stage. Anything else is refused, with all faults at once, before a byte
is released. The receipt is on the disk before the payload is handed over: a payload without a receipt
cannot exist, a receipt without a payload can (a crash in between).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from common.adapter import AdapterUpdate
from common.canonical import canonical_json, sha256_of
from common.errors import ArtefactError
from common.plan import PayloadSpec, RunPlan, Stage, Variant
from common.tuning.presets import GENERATOR

RECEIPTS = "receipts.jsonl"
MAX_TEXT = 200  # characters: room for a name or a reason, not for data
NO_MECHANISM = "none"


class EgressRefusal(ArtefactError):
    """Something that the plan does not allow was about to leave.

    Outside it looks like any local refusal: whether a site's numbers went wrong is the site's business.
    """

    border_code = "REFUSED_LOCAL"


@dataclass(frozen=True)
class Receipt:
    """One outgoing payload: ``sha256`` is an adapter's digest, or that of the numbers' canonical JSON."""

    site: str
    stage: str
    round: int
    name: str
    bytes: int
    sha256: str
    mechanism: str
    epsilon_after: float | None = None


class Egress:
    """The exit of ``site`` for one plan; receipts go to ``folder``.

    Args:
        variant: of the plan's, the one that the site agreed to train; None: the first.
    """

    def __init__(self, site: str, folder: Path, plan: RunPlan, variant: Variant | None = None) -> None:
        self.site = site
        self.receipts = folder / RECEIPTS
        self.plan = plan
        self.variant = variant or plan.variants[0]

    def release_update(self, stage: Stage, round_index: int, update: AdapterUpdate) -> AdapterUpdate:
        """``update``, checked and on two receipts: the adapter and the numbers beside it.

        Raises:
            EgressRefusal: with every fault.
            ArtefactError: if the receipt cannot be written.
        """
        spec = self._spec(stage, round_index)
        losses = [None if math.isnan(loss) else loss for loss in update.losses]  # NaN: not measured
        numbers = {
            "weight": update.weight, "started_from": update.started_from,
            "mechanism": update.mechanism, "losses": losses,
        }  # fmt: skip
        faults = _tensor_faults(spec, update) + _number_faults(spec, numbers, "")
        if update.adapter.base_sha256 not in self.plan.models.values():
            faults.append("the adapter belongs to no model of the plan")
        if (update.adapter.preset, update.adapter.rank) != self._agreed(stage):
            faults.append("the adapter is of another preset or rank than the site agreed to")
        size = sum(tensor.nbytes for tensor in update.adapter.tensors.values())
        self._refuse(stage, faults, spec, size + (0 if faults else _json_bytes(numbers)))
        digest = update.adapter.digest
        self._write(
            Receipt(self.site, stage, round_index, f"{stage}.adapter", size, digest, update.mechanism)
        )
        self._write_numbers(stage, round_index, f"{stage}.numbers", numbers)
        return update

    def release_numbers(
        self, stage: Stage, round_index: int, name: str, payload: dict[str, Any]
    ) -> dict[str, Any]:
        """``payload`` (plain values; None for what is suppressed), checked and on a receipt.

        Args:
            name: what the plan calls this table; each of its keys is checked as ``name.key``.

        Raises:
            EgressRefusal: with every fault.
            ArtefactError: if the receipt cannot be written.
        """
        spec = self._spec(stage, round_index)
        faults = _number_faults(spec, payload, name)
        self._refuse(stage, faults, spec, 0 if faults else _json_bytes(payload))
        self._write_numbers(stage, round_index, name, payload)
        return payload

    def _agreed(self, stage: Stage) -> tuple[str, int]:
        """Preset and rank of what the site trains in ``stage``."""
        if stage is Stage.adapt:
            return self.variant.preset, self.variant.rank
        return GENERATOR, self.plan.generator.rank

    def _spec(self, stage: Stage, round_index: int) -> PayloadSpec:
        if stage is Stage.adapt:
            return self.variant.payload(round_index)
        spec = self.plan.payload(stage, round_index)
        if spec is None:
            raise EgressRefusal(f"the plan names no payload for stage {stage}, so nothing leaves {self.site}")
        return spec

    def _refuse(self, stage: Stage, faults: list[str], spec: PayloadSpec, size: int) -> None:
        if size > spec.max_bytes:
            faults = [*faults, f"{size} bytes, the plan allows {spec.max_bytes}"]
        if faults:
            raise EgressRefusal(f"{self.site} does not release its payload of stage {stage}", faults)

    def _write_numbers(self, stage: Stage, round_index: int, name: str, numbers: Mapping[str, Any]) -> None:
        digest = sha256_of(numbers)
        size = _json_bytes(numbers)
        self._write(Receipt(self.site, stage, round_index, name, size, digest, NO_MECHANISM))

    def _write(self, receipt: Receipt) -> None:
        try:
            self.receipts.parent.mkdir(parents=True, exist_ok=True)
            with self.receipts.open("a", encoding="utf-8") as file:
                file.write(canonical_json(asdict(receipt)) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ArtefactError(
                f"no receipt can be written to {self.receipts} ({error.strerror}), so nothing leaves: "
                "free some space or mend the folder's permissions, then run again with --resume"
            ) from error


def _tensor_faults(spec: PayloadSpec, update: AdapterUpdate) -> list[str]:
    allowed = {tensor.name: tensor for tensor in spec.tensors}
    tensors = update.adapter.tensors
    faults = [f"{name}: not on the plan's list" for name in sorted(set(tensors) - set(allowed))]
    faults += [f"{name}: missing" for name in sorted(set(allowed) - set(tensors))]
    for name in sorted(set(tensors) & set(allowed)):
        tensor, wanted = tensors[name], allowed[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        if list(tensor.shape) != wanted.shape:
            faults.append(f"{name}: shape {list(tensor.shape)}, the plan says {wanted.shape}")
        if dtype != wanted.dtype:
            faults.append(f"{name}: {dtype}, the plan says {wanted.dtype}")
        if not bool(torch.isfinite(tensor).all()):
            faults.append(f"{name}: NONFINITE values")
    return faults


def _number_faults(spec: PayloadSpec, payload: Mapping[str, Any], name: str) -> list[str]:
    faults: dict[str, None] = {}
    for path, value in _leaves(payload, name):
        if path not in spec.numbers:
            faults[f"{path}: not on the plan's list"] = None
        if isinstance(value, float) and not math.isfinite(value):
            faults[f"{path}: a NONFINITE number"] = None
        if isinstance(value, str) and len(value) > MAX_TEXT:
            faults[f"{path}: a text of more than {MAX_TEXT} characters"] = None
        if not isinstance(value, (str, int, float, bool, type(None))):
            faults[f"{path}: {type(value).__name__} is no plain value"] = None
    return list(faults)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(path, plain value) of everything in nested dicts and lists; list positions are not part of a path."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _leaves(entry, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _leaves(entry, path)
    else:
        yield path, value


def _json_bytes(value: Mapping[str, Any]) -> int:
    return len(canonical_json(value).encode())
