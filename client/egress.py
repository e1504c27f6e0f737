"""The one exit of a hospital: what leaves passes here, is checked against the plan, and is on a receipt.

The plan that the site agreed to lists every tensor (name, shape, dtype) and every number (by its path,
``metrics.metrics.value``) of each stage. Anything else is refused, with all faults at once, before a byte
is released. The receipt is on the disk before the payload is handed over: a payload without a receipt
cannot exist, a receipt without a payload can (a crash in between).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from client.account import MECHANISM, Account
from client.charges import Charge, Reservation
from client.dp.trained import refuse_uncovered
from client.limits import outbound_faults
from client.patients import Patient
from client.site import Site
from common.adapter import AdapterUpdate
from common.canonical import canonical_json, sha256_of
from common.durable import write_atomic
from common.errors import ArtefactError
from common.plan import PayloadSpec, RunPlan, Stage, Variant, rebuild
from common.precision import carried
from common.privacy.entries import Context, Payload
from common.privacy.heads import HEAD, SignedHead, without_empty_head
from common.privacy.ledger import Ledger
from common.privacy.receipts import NO_MECHANISM, PUBLIC, SYNTHETIC
from common.shared_student import SHARED_STUDENT
from common.tuning.presets import GENERATOR

RECEIPTS = "receipts.jsonl"
MAX_TEXT = 200  # characters: room for a name or a reason, not for data


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


@dataclass(frozen=True)
class Noised:
    """What stands behind a private update: a reservation, and the names of the tensors that its step made."""

    reservation: Reservation
    tensors: frozenset[str]


class Egress:
    """The exit of ``site`` for one plan; receipts go to ``folder``.

    Args:
        variant: of the plan's, the one that the site agreed to train; None: the first.
        account: where a private plan is booked; None: it has none, and only its own refusal leaves.
        witnessed: whether the ledger's head goes along. Not with a refusal, which is the same bytes whatever
            the site's ledger holds.
    """

    def __init__(
        self,
        site: str,
        folder: Path,
        plan: RunPlan,
        variant: Variant | None = None,
        account: Account | None = None,
        witnessed: bool = True,
    ) -> None:
        self.site = site
        self.receipts = folder / RECEIPTS
        self.plan = plan
        self.variant = variant or plan.variants[0]
        self.account = account
        self._witnessed = witnessed

    def release_update(
        self, stage: Stage, round_index: int, update: AdapterUpdate, noised: Noised | None = None
    ) -> AdapterUpdate:
        """``update``, checked and on two receipts: the adapter and the numbers beside it.

        In a private run with the ledger's head, which has the reservation in it.

        Args:
            noised: what the mechanism made, and its reservation, which is committed once the receipts are
                on the disk. While the plan asks for privacy nothing leaves without it.

        Raises:
            EgressRefusal: with every fault.
            PolicyRefusal: a tensor that the mechanism did not make (field ``payload.outbound``), or the
                policy has run out meanwhile.
            ArtefactError: if the receipt cannot be written.
        """
        spec = self._spec(stage, round_index)
        losses = [None if math.isnan(loss) else loss for loss in update.losses]  # NaN: not measured
        numbers = {
            "weight": update.weight, "started_from": update.started_from,
            "mechanism": update.mechanism, "losses": losses, **self._ledger_head(spec),
        }  # fmt: skip
        faults = _tensor_faults(spec, update) + _number_faults(spec, numbers, "")
        if self._private:
            faults += _privacy_faults(update, noised)
        if not faults and self.account is not None and self.account.policy is not None:
            faults += outbound_faults(self.account.policy, update.adapter)
        if update.adapter.base_sha256 not in self.plan.models.values():
            faults.append("the adapter belongs to no model of the plan")
        if (update.adapter.preset, update.adapter.rank) != self._agreed(stage):
            faults.append("the adapter is of another preset or rank than the site agreed to")
        size = sum(tensor.nbytes for tensor in update.adapter.tensors.values())
        self._refuse(stage, faults, spec, size + (0 if faults else _json_bytes(numbers)))
        if self.account is not None:
            self.account.check_in_force()
        digest, name = update.adapter.digest, f"{stage}.adapter"
        epsilon = None if noised is None else noised.reservation.epsilon
        self._write(Receipt(self.site, stage, round_index, name, size, digest, update.mechanism, epsilon))
        beside = NO_MECHANISM if noised is None else PUBLIC  # the weight is declared, the losses are withheld
        self._write_numbers(stage, round_index, f"{stage}.numbers", numbers, beside)
        if noised is not None:
            noised.reservation.commit([Payload(name, digest, size)])
        return replace(update, ledger_head=rebuild(SignedHead | None, numbers.get(HEAD)))

    def release_numbers(
        self,
        stage: Stage,
        round_index: int,
        name: str,
        payload: dict[str, Any],
        of: Sequence[Patient] | None = None,
        paid: Charge | None = None,
    ) -> dict[str, Any]:
        """``payload`` (plain values; None for what is suppressed), checked and on a receipt.

        Args:
            name: what the plan calls this table; each of its keys is checked as ``name.key``.
            of: whose data it is made of; nobody's if every value is public. A private plan lets nothing out
                without it, and what is anybody's is booked as a release without noise before it leaves.
            paid: what the numbers of the table cost, which have noise; ``of`` is nobody then.

        Raises:
            EgressRefusal: with every fault.
            ArtefactError: if the receipt cannot be written.
        """
        spec = self._spec(stage, round_index)
        payload = without_empty_head(payload) | self._ledger_head(spec)
        faults = _number_faults(spec, payload, name)
        if self._private and of is None:
            faults.append("the plan asks for privacy, and nobody says whose data this is made of")
        if paid is not None and not faults:
            faults += paid.faults(payload)
        self._refuse(stage, faults, spec, 0 if faults else _json_bytes(payload))
        if self.account is None or not self.account.private:
            public = of is not None and not of  # nobody's: a word on a plan
            self._write_numbers(stage, round_index, name, payload, PUBLIC if public else NO_MECHANISM)
            return payload
        if of:
            self.account.export(stage, of)
        payload |= self._ledger_head(spec)
        if paid is None:
            self._write_numbers(stage, round_index, name, payload, NO_MECHANISM if of else PUBLIC)
            self.account.vouch()
        else:
            self._write_numbers(stage, round_index, name, payload, paid.mechanism, paid.epsilon)
            paid.commit(Payload(name, sha256_of(payload), _json_bytes(payload)))
        return payload

    @property
    def _private(self) -> bool:
        return self.plan.privacy.asked

    def _ledger_head(self, spec: PayloadSpec) -> dict[str, Any]:
        """The number of that name, where the plan lists it: in a private run, with every answer.

        The head has in it all that the message spends. What comes after it in the ledger, the message's own
        COMMIT or CHECKPOINT, vouches for the receipts, of which the head's is one: it goes with the next.
        """
        listed = any(name.endswith(f"{HEAD}.hash") for name in spec.numbers)
        if not (listed and self._witnessed) or self.account is None or not self.account.private:
            return {}
        return {HEAD: asdict(self.account.signed_head())}

    def _agreed(self, stage: Stage) -> tuple[str, int]:
        """Preset and rank of what the site trains in ``stage``."""
        if stage is Stage.adapt:
            return self.variant.preset, self.variant.rank
        if stage is Stage.shared_student:
            return SHARED_STUDENT, 0
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

    def _write_numbers(
        self,
        stage: Stage,
        round_index: int,
        name: str,
        numbers: Mapping[str, Any],
        mechanism: str,
        epsilon: float | None = None,
    ) -> None:
        digest = sha256_of(numbers)
        size = _json_bytes(numbers)
        self._write(Receipt(self.site, stage, round_index, name, size, digest, mechanism, epsilon))

    def _write(self, receipt: Receipt) -> None:
        _write_receipt(self.receipts, receipt)


@dataclass(frozen=True)
class Parcel:
    """Files that people take out of a site, where no plan's message does: ``files`` is name -> bytes.

    Attributes:
        patients: ids of those whom they may tell of.
    """

    name: str
    files: Mapping[str, bytes]
    patients: Sequence[str]

    @property
    def sha256(self) -> str:
        return sha256_of({name: sha256_of(data) for name, data in self.files.items()})


def release_parcel(site: Site, ledger: Ledger, context: Context, parcel: Parcel, to: Path) -> Receipt:
    """Write ``parcel`` into the new folder ``to``: on a receipt and booked as without noise before that.

    Whether it may leave is asked before (`client.curation.release`).

    Raises:
        ArtefactError: ``to`` exists or lies in the site's folder, or no receipt can be written.
        DiskFault: ``to`` cannot be written; it stays booked.
    """
    if to.exists() or to.resolve().is_relative_to(site.folder.resolve()):
        raise ArtefactError(f"{to} exists or is the site's own: name a new folder outside {site.folder}")
    size = sum(len(data) for data in parcel.files.values())
    receipt = Receipt(site.name, SYNTHETIC, 0, parcel.name, size, parcel.sha256, NO_MECHANISM)
    _write_receipt(site.folder / RECEIPTS, receipt)
    payload = Payload(parcel.name, parcel.sha256, size)
    ledger.declare_unprotected(context, SYNTHETIC, parcel.patients, [payload])
    for name, data in sorted(parcel.files.items()):
        write_atomic(to / name, data)
    return receipt


def _write_receipt(path: Path, receipt: Receipt) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(canonical_json(asdict(receipt)) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ArtefactError(
            f"no receipt can be written to {path} ({error.strerror}), so nothing leaves: "
            "free some space or mend the folder's permissions, then run again with --resume"
        ) from error


def _privacy_faults(update: AdapterUpdate, noised: Noised | None) -> list[str]:
    """Why ``update`` is none of a noised step; a tensor that no step made is refused at once."""
    if noised is None or update.mechanism != MECHANISM:
        return ["the plan asks for privacy, and no noised step with a reservation made this"]
    refuse_uncovered(carried(update.adapter), noised.tensors)
    if not all(math.isnan(loss) for loss in update.losses):
        return ["losses of patients do not leave a private round"]
    return []


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
