"""What a site's signed policy says to a run plan, from the plan alone: no data file is opened for it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

import torch

from client.site import Site
from common.errors import PolicyRefusal
from common.metrics import METRICS
from common.plan import PayloadSpec, RunPlan, Stage, TensorSpec
from common.privacy.keys import read_public_key
from common.privacy.plan import PrivacyPlan
from common.privacy.policy import POLICY, Policy, load_signed
from common.privacy.published import MEAN_DICE, PublishedMetrics
from common.privacy.terms import Asked, AskedPayload


def signed_policy(site: Site) -> Policy | None:
    """The policy beside ``site.yaml``, if the officer named there signed it; None: the site has neither.

    Raises:
        PolicyRefusal: a policy without a known officer (field ``officer``), or an officer's key and no
            policy that the officer signed.
        ArtefactError: the officer's key cannot be read.
    """
    if site.officer_key is not None:
        return load_signed(site.folder / POLICY, read_public_key(site.officer_key))
    if (site.folder / POLICY).exists():
        raise PolicyRefusal(
            "there is a signed policy, and site.yaml does not say whose: name officer_key", field="officer"
        )
    return None


def asked_of(
    plan: RunPlan, site: Site, plans: Mapping[str, PrivacyPlan], published: PublishedMetrics | None = None
) -> Asked:
    """What ``plan`` wants of ``site``.

    Args:
        plans: stage -> its noised steps, where it has any.
        published: what of its metrics leaves with noise, if anything does.
    """
    runs = [stage for stage in plan.stages if stage is not Stage.propose]
    silent = [Stage.student] if plan.privacy.covered else []
    measured = METRICS if published is None else (MEAN_DICE,)
    pinned = site.variant(plan).a_sha256
    return Asked(
        rounds=plan.rounds,
        sites=plan.sites,
        runs=[str(stage) for stage in runs],
        sends=[str(stage) for stage in runs if stage not in silent],
        plans=plans,
        outbound=list(_tensors(plan, site)),
        base_models=sorted(plan.models.values()),
        code=(plan.code_sha256, ""),
        guard_version=version("wardround"),
        a_matrices=[pinned] if pinned else (),
        metrics=measured if Stage.evaluate in plan.stages else (),
        published=published,
    )


def _tensors(plan: RunPlan, site: Site) -> list[AskedPayload]:
    payloads: list[PayloadSpec] = [*site.variant(plan).payloads, *plan.payloads]
    return [
        AskedPayload(str(payload.stage), tensor.name, tensor.dtype, _bytes(tensor))
        for payload in payloads
        for tensor in payload.tensors
    ]


def _bytes(tensor: TensorSpec) -> int:
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    return torch.Size(tensor.shape).numel() * dtype.itemsize
