"""How often each site's answer was used: a rule that silences a small or unusual hospital must show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from common.pages.wording import count
from server.report.charts import share_bar
from server.report.schema import RoundRecord
from server.report.wording import derived

TRAINING = ("adapt", "generator", "shared_student")


@dataclass(frozen=True)
class Acceptance:
    """``used`` of the ``asked`` answers to training rounds went into the result."""

    site: str
    asked: int
    used: int

    @property
    def share(self) -> float:
        return self.used / self.asked

    def cells(self) -> list[Markup]:
        """Asked, used, share and a bar."""
        rounds = "counted over the training rounds in report.json"
        bar = share_bar([self.used, self.asked - self.used], f"{self.used} of {self.asked} answers used")
        return [
            derived(count(self.asked), rounds),
            derived(count(self.used), rounds),
            derived(f"{self.share:.0%}", "used, as a share of asked"),
            bar,
        ]


def acceptance(rounds: Sequence[RoundRecord]) -> list[Acceptance]:
    """One entry a site that was asked to train, in order."""
    asked: dict[str, int] = {}
    used: dict[str, int] = {}
    for record in rounds:
        if record.stage in TRAINING:
            for site in {*record.sites, *(one.site for one in record.rejected)}:
                asked[site] = asked.get(site, 0) + 1
            for site in record.sites:
                used[site] = used.get(site, 0) + 1
    return [Acceptance(site, asked[site], used.get(site, 0)) for site in sorted(asked)]
