"""What a site has paid for: in its ledger before anything is computed, and what left under it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from common.canonical import sha256_of
from common.privacy.entries import Context, EntryType, Payload
from common.privacy.ledger import Ledger
from common.privacy.plan import PrivacyPlan
from common.privacy.published import LAPLACE

GAUSSIAN = "gaussian"  # on receipts: one noised sum over all patients


class Charge(Protocol):
    """A table of numbers that was paid for.

    Attributes:
        mechanism: that made it, as the receipt says.
        epsilon: of the patients who have spent most, this table included; None: infinite.
    """

    @property
    def mechanism(self) -> str: ...

    @property
    def epsilon(self) -> float | None: ...

    def faults(self, payload: Mapping[str, Any]) -> list[str]:
        """What of ``payload`` nobody paid for."""

    def commit(self, payload: Payload) -> None:
        """Record what leaves, before it does, each time that it does."""


@dataclass(frozen=True)
class MetricCharge:
    """The numbers of one run, spent from the moment that this exists.

    Attributes:
        number: of its entry in the ledger.
        numbers: how many may leave under it.
        fresh: whether this very call spent them; if not, they were measured before, or lost.
    """

    ledger: Ledger
    number: int
    numbers: int
    fresh: bool
    epsilon: float | None
    mechanism: str = LAPLACE

    def faults(self, payload: Mapping[str, Any]) -> list[str]:
        """What of a table of noised metrics nobody paid for."""
        cells = payload["metrics"]
        found = []
        if payload["counts"] is not None:
            found.append("the site's counts are real, and have no noise")
        if any(cell["ci95"] is not None for cell in cells):
            found.append("an interval is of the patients' own values, and has no noise")
        if any(cell["value"] is not None and cell["noise_scale"] is None for cell in cells):
            found.append("a number without noise")
        if sum(cell["value"] is not None for cell in cells) > self.numbers:
            found.append("more numbers than were paid for")
        return found

    def commit(self, payload: Payload) -> None:
        self.ledger.commit(self.number, [payload], [])


@dataclass(frozen=True)
class StyleCharge:
    """The style summary of one run, spent from the moment that this exists.

    Attributes:
        number: of its entry in the ledger.
        terms: of the release.
        charged: ids of the patients who paid for it; it is made of nobody else.
        sent: SHA-256 of the summary that has left under it; empty: none has.
    """

    ledger: Ledger
    number: int
    terms: PrivacyPlan
    context: Context
    charged: frozenset[str]
    sent: str
    epsilon: float | None
    mechanism: str = GAUSSIAN

    def faults(self, payload: Mapping[str, Any]) -> list[str]:
        """One summary was paid for: what has left once may leave again, and nothing else may."""
        return ["another style summary has left already"] if self.sent not in ("", sha256_of(payload)) else []

    def commit(self, payload: Payload) -> None:
        if self.sent:
            self.ledger.record(EntryType.checkpoint, self.context, {})
        else:
            self.ledger.commit(self.number, [payload], [self.terms.event()])


@dataclass(frozen=True)
class Reservation:
    """One noised step, spent from the moment that this exists.

    Attributes:
        number: of its entry in the ledger.
        step: how many steps of the run were reserved before it.
        terms: of the step.
        epsilon: of the patients who have spent most, this step included, at ``terms.delta``; None: infinite.
    """

    ledger: Ledger
    number: int
    step: int
    terms: PrivacyPlan
    epsilon: float | None

    def commit(self, payloads: Sequence[Payload]) -> None:
        """Record what leaves, before it does. Raises ``ArtefactError`` for what was committed before."""
        self.ledger.commit(self.number, payloads, [self.terms.event(1)])
