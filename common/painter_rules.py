"""Who makes the synthetic images, and what that takes of the sites: recipes that ask too much."""

from __future__ import annotations

from collections.abc import Iterator

from common.names import GENERATOR_SIDES, GENERATORS
from common.recipe import GeneratorScope, Recipe, StyleDetail
from common.schema_check import Fault

# Scopes that sample the diffusion network, and those in which every site shares its style.
NETWORK_SCOPES = (GeneratorScope.style, GeneratorScope.local, GeneratorScope.federated)
SHARING_SCOPES = (
    GeneratorScope.style,
    GeneratorScope.federated,
    GeneratorScope.recolour,
    GeneratorScope.paint,
)
# Baselines whose images another painter makes, by what it wants: every site's style, and its spectrum too.
STYLED_BASELINES = ("recolour", "paint", "histogram", "amplitude")
SPECTRAL_BASELINES = ("amplitude",)


def painter_faults(recipe: Recipe) -> Iterator[Fault]:
    """Painters that want what no site shares, a size they do not paint, a token that tells no sites apart."""
    scope, detail = recipe.generator.scope, recipe.generator.style_detail
    if recipe.generator.site_token and scope is not GeneratorScope.federated:
        what = f"scope {scope} trains no network for several sites"
        yield Fault("generator.site_token", what, "take generator.scope=federated, or leave it false")
    yield from _size_faults(recipe)
    for index, name in enumerate(recipe.baselines):
        if name in STYLED_BASELINES and scope not in SHARING_SCOPES:
            what = f"{name} paints in every site's style, and with scope {scope} no site shares its own"
            fix = f"take generator.scope of {', '.join(SHARING_SCOPES)}, or leave it out"
            yield Fault(f"baselines[{index}]", what, fix)
        if name in SPECTRAL_BASELINES and detail is not StyleDetail.spectrum:
            what = f"{name} wants the sites' spectra, and with style_detail {detail} they share none"
            yield Fault(f"baselines[{index}]", what, "take generator.style_detail=spectrum, or leave it out")


def _size_faults(recipe: Recipe) -> Iterator[Fault]:
    name, side = recipe.generator.name, recipe.data.image_size
    low, high = GENERATOR_SIDES.get(name, (side, side))
    if recipe.generator.scope in NETWORK_SCOPES and not low <= side <= high:
        what = f"{name} paints images of {low} to {high} pixels and not of {side}"
        fix = f"take {GENERATORS[0]}, or a data.image_size that is a multiple of 32 from {low} to {high}"
        yield Fault("generator.name", what, fix)
