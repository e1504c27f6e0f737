"""What a run came to: `RunOutcome`, kept in every checkpoint and at the end in ``RUN/state/outcome.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from common.canonical import canonical_json
from common.durable import write_atomic
from common.errors import ArtefactError
from common.guard_api import SiteMetrics, StudentNote
from common.plan import Stage, rebuild
from common.style import StyleSummary
from server.report.schema import RoundRecord

OUTCOME_FILE = "outcome.json"


@dataclass(frozen=True)
class SiteRefusal:
    """A site that did not agree to the plan, in its own border code."""

    site: str
    code: str
    field: str = ""


@dataclass(frozen=True)
class SiteAdapter:
    """The preset and rank that a site trains."""

    preset: str
    rank: int


@dataclass(frozen=True)
class RunOutcome:
    """Everything the server learned; the report's server side.

    Attributes:
        sites: that agreed to the plan, in order.
        adapters: site -> what it agreed to train, a variant of the plan.
        refusals: sites that did not.
        rounds: every finished round of every stage, in order.
        styles, notes, metrics: per site, from the stages of that name.
        adapter_sha256: of the global teacher adapter, once its rounds are done.
        generator_sha256: of the global generator adapter, in the federated scope.
        student_sha256: of the student's common weights, as an adapter, where they travel.
    """

    run_id: str
    plan_sha256: str
    sites: list[str]
    refusals: list[SiteRefusal] = field(default_factory=list)
    rounds: list[RoundRecord] = field(default_factory=list)
    styles: dict[str, StyleSummary] = field(default_factory=dict)
    notes: dict[str, StudentNote] = field(default_factory=dict)
    metrics: dict[str, SiteMetrics] = field(default_factory=dict)
    adapter_sha256: str = ""
    generator_sha256: str = ""
    student_sha256: str = ""
    adapters: dict[str, SiteAdapter] = field(default_factory=dict)

    def has(self, stage: Stage, index: int) -> bool:
        """Whether that round is finished."""
        return any(record.stage == stage and record.index == index for record in self.rounds)

    def with_round(self, record: RoundRecord, **changes: Any) -> RunOutcome:
        return replace(self, rounds=[*self.rounds, record], **changes)

    def save(self, folder: Path) -> None:
        """Raises ``ArtefactError`` if the disk is full."""
        write_atomic(folder / OUTCOME_FILE, json.dumps(asdict(self), indent=1, allow_nan=False).encode())

    @classmethod
    def load(cls, folder: Path) -> RunOutcome:
        """Raises ``ArtefactError`` if ``folder`` holds no outcome of this version."""
        path = folder / OUTCOME_FILE
        try:
            return cls.from_json(path.read_text())
        except OSError as error:
            raise ArtefactError(
                f"there is no {path}: if the run was stopped, --resume continues it"
            ) from error

    def to_json(self) -> str:
        return canonical_json(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RunOutcome:
        """Raises ``ArtefactError`` if ``text`` is no outcome of this version."""
        try:
            value: Mapping[str, Any] = json.loads(text)
            outcome = rebuild(cls, value)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArtefactError(f"not a run's outcome of this version: {error}") from error
        assert isinstance(outcome, cls)
        return outcome
