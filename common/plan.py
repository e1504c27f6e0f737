"""What a site consents to (`RunPlan`) and the orders of one round (`Round`).

A plan is plain data with one canonical text, so that its digest names the whole job: every setting, the
base models, and each tensor that may leave a site.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import date
from enum import StrEnum
from functools import cache, cached_property
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from common.canonical import canonical_json, sha256_of
from common.errors import ArtefactError
from common.privacy.heads import SignedHead
from common.recipe import (
    AggregationConfig,
    DataConfig,
    EvaluationConfig,
    GeneratorConfig,
    PrivacyConfig,
    StudentConfig,
    TeacherConfig,
)


class Stage(StrEnum):
    propose = "propose"
    adapt = "adapt"
    style = "style"
    generator = "generator"
    shared_student = "shared_student"  # rounds of the student's own weights, where they travel
    student = "student"
    evaluate = "evaluate"


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that may leave a site: exact name, shape and dtype (``float32``)."""

    name: str
    shape: list[int]
    dtype: str = "float32"


@dataclass(frozen=True)
class PayloadSpec:
    """Everything that may leave a site in one stage.

    Attributes:
        tensors: exactly these tensors, no more and no fewer.
        numbers: names of the plain numbers or tables allowed beside them.
        max_bytes: of the whole payload.
    """

    stage: Stage
    tensors: list[TensorSpec]
    numbers: list[str]
    max_bytes: int


@dataclass(frozen=True)
class Variant:
    """One way in which a site may train the teacher: a preset at a rank, and exactly what then goes up.

    Attributes:
        payloads: of the rounds in turn: one where every round sends the same, two where a rule alternates.
        a_sha256: of a private run, the digest of the factors A that it keeps (`Adapter.a_sha256`); empty
            where there are none, or where the run may change them.
    """

    preset: str
    rank: int
    payloads: list[PayloadSpec]
    a_sha256: str = ""

    def payload(self, round_index: int) -> PayloadSpec:
        """What goes up in round ``round_index`` (0-based)."""
        return self.payloads[round_index % len(self.payloads)]


@dataclass(frozen=True)
class RunPlan:
    """The whole job, as every site is asked to agree to it.

    Attributes:
        code_sha256: digest of this project's source files on the proposing side.
        models: base model name -> SHA-256 of its weights.
        stages: in their order.
        data: how images are read; ``root`` is None, for where files lie is the site's own business.
        payloads: what may leave a site, one entry a stage that sends anything (of rounds that send
            different things in turn, one each); of stage adapt see ``variants``.
        variants: the adapters that sites may train in stage adapt, the recipe's own first. A site trains
            one of them.
        baselines: models that each site trains beside its student, for comparison.
        sites: that are asked, by name; empty where the coordinator does not know them beforehand.
        starts: digest of what is sent in round 0 of each training stage, as it travels (`start_of`).
        bundle_sha256: of the Flower bundle whose code runs at the sites; empty where none is named.
        expires: the last day (UTC, YYYY-MM-DD) on which a site works on it; empty: none.
        coordinator_key: X25519 (64 hex digits), to which sites seal their answers (`common.wire.sealed`);
            empty: they do not.
    """

    run_id: str
    seed: int
    rounds: int
    code_sha256: str
    models: dict[str, str]
    stages: list[Stage]
    payloads: list[PayloadSpec]
    variants: list[Variant]
    data: DataConfig
    teacher: TeacherConfig
    aggregation: AggregationConfig
    generator: GeneratorConfig
    student: StudentConfig
    privacy: PrivacyConfig
    evaluation: EvaluationConfig
    baselines: list[str]
    sites: list[str] = field(default_factory=list)
    starts: dict[str, str] = field(default_factory=dict)
    bundle_sha256: str = ""
    expires: str = ""
    coordinator_key: str = ""

    def to_json(self) -> str:
        return canonical_json(asdict(self))

    @cached_property
    def digest(self) -> str:
        return sha256_of(asdict(self))

    def payload(self, stage: Stage, round_index: int = 0) -> PayloadSpec | None:
        """What may leave a site in a round of ``stage``; of stage adapt, by the recipe's own variant."""
        if stage is Stage.adapt:
            return self.variants[0].payload(round_index)
        listed = [payload for payload in self.payloads if payload.stage == stage]
        return listed[round_index % len(listed)] if listed else None

    def variant(self, preset: str, rank: int) -> Variant | None:
        """The variant of that name and rank, if a site may train it."""
        return next((one for one in self.variants if (one.preset, one.rank) == (preset, rank)), None)

    def rounds_of(self, stage: Stage) -> int:
        """How many rounds ``stage`` has; 0 of one that the plan does not have."""
        trained = {
            Stage.adapt: self.rounds,
            Stage.generator: self.generator.rounds,
            Stage.shared_student: self.student.rounds,
        }
        return trained.get(stage, 1) if stage in self.stages else 0

    def ended(self, today: date) -> bool:
        """Whether ``today`` (UTC) is past its last day; what is no date has always ended."""
        return bool(self.expires) and (day_of(self.expires) or date.min) < today

    @classmethod
    def from_json(cls, text: str) -> RunPlan:
        """Raises ``ArtefactError`` if ``text`` is not a plan of this version."""
        import json

        try:
            plan = rebuild(cls, json.loads(text))
        except (ValueError, TypeError, KeyError) as error:
            raise ArtefactError(f"not a run plan of this version: {error}") from error
        assert isinstance(plan, cls)
        return plan


def day_of(text: str) -> date | None:
    """The day that ``text`` names as YYYY-MM-DD and in no other way, or None."""
    try:
        day = date.fromisoformat(text)
    except ValueError:
        return None
    return day if day.isoformat() == text else None


def start_of(stage: Stage, variant: Variant) -> str:
    """The name in `RunPlan.starts` of what round 0 of ``stage`` sends to a site that trains ``variant``."""
    return f"adapt.{variant.preset}.{variant.rank}" if stage is Stage.adapt else str(stage)


@dataclass(frozen=True)
class Round:
    """Read-only orders for one message.

    Attributes:
        index: 0-based within the stage.
        deadline_s: how long the site may take; checked between optimiser steps.
        nonce: fresh for every message; an answer carries it back.
        notice: why this site's last answer was not used, in words without data; empty if it was.
        heads: in a private run the last heads of the sites' ledgers, this site's own among them, as far as
            the server has seen any (`client.witnesses`).
    """

    plan_sha256: str
    stage: Stage
    index: int
    deadline_s: float
    nonce: str
    notice: str = ""
    heads: list[SignedHead] = field(default_factory=list)


@cache
def hints_of(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields; looking them up anew costs more than using them."""
    return get_type_hints(kind)


def rebuild(kind: Any, value: Any) -> Any:
    """Turn plain JSON values back into dataclasses, enums and lists; unknown keys raise ``TypeError``."""
    if get_origin(kind) in (Union, UnionType):
        inner = [arm for arm in get_args(kind) if arm is not type(None)]
        return None if value is None else rebuild(inner[0], value)
    if is_dataclass(kind) and isinstance(kind, type):
        hints = hints_of(kind)
        unknown = set(value) - {item.name for item in fields(kind)}
        if unknown:
            raise TypeError(f"unknown keys {sorted(unknown)} in {kind.__name__}")
        return kind(**{name: rebuild(hints[name], entry) for name, entry in value.items()})
    if get_origin(kind) is list:
        return [rebuild(get_args(kind)[0], entry) for entry in value]
    if get_origin(kind) is dict:
        return {key: rebuild(get_args(kind)[1], entry) for key, entry in value.items()}
    if get_origin(kind) is tuple:
        return tuple(value)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return kind(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value
