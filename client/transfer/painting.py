"""A site's synthetic images: in the styles of all sites or in its own, by the network or another painter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from client.curation.quarantine import Screened, screen
from client.deadline import Deadline
from client.generation import Sampling, fine_tune, synthesise
from client.painters import PAINTERS, Material, painter_of
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

    def images(self, styles: str, painter: str | None = None) -> Screened | None:
        """Images in "all" sites' styles or in this site's "own", without copies of its patients.

        None where there are none.

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
    def trained(self) -> Adapter | None:
        """The generator's adapter, if patients trained it."""
        if self.plan.generator.scope != GeneratorScope.local:
            return self.generator
        generator, seed = generator_of(self.plan.generator), self.site.draw_seed(self.plan, "generator", 0)
        start = initial_adapter(self.plan.generator, self.plan.seed)
        return fine_tune(generator, start, self.labelled, self.plan, (0, seed), self.deadline).adapter

    @cached_property
    def _made(self) -> dict[tuple[str, bool], Screened | None]:
        return {}

    def _paint(self, name: str | None, own: bool) -> Screened | None:
        """None where a painter wants this site's labelled crops and there is none."""
        self.deadline.check("making synthetic images")
        seed = self.site.draw_seed(self.plan, "synthetic")
        if name is None:
            return self._sampled(self._styles(own), seed)
        kind = PAINTERS[name]
        if kind.own_pixels and not self.labelled:
            return None
        styles = list(self._styles(own).values()) if kind.shares else []
        return Screened.whole(kind.paint(Material(self.plan, styles, self.labelled, seed)))

    def _sampled(self, styles: Mapping[str, StyleSummary], seed: int) -> Screened:
        """What the network paints, held against the patients whom it may have seen."""
        generator, how = generator_of(self.plan.generator), Sampling(sites=tuple(styles))
        adapter = self.trained or initial_adapter(self.plan.generator, self.plan.seed)
        painted = synthesise(generator, adapter, list(styles.values()), self.plan, seed, how)
        self.deadline.check("looking for copies of patients")
        return screen(painted, self.site.patients(self.plan.data, self.plan.seed), self.plan)

    def _styles(self, own: bool) -> dict[str, StyleSummary]:
        return {self.site.name: self._own_style} if own else dict(sorted(self.styles.items()))

    @cached_property
    def _own_style(self) -> StyleSummary:
        """Made afresh, for this one stays here: groups may be as small as they are."""
        seed = self.site.draw_seed(self.plan, "style")
        settings = self.plan.generator
        size, detail = self.plan.data.image_size, settings.style_detail
        return summarise_style(self.labelled, size, settings.style_groups, 1, seed, detail)
