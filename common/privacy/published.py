"""Numbers measured on patients that leave with noise: how many, of what epsilon, and what that costs.

Each is a mean over the test patients of a value in [0, 1]: the sum with Laplace noise (Dwork et al. 2006),
divided by a number of patients that is public. One patient moves a sum by at most 1.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from common.errors import ArtefactError
from common.plan import rebuild
from common.privacy.events import Event, Mechanism

MEAN_DICE = "mean_dice"  # as a policy allows it
LAPLACE = str(Mechanism.laplace)  # on receipts
CLEAR_SCALE = 0.05  # of the noise on a mean Dice: above, two good models cannot be told apart


@dataclass(frozen=True)
class PublishedMetrics:
    """What a run publishes of a site's test patients, once.

    Attributes:
        epsilon_each: of one number.
        numbers: how many there are.
        patients: of the test split, as the site declares; every sum is divided by it.
    """

    epsilon_each: float
    numbers: int
    patients: int

    @property
    def noise_scale(self) -> float:
        """Of the Laplace noise on each mean; its standard deviation is 1.4 times that."""
        return 1 / (self.epsilon_each * self.patients)

    @property
    def event(self) -> Event:
        """What all the numbers together cost a patient of the test split."""
        return Event(1 / self.epsilon_each, 1.0, self.numbers, Mechanism.laplace)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PublishedMetrics:
        """Raises ``ArtefactError`` if ``value`` is none."""
        try:
            found = rebuild(cls, value)
        except (TypeError, KeyError, AttributeError) as error:
            raise ArtefactError(f"not a plan of published metrics: {error}") from error
        assert isinstance(found, cls)
        return found
