"""The officer's limits on single tensors: what may be sent here, and what may leave, by name, size and norm.

A tensor passes by one rule of the policy that holds in every respect. What no rule names does not pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from common.adapter import Adapter
from common.errors import PolicyRefusal
from common.precision import unpack
from common.privacy.policy import PayloadRule, Policy


def refuse_inbound(policy: Policy, adapters: Sequence[Adapter]) -> None:
    """Raises ``PolicyRefusal`` (field ``payload.inbound``) if the server sent what the policy does not list.

    It looks at nothing of the site's, so that the refusal may say why.
    """
    faults = [fault for adapter in adapters for fault in _faults(policy.payload.inbound, adapter)]
    if faults:
        refusal = PolicyRefusal("the server sent what this site's policy does not list", "payload.inbound")
        refusal.faults = tuple(faults)
        raise refusal


def outbound_faults(policy: Policy, adapter: Adapter) -> list[str]:
    """Each tensor of ``adapter``, as it would leave, that no rule of ``payload.outbound`` lets pass.

    The norm is that of the noised values: to keep one in tells nobody more than to send it would.
    """
    return list(_faults(policy.payload.outbound, adapter))


def _faults(rules: Sequence[PayloadRule], adapter: Adapter) -> Iterator[str]:
    carried = unpack(adapter).tensors
    for name, tensor in sorted(adapter.tensors.items()):
        values = carried.get(name)  # none under the name of an int8 tensor's scales
        length = 0.0 if values is None else float(torch.linalg.vector_norm(values.double()))
        if not any(_passes(rule, name, tensor, length) for rule in rules):
            yield f"{name}: no rule of the policy lists it with this dtype, size and norm"


def _passes(rule: PayloadRule, name: str, tensor: Tensor, length: float) -> bool:
    return (
        fnmatchcase(name, rule.name)
        and str(tensor.dtype) == f"torch.{rule.dtype}"
        and tensor.nbytes <= rule.max_bytes
        and length <= rule.max_l2  # what is not finite is not
    )
