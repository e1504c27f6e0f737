"""The numbers of ``report.json``, schema 1: everything the page shows stands here and nowhere else.

Field names are those of the published contract; ``class`` is ``class_name`` in Python. ``pictures``
and ``losses`` are additions that readers of schema 1 may ignore.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.errors import ArtefactError
from common.plan import rebuild

SCHEMA = 1


@dataclass(frozen=True)
class RunEntry:
    """``started`` and ``finished`` are ISO 8601 in UTC; ``enforced`` is False in a simulation."""

    id: str
    recipe: str
    seed: int
    engine: str
    started: str
    finished: str
    wall_s: float
    cpu_s: float
    versions: dict[str, str]
    config_sha256: str
    enforced: bool


@dataclass(frozen=True)
class SiteEntry:
    id: str
    patients: int
    images: int
    train: int
    val: int
    test: int
    student: str


@dataclass(frozen=True)
class TeacherEntry:
    name: str
    params: int
    trainable: int
    base_sha256: str
    adapter_sha256: str


@dataclass(frozen=True)
class Rejection:
    site: str
    reason: str


@dataclass(frozen=True)
class RoundRecord:
    """One round of one stage. Bytes count the real serialized messages.

    ``residual`` is the relative Frobenius distance of what went down from the exact mean (None where a
    stage aggregates nothing); ``losses`` holds each site's mean training loss (first, last tenth).
    """

    index: int
    stage: str
    sites: list[str]
    bytes_up: dict[str, int]
    bytes_down: dict[str, int]
    wall_s: float
    residual: float | None = None
    rejected: list[Rejection] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class BenefitCell:
    """A mean over patients. ``value`` None: suppressed or not measurable, and ``reason`` says why.

    ``noise_scale``: of the Laplace noise in it, where there is any; ``patients`` is then as declared.
    """

    site: str
    model: str
    tested_on: str
    metric: str
    class_name: str
    value: float | None
    ci95: list[float] | None
    patients: int
    reason: str = ""
    noise_scale: float | None = None


@dataclass(frozen=True)
class StudentEntry:
    name: str
    params: int
    sha256: str
    latency_ms: float
    teacher_latency_ms: float
    start: str = ""  # what it was trained from; empty in a report of an earlier version


@dataclass(frozen=True)
class SyntheticEntry:
    """``copy_rate`` and ``dropped_copy`` are None where no copy test ran, or the site withheld them.

    What is not counted as kept or dropped was passed over for images with more to learn from.
    """

    generated: int
    kept: int
    dropped_inconsistent: int
    dropped_copy: int | None = None
    copy_rate: float | None = None


@dataclass(frozen=True)
class PrivacyStage:
    stage: str
    mechanism: str
    noise_multiplier: float | None = None
    sample_rate: float | None = None
    steps: int | None = None
    epsilon: float | None = None


@dataclass(frozen=True)
class PrivacyEntry:
    """``guarantee`` False: nothing bounds what the payloads say about one patient."""

    unit: str = "patient"
    guarantee: bool = False
    epsilon: float | None = None
    delta: float | None = None
    neighbouring: str | None = None
    sampling: str | None = None
    stages: list[PrivacyStage] = field(default_factory=list)
    ledger_head: str | None = None


@dataclass(frozen=True)
class EgressEntry:
    site: str
    round: int
    name: str
    bytes: int
    sha256: str
    mechanism: str
    epsilon_after: float | None = None


@dataclass(frozen=True)
class Picture:
    """A picture for the page: PNG as base64. Only a simulation makes any; kind is cases | synthetic."""

    site: str
    kind: str
    caption: str
    columns: list[str]
    png: str


@dataclass(frozen=True)
class RunReport:
    run: RunEntry
    sites: list[SiteEntry]
    teacher: TeacherEntry
    rounds: list[RoundRecord]
    benefit: list[BenefitCell]
    students: dict[str, StudentEntry]
    synthetic: dict[str, SyntheticEntry]
    privacy: dict[str, PrivacyEntry]
    egress: list[EgressEntry]
    pictures: list[Picture] = field(default_factory=list)
    schema: int = SCHEMA

    def to_json(self) -> str:
        value = asdict(self)
        for cell in value["benefit"]:
            cell["class"] = cell.pop("class_name")
        return json.dumps(value, indent=1, allow_nan=False)

    @classmethod
    def load(cls, path: Path) -> RunReport:
        """Raises ``ArtefactError`` if ``path`` holds no report of schema 1."""
        try:
            value: dict[str, Any] = json.loads(path.read_text())
            if value.get("schema") != SCHEMA:
                raise ValueError(f"schema {value.get('schema')!r}, this version reads {SCHEMA}")
            for cell in value["benefit"]:
                cell["class_name"] = cell.pop("class")
            report = rebuild(cls, value)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArtefactError(f"{path} is not a report of this version: {error}") from error
        assert isinstance(report, cls)
        return report
