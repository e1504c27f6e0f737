"""What a recipe that asks for differential privacy must say besides: what noise does not cover is a fault.

The mechanism covers the teacher's rounds, one noised step in each, of tensors whose gradient it can take
patient by patient. A recipe that wants more is refused here, and never run with less privacy than it asks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from common import public_factors
from common.names import PERSONAL_RULES, PINNED_A_RULES
from common.privacy.published import CLEAR_SCALE, PublishedMetrics
from common.recipe import (
    CohortConfig,
    DecoderTraining,
    GeneratorScope,
    PrivacyConfig,
    Recipe,
    SiteConfig,
    StyleDetail,
)
from common.schema_check import Fault
from common.tuning.presets import rank_of

B_ALONE_PRESETS = ("dp",)
PRIVATE_PRESETS = ("decoder", *B_ALONE_PRESETS)  # nothing of the encoder, or the factor B alone
STYLED_SCOPES = (GeneratorScope.style, GeneratorScope.recolour, GeneratorScope.paint)  # no network leaves
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


def privacy_notes(recipe: Recipe) -> Iterator[str]:
    """What forbids nothing, and should be known: where the noise on a published number drowns it."""
    each = recipe.privacy.metric_epsilon
    for site in recipe.sites:
        tested = declared_test_patients(site)
        if each is None or tested is None:
            continue
        scale = PublishedMetrics(each, 1, tested).noise_scale
        if scale > CLEAR_SCALE:
            enough = math.ceil(1 / (each * CLEAR_SCALE))
            yield (
                f"{site.name}: a mean Dice over {tested} patients leaves with noise of scale {scale:.2g}, "
                f"which says little; {enough} patients would bring it to {CLEAR_SCALE}"
            )


def declared_patients(site: SiteConfig, cohort: CohortConfig | None = None) -> int | None:
    """The patients that a simulated site declares; None: it does not.

    A site of a cohort declares its labelled images: as many patients, or more than it has.
    """
    if cohort is not None:
        return cohort.labelled
    return site.patients or (site.phantom.train_patients if site.phantom else None)


def declared_test_patients(site: SiteConfig) -> int | None:
    """Those on whom a simulated site tests, as it declares; None: it does not."""
    return site.test_patients or (site.phantom.test_patients if site.phantom else None)


def _training_faults(recipe: Recipe) -> Iterator[Fault]:
    fix = "take teacher.adapter=decoder, or dp"
    own = {f"sites[{index}]": site.adapter for index, site in enumerate(recipe.sites) if site.adapter}
    for key, adapter in {"teacher": recipe.teacher.adapter, **own}.items():
        if adapter not in PRIVATE_PRESETS:
            yield Fault(f"{key}.adapter", f"{adapter} is not trained with differential privacy", fix)
    if recipe.teacher.decoder is DecoderTraining.lora and recipe.teacher.adapter not in B_ALONE_PRESETS:
        what = "factors A and B both trained multiply their noise"
        yield Fault(
            "teacher.decoder", what, "take full, shallow or head; adapter dp trains B alone, also there"
        )
    if recipe.teacher.cached_views:
        what = "a private run keeps one view of every image by itself"
        yield Fault("teacher.cached_views", what, "leave it 0")
    if recipe.aggregation.rule in PERSONAL_RULES:
        what = f"rule {recipe.aggregation.rule} trains adapters without noise, whose metrics leave"
        yield Fault("aggregation.rule", what, "take exact_split")
    if recipe.teacher.adapter in B_ALONE_PRESETS:
        yield from _factor_faults(recipe)


def _factor_faults(recipe: Recipe) -> Iterator[Fault]:
    """Factors under noise: A is public, named before the run begins, and stays as it is."""
    name, rule = recipe.teacher.name, recipe.aggregation.rule
    if rule not in PINNED_A_RULES:
        what = f"rule {rule} moves the factor A, which a private run fixes by its digest"
        yield Fault("aggregation.rule", what, "take ffa")
    if rank_of(recipe.teacher) > public_factors.MOST_ROWS:
        what = f"public factors have {public_factors.MOST_ROWS} rows"
        yield Fault("teacher.rank", what, f"take {public_factors.MOST_ROWS} at most")
    if public_factors.missing(name):
        what = f"{name} has no public factors, and A is never random under noise"
        yield Fault("teacher.adapter", what, f"run `{public_factors.making(name)}`, or take decoder")


def _stage_faults(recipe: Recipe) -> Iterator[Fault]:
    scope = recipe.generator.scope
    if scope is GeneratorScope.federated:
        yield Fault("generator.scope", "federated sends a generator without noise", "take none")
    noised = scope in STYLED_SCOPES and recipe.privacy.style_epsilon is not None
    free = scope is GeneratorScope.none or noised
    fix = "take none, or set privacy.style_epsilon" if scope in STYLED_SCOPES else "take none"
    if recipe.privacy.withheld and not free:
        what = f"with scope {scope} more leaves than the noised steps, and release_metrics is false"
        yield Fault("generator.scope", what, f"{fix}, or leave privacy.release_metrics true")
    elif recipe.privacy.covered and not free:
        what = f"with scope {scope} something leaves without noise, so noised metrics guarantee nothing"
        yield Fault("generator.scope", what, f"{fix}, or leave privacy.metric_epsilon out")
    yield from _style_faults(recipe)
    if recipe.privacy.withheld and recipe.privacy.metric_epsilon is not None:
        what = "no metric leaves while privacy.release_metrics is false"
        yield Fault("privacy.metric_epsilon", what, "leave it out, or leave release_metrics true")
    for index, name in enumerate(recipe.baselines):
        if name in OWN_TEACHERS:
            what = f"{name} trains a teacher through run.rounds, which a private run has not"
            yield Fault(f"baselines[{index}]", what, "leave it out")


def _style_faults(recipe: Recipe) -> Iterator[Fault]:
    """A noised style: where styles are shared, of the numbers that have public ranges, within the budget."""
    each, scope = recipe.privacy.style_epsilon, recipe.generator.scope
    if each is None:
        return
    if scope not in STYLED_SCOPES:
        what = f"with scope {scope} no style is shared, or a generator leaves beside it"
        fix = f"take generator.scope of {', '.join(STYLED_SCOPES)}, or leave it out"
        yield Fault("privacy.style_epsilon", what, fix)
    if recipe.generator.style_detail is not StyleDetail.colour:
        what = "only the numbers of style_detail colour are noised"
        yield Fault("generator.style_detail", what, "take colour")
    if recipe.privacy.epsilon is not None and each >= recipe.privacy.epsilon:
        what = f"{each:g} leaves nothing of privacy.epsilon {recipe.privacy.epsilon:g} to the training"
        yield Fault("privacy.style_epsilon", what, "take a quarter of that or less")


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
        elif patients < recipe.data.min_patients:
            what = f"{patients} patients are declared, and data.min_patients is {recipe.data.min_patients}"
            yield Fault(f"sites[{index}].patients", what, "declare that many, or lower data.min_patients")
        if recipe.privacy.metric_epsilon is not None:
            yield from _tested_faults(recipe, index)


def _tested_faults(recipe: Recipe, index: int) -> Iterator[Fault]:
    key, tested = f"sites[{index}].test_patients", declared_test_patients(recipe.sites[index])
    if tested is None:
        what = "a metric with noise is divided by a number of test patients that is public"
        yield Fault(key, what, "declare the labelled ones that test")
    elif tested < recipe.policy.min_cell_patients:
        least = recipe.policy.min_cell_patients
        what = f"{tested} test patients are declared, and policy.min_cell_patients is {least}"
        yield Fault(key, what, "declare that many, or leave privacy.metric_epsilon out")
