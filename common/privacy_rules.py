"""What a recipe that asks for differential privacy must say besides: what noise does not cover is a fault.

The mechanism covers the teacher's rounds, one noised step in each, of tensors whose gradient it can take
patient by patient. A recipe that wants more is refused here, and never run with less privacy than it asks.
"""

from __future__ import annotations

from collections.abc import Iterator

from common.recipe import (
    PERSONAL_RULES,
    CohortConfig,
    DecoderTraining,
    GeneratorScope,
    PrivacyConfig,
    Recipe,
    SiteConfig,
)
from common.schema_check import Fault

PRIVATE_PRESETS = ("decoder", "dp")  # nothing of the encoder, or the factor B alone
OWN_TEACHERS = ("local_teacher", "no_federation")  # baselines that train a teacher of the site's own


def privacy_faults(recipe: Recipe) -> Iterator[Fault]:
    """Settings that differential privacy does not cover, or that mean nothing without it."""
    if not recipe.privacy.asked:
        if recipe.privacy != PrivacyConfig():
            what = "settings of differential privacy, and no noise"
            yield Fault("privacy", what, "add privacy.noise_multiplier or privacy.epsilon, or leave them out")
        return
    if recipe.privacy.epsilon is not None and recipe.privacy.noise_multiplier is not None:
        yield Fault("privacy", "epsilon and noise_multiplier both decide the noise", "give one of them")
    yield from _training_faults(recipe)
    yield from _stage_faults(recipe)
    yield from _site_faults(recipe)


def declared_patients(site: SiteConfig, cohort: CohortConfig | None = None) -> int | None:
    """The patients that a simulated site declares; None: it does not.

    A site of a cohort declares its labelled images: as many patients, or more than it has.
    """
    if cohort is not None:
        return cohort.labelled
    return site.patients or (site.phantom.train_patients if site.phantom else None)


def _training_faults(recipe: Recipe) -> Iterator[Fault]:
    fix = "take teacher.adapter=decoder, or dp"
    own = {f"sites[{index}]": site.adapter for index, site in enumerate(recipe.sites) if site.adapter}
    for key, adapter in {"teacher": recipe.teacher.adapter, **own}.items():
        if adapter not in PRIVATE_PRESETS:
            yield Fault(f"{key}.adapter", f"{adapter} is not trained with differential privacy", fix)
    if recipe.teacher.decoder is DecoderTraining.lora:
        what = "factors A and B both trained multiply their noise"
        yield Fault("teacher.decoder", what, "take full, shallow or head; with adapter dp also frozen")
    if recipe.teacher.cached_views:
        what = "a private run keeps one view of every image by itself"
        yield Fault("teacher.cached_views", what, "leave it 0")
    if recipe.aggregation.rule in PERSONAL_RULES:
        what = f"rule {recipe.aggregation.rule} trains adapters without noise, whose metrics leave"
        yield Fault("aggregation.rule", what, "take exact_split")


def _stage_faults(recipe: Recipe) -> Iterator[Fault]:
    scope = recipe.generator.scope
    if scope is GeneratorScope.federated:
        yield Fault("generator.scope", "federated sends a generator without noise", "take none")
    if not recipe.privacy.release_metrics and scope is not GeneratorScope.none:
        what = f"with scope {scope} more leaves than the noised steps, and release_metrics is false"
        yield Fault("generator.scope", what, "take none, or leave privacy.release_metrics true")
    for index, name in enumerate(recipe.baselines):
        if name in OWN_TEACHERS:
            what = f"{name} trains a teacher through run.rounds, which a private run has not"
            yield Fault(f"baselines[{index}]", what, "leave it out")


def _site_faults(recipe: Recipe) -> Iterator[Fault]:
    sites = recipe.sites if recipe.cohort is None else [SiteConfig("a site of the cohort")]
    for index, site in enumerate(sites):
        patients = declared_patients(site, recipe.cohort)
        if patients is None:
            what = "a private run divides by a number of patients that is public"
            yield Fault(f"sites[{index}].patients", what, "declare the labelled ones that train")
        elif patients * recipe.privacy.delta >= 1:
            what = f"{recipe.privacy.delta:g} is no less than one in {patients} patients of {site.name}"
            yield Fault("privacy.delta", what, "take a tenth of that or less, such as 1e-5")
