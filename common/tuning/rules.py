"""What a recipe's adapters must satisfy together: something is trained, and the answers have a mean."""

from __future__ import annotations

from collections.abc import Iterator

from common.names import SPLIT_RULES
from common.recipe import GeneratorScope, Recipe, TeacherConfig
from common.schema_check import Fault
from common.tuning.presets import (
    GENERATOR,
    PRESETS,
    halves_fault,
    mix_faults,
    rank_of,
    settings_faults,
    site_teacher,
)


def adapter_faults(recipe: Recipe) -> Iterator[Fault]:
    """Adapters that train nothing, have no rank, or cannot be aggregated together.

    Unknown names are left to the check of names.
    """
    settings = _by_key(recipe)
    if any(one.adapter not in PRESETS for one in settings.values()):
        return
    alone = [(key, fault) for key, one in settings.items() for fault in settings_faults(one)]
    for key, fault in alone:
        yield Fault(f"{key}.adapter", fault, "train the decoder, leave rank empty, or take another adapter")
    if not alone:
        yield from _mixture_faults(recipe, settings)
        yield from _halves_faults(recipe, settings)


def _by_key(recipe: Recipe) -> dict[str, TeacherConfig]:
    """Where it is written -> the settings: the recipe's, and those of sites that name their own."""
    own = {
        f"sites[{index}]": site_teacher(recipe.teacher, site.adapter, site.rank)
        for index, site in enumerate(recipe.sites)
        if site.adapter is not None or site.rank is not None
    }
    return {"teacher": recipe.teacher, **own}


def _mixture_faults(recipe: Recipe, settings: dict[str, TeacherConfig]) -> Iterator[Fault]:
    rule = recipe.aggregation
    chosen = {key: (one.adapter, rank_of(one)) for key, one in settings.items()}
    names = {f"sites[{index}]": site.name for index, site in enumerate(recipe.sites)}
    for key, what in mix_faults(chosen["teacher"], chosen, rule.rule).items():
        yield Fault(f"{key}.adapter", f"site {names[key]}: {what}", "give all sites the same, or what fits")
    highest = max(rank for _, rank in chosen.values())
    if rule.rule in SPLIT_RULES and highest > rule.max_rank:
        what = f"{rule.max_rank} is below the highest rank that a site trains ({highest})"
        yield Fault("aggregation.max_rank", what, f"raise it to {highest} at least")


def _halves_faults(recipe: Recipe, settings: dict[str, TeacherConfig]) -> Iterator[Fault]:
    """Adapters that train A under a rule that averages B alone, or keep it fixed under one that trains it."""
    rule = recipe.aggregation.rule
    fix = "take a preset that it names, or another rule"
    for key, one in settings.items():
        if rank_of(one) > 0 and (what := halves_fault(one.adapter, rule)):
            yield Fault(f"{key}.adapter", what, fix)
    if recipe.generator.scope is GeneratorScope.federated and (what := halves_fault(GENERATOR, rule)):
        yield Fault("generator.scope", f"federated sends preset {what}", "take another scope or rule")
