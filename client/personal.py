"""A site's personal adapter: what it adds to the shared teacher for its own patients. It never leaves.

After FedDPA-F (Yang et al., NeurIPS 2024), where a site's second adapter is trained when the federation is
over. Here the shared adapter is folded into the frozen base, so that the personal one starts as the shared
teacher and can only be told from it by what this site's own patients taught.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from client.adaptation import Visit, adapt
from client.deadline import Deadline
from client.patients import Patient
from client.site import Site
from common.adapter import Adapter
from common.names import PERSONAL_RULES
from common.plan import RunPlan
from common.teacher import initial_adapter, resident_teacher

PERSONAL_TEACHER = "personal_teacher"  # the model's name in reports
PERSONAL_FILE = "personal.safetensors"  # in the site's folder


def personalises(plan: RunPlan) -> bool:
    """Whether sites train a personal adapter after the last round of ``plan``."""
    return plan.aggregation.rule in PERSONAL_RULES


def folded_whole(shared: Adapter, fresh: Adapter) -> Adapter:
    """``shared`` with all of its change folded, and the factors of ``fresh`` in their place.

    Guarantee: where B of ``fresh`` is zero, the same function of an image as ``shared``, up to rounding.
    Dense tensors are those of ``shared``.
    """
    factors = {name for name in shared.tensors if ".lora_" in name or ".folded_" in name}
    tensors = {name: tensor for name, tensor in shared.tensors.items() if name not in factors}
    tensors |= {name: tensor for name, tensor in fresh.tensors.items() if ".lora_" in name}
    for layer in sorted({name.rpartition(".")[0] for name in factors}):
        for half, stacked in (("A", 0), ("B", 1)):
            names = [f"{layer}.{kind}_{half}" for kind in ("lora", "folded")]
            parts = [shared.tensors[name] for name in names if name in factors]
            tensors[f"{layer}.folded_{half}"] = torch.cat(parts, dim=stacked)
    return replace(shared, tensors=tensors)


def train_personal(
    site: Site, plan: RunPlan, shared: Adapter, labelled: Sequence[Patient], deadline: Deadline
) -> Adapter:
    """The site's personal adapter: ``shared`` folded, and factors and dense tensors of its own.

    As many steps as ``plan.aggregation.personal_steps``, or as all of the teacher's rounds together, with a
    learning rate that runs through its whole course. Guarantee: the same from the same ``shared``, patients
    and plan.

    Raises:
        ArtefactError: ``shared`` is not of the preset and rank that this site trains.
        DeadlinePassed: between two steps.
    """
    settings = site.teacher(plan)
    start = folded_whole(shared, initial_adapter(settings, plan.data, plan.seed))
    steps = plan.aggregation.personal_steps or plan.rounds * plan.teacher.steps
    alone = replace(plan, rounds=1, teacher=replace(plan.teacher, steps=steps))
    visit = Visit(0, site.draw_seed(plan, "personal"), site.folder)
    teacher = resident_teacher(settings, plan.data)
    trained = adapt(teacher, start, labelled, alone, visit, deadline).adapter
    return replace(start, tensors={**start.tensors, **trained.tensors})
