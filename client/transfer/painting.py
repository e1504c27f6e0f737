"""A site's synthetic images: in the styles of all sites or in its own, by the network or another painter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from client.deadline import Deadline
from client.generation import Sampling, fine_tune, synthesise
from client.painters import PAINTERS, Material, SyntheticSet, painter_of
from client.patients import Patient
from client.site import Site
from client.style import summarise_style
from common.adapter import Adapter
from common.generator import generator_of, initial_adapter
from common.plan import RunPlan
from common.recipe import GeneratorScope
from common.style import StyleSummary

NETWORK = "diffusion"  # who paints where no other painter does


@dataclass(frozen=True)
class Painter:
    """Paints each set of images once.

    Attributes:
        styles: what each site shared of its look.
        generator: the federated generator's adapter, if that scope ran.
        labelled: the site's patients, for its own style and for a generator of its own.
    """

    site: Site
    plan: RunPlan
    styles: Mapping[str, StyleSummary]
    generator: Adapter | None
    labelled: Sequence[Patient]
    deadline: Deadline

    def images(self, styles: str, painter: str | None = None) -> SyntheticSet | None:
        """Images in "all" sites' styles or in this site's "own"; None where there are none.

        Args:
            painter: of `client.painters.PAINTERS`; None: whoever the scope names, who may be nobody.
        """
        scope = self.plan.generator.scope
        name = painter_of(scope, painter)
        if name is None and scope == GeneratorScope.none:
            return None
        own = styles == "own" or (name is None and scope == GeneratorScope.local)
        key = (name or NETWORK, own)
        if key not in self._made:
            self._made[key] = self._paint(name, own)
        return self._made[key]

    @cached_property
    def _made(self) -> dict[tuple[str, bool], SyntheticSet | None]:
        return {}

    def _paint(self, name: str | None, own: bool) -> SyntheticSet | None:
        """None where a painter wants this site's labelled crops and there is none."""
        self.deadline.check("making synthetic images")
        seed = self.site.draw_seed(self.plan, "synthetic")
        kind = None if name is None else PAINTERS[name]
        if kind is not None and kind.own_pixels and not self.labelled:
            return None
        if kind is not None and not kind.shares:
            styles: dict[str, StyleSummary] = {}
        else:
            styles = {self.site.name: self._own_style} if own else dict(sorted(self.styles.items()))
        if kind is not None:
            return kind.paint(Material(self.plan, list(styles.values()), self.labelled, seed))
        generator, how = generator_of(self.plan.generator), Sampling(sites=tuple(styles))
        return synthesise(generator, self._generator_adapter(), list(styles.values()), self.plan, seed, how)

    @cached_property
    def _own_style(self) -> StyleSummary:
        """Made afresh, for this one stays here: groups may be as small as they are."""
        seed = self.site.draw_seed(self.plan, "style")
        settings = self.plan.generator
        size, detail = self.plan.data.image_size, settings.style_detail
        return summarise_style(self.labelled, size, settings.style_groups, 1, seed, detail)

    def _generator_adapter(self) -> Adapter:
        start = initial_adapter(self.plan.generator, self.plan.seed)
        if self.plan.generator.scope != GeneratorScope.local:
            return self.generator or start
        generator = generator_of(self.plan.generator)
        seed = self.site.draw_seed(self.plan, "generator", 0)
        return fine_tune(generator, start, self.labelled, self.plan, (0, seed), self.deadline).adapter
