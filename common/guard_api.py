"""The guard's contract: the only verbs through which a courier reaches a hospital's data.

In a deployment the guard is a process of the site's own and this contract crosses a Unix socket; in a
simulation the same guard runs inside the process (``in-process:FOLDER``), which enforces nothing.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Protocol

from common.adapter import Adapter, AdapterUpdate
from common.approval import Approval
from common.errors import UsageError
from common.plan import Round, RunPlan
from common.privacy.heads import SignedHead
from common.style import StyleSummary


@dataclass(frozen=True)
class PlanAnswer:
    """A site's word on a plan; it never depends on data.

    Attributes:
        code: empty when it agrees; ``field`` is then empty too.
        preset, rank: the plan's variant that the site will train; empty and 0 when it refuses.
        ledger_head: of the site's ledger in a private run, as in every answer there (`client.egress`).
        approval: the signed word of the site's people, where they are asked.
    """

    site: str
    agrees: bool
    plan_sha256: str
    code: str = ""
    field: str = ""
    preset: str = ""
    rank: int = 0
    ledger_head: SignedHead | None = None
    approval: Approval | None = None


@dataclass(frozen=True)
class Metric:
    """One released number: a mean over patients with its bootstrap interval.

    ``value`` and ``ci95`` are None when ``patients`` is below the site's minimum; ``reason`` says so.
    ``noise_scale``: of the Laplace noise in ``value``, where there is any; ``patients`` is then the number
    that the site declares, and there is no interval.
    """

    model: str
    metric: str
    class_name: str
    value: float | None
    ci95: tuple[float, float] | None
    patients: int
    reason: str = ""
    noise_scale: float | None = None


@dataclass(frozen=True)
class StudentNote:
    """What a site says of its student: never the student itself.

    ``dropped_copy``: synthetic images taken out because they are like a patient's, and ``copy_rate`` their
    share; None where no test ran, or the site withholds it: ``kept`` then counts them too. Of a site whose
    every word about patients is noised, ``generated`` is the plan's number, and all of them count as kept.
    """

    site: str
    name: str
    params: int
    sha256: str
    latency_ms: float
    teacher_latency_ms: float
    generated: int
    kept: int
    dropped_inconsistent: int
    dropped_copy: int | None = None
    copy_rate: float | None = None
    ledger_head: SignedHead | None = None
    start: str = ""  # a `common.recipe.Start`: as the recipe or the kind says, never by what the data are


@dataclass(frozen=True)
class SiteCounts:
    """Sizes that a site agrees to show: patients and images, and patients a split."""

    patients: int
    images: int
    train: int
    val: int
    test: int


@dataclass(frozen=True)
class SiteMetrics:
    """``counts`` None: the site does not tell them."""

    site: str
    counts: SiteCounts | None
    metrics: list[Metric] = field(default_factory=list)
    ledger_head: SignedHead | None = None


class GuardApi(Protocol):
    """Every verb checks the plan's digest, and sends its answer through `client.egress`."""

    def propose(self, plan: RunPlan, order: Round) -> PlanAnswer: ...

    def adapt(self, order: Round, adapter: Adapter) -> AdapterUpdate: ...

    def style(self, order: Round) -> StyleSummary: ...

    def train_generator(self, order: Round, adapter: Adapter) -> AdapterUpdate: ...

    def train_shared_student(self, order: Round, student: Adapter) -> AdapterUpdate: ...

    def train_student(
        self,
        order: Round,
        adapter: Adapter,
        styles: dict[str, StyleSummary],
        generator: Adapter | None,
        student: Adapter | None = None,
    ) -> StudentNote: ...

    def evaluate(self, order: Round, adapter: Adapter) -> SiteMetrics: ...


def connect(address: str) -> GuardApi:
    """The guard at ``in-process:FOLDER``. Raises ``UsageError`` for an address of another kind.

    The guard's module is resolved by name at run time, so that `common` does not import `client`, and a
    courier on a deployed site never loads the guard's code. A guard in a process of its own
    (``unix:SOCKET``) is asked in whole messages: `common.wire.desk.ask`.
    """
    kind, _, folder = address.partition(":")
    if kind == "in-process" and folder:
        guard: GuardApi = importlib.import_module("client.guard").open_guard(folder)
        return guard
    raise UsageError(f"no guard at {address!r}: an address is unix:SOCKET or in-process:FOLDER")
