"""A site's synthetic images, in the styles of all sites or in its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from client.curation.quarantine import Screened, screen
from client.deadline import Deadline
from client.generation import fine_tune, synthesise
from client.patients import Patient
from client.site import Site
from client.style import summarise_style
from common.adapter import Adapter
from common.generator import initial_adapter, resident_generator
from common.plan import RunPlan
from common.recipe import GeneratorScope
from common.style import StyleSummary


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

    def images(self, styles: str) -> Screened | None:
        """Images in "all" sites' styles or in this site's "own", without copies of its patients.

        None where the scope has none.
        """
        scope = self.plan.generator.scope
        if scope == GeneratorScope.none:
            return None
        return self._own_images if styles == "own" or scope == GeneratorScope.local else self._all_images

    @cached_property
    def trained(self) -> Adapter | None:
        """The generator's adapter, if patients trained it."""
        if self.plan.generator.scope != GeneratorScope.local:
            return self.generator
        generator = resident_generator(self.plan.generator.name, self.plan.generator.rank)
        start, seed = self._start, self.site.draw_seed(self.plan, "generator", 0)
        return fine_tune(generator, start, self.labelled, self.plan, (0, seed), self.deadline).adapter

    @cached_property
    def _all_images(self) -> Screened:
        return self._paint([self.styles[name] for name in sorted(self.styles)])

    @cached_property
    def _own_images(self) -> Screened:
        return self._paint([self._own_style])

    def _paint(self, styles: Sequence[StyleSummary]) -> Screened:
        self.deadline.check("sampling synthetic images")
        generator = resident_generator(self.plan.generator.name, self.plan.generator.rank)
        seed = self.site.draw_seed(self.plan, "synthetic")
        painted = synthesise(generator, self.trained or self._start, styles, self.plan, seed)
        self.deadline.check("looking for copies of patients")
        return screen(painted, self.site.patients(self.plan.data, self.plan.seed), self.plan)

    @cached_property
    def _own_style(self) -> StyleSummary:
        """Made afresh, for this one stays here: groups may be as small as they are."""
        seed = self.site.draw_seed(self.plan, "style")
        settings = self.plan.generator
        return summarise_style(self.labelled, self.plan.data.image_size, settings.style_groups, 1, seed)

    @property
    def _start(self) -> Adapter:
        return initial_adapter(self.plan.generator, self.plan.seed)
