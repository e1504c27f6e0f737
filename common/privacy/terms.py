"""What a run asks, held against what the policy allows: the terms in force, or a refusal.

The terms are the intersection: of each limit the narrower. Whoever asks may be stricter than the policy,
never looser; what the policy does not name is refused. A refusal names fields of the policy and nothing
that depends on data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Any

from packaging.specifiers import SpecifierSet

from common.canonical import sha256_of
from common.errors import PolicyRefusal
from common.plan import Stage
from common.privacy.accounting import epsilon
from common.privacy.entries import Entry, EntryType
from common.privacy.plan import PrivacyPlan, Sampling, Unit
from common.privacy.policy import Policy, StageRule, moment
from common.privacy.published import PublishedMetrics


@dataclass(frozen=True)
class AskedPayload:
    """A tensor that would leave: name, dtype and size in bytes; the stage whose steps make it."""

    stage: str
    name: str
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Asked:
    """What a run wants of a site; public, and known before any data is opened.

    Attributes:
        plans: stage -> its noised steps; a stage without one sends what no mechanism made.
        runs: stages that run at the site; those in ``sends`` also send something.
        code: digest of the code bundle, and the key id of who signed it ("" for nobody).
        metrics: names of the numbers measured on patients that would leave.
        published: how they are noised; None: they are not.
        private_tuning: whether settings are tuned on the site's patients.
    """

    rounds: int
    sites: Sequence[str]
    runs: Sequence[str]
    sends: Sequence[str]
    plans: Mapping[str, PrivacyPlan]
    outbound: Sequence[AskedPayload]
    base_models: Sequence[str]
    code: tuple[str, str]
    guard_version: str
    a_matrices: Sequence[str] = ()
    metrics: Sequence[str] = ()
    published: PublishedMetrics | None = None
    secure_aggregation: bool = False
    private_tuning: bool = False

    @property
    def noised(self) -> set[str]:
        """Stages whose payload comes out of a mechanism."""
        return {*self.plans, *([] if self.published is None else [str(Stage.evaluate)])}


@dataclass(frozen=True)
class Terms:
    """The intersection of policy and request, as it is printed and booked."""

    policy_sha256: str
    delta: float
    max_epsilon_total: float
    max_epsilon_per_year: float
    max_epsilon_per_run: float
    rounds: int
    stages: dict[str, str]
    noise_multiplier: dict[str, float]
    max_images_per_patient: int
    outbound: list[str]
    metrics: list[str]
    public_weight: int

    @property
    def digest(self) -> str:
        return sha256_of(asdict(self))


Fault = tuple[str, str]  # the policy's field, and what is asked against it


def agree(policy: Policy, asked: Asked) -> Terms:
    """The terms under which the run may start.

    Raises ``PolicyRefusal`` with every field that says no; its ``field`` is the first.
    """
    refuse([*_stage_faults(policy, asked), *_plan_faults(policy, asked), *_payload_faults(policy, asked),
            *_metric_faults(policy, asked), *_federation_faults(policy, asked),
            *_code_faults(policy, asked)])  # fmt: skip
    images = [plan.max_images_per_patient for plan in asked.plans.values()]
    return Terms(
        policy_sha256=policy.digest,
        delta=min([policy.delta, *(plan.delta for plan in asked.plans.values())]),
        max_epsilon_total=policy.max_epsilon_total,
        max_epsilon_per_year=policy.max_epsilon_per_year,
        max_epsilon_per_run=min(
            policy.max_epsilon_per_run, joint_epsilon(asked, policy.delta, policy.discretisation)
        ),
        rounds=min(policy.federation.max_rounds, asked.rounds),
        stages={stage: str(getattr(policy.stages, stage)) for stage in asked.runs},
        noise_multiplier={stage: plan.noise_multiplier for stage, plan in asked.plans.items()},
        max_images_per_patient=min([policy.max_images_per_unit, *images]),
        outbound=[payload.name for payload in asked.outbound],
        metrics=list(asked.metrics),
        public_weight=policy.public_weight,
    )


def check_in_force(policy: Policy, now: datetime, entries: Sequence[Entry] = ()) -> None:
    """The policy holds now and is not weaker than one that the ledger has seen.

    Raises ``PolicyRefusal``: ``clock`` (time has gone back), ``expires``, ``issued``, ``version`` (an older,
    or another policy of that number), ``supersedes_hash`` (it does not name the one before it).
    """
    if entries and now < entries[-1].time:
        refuse([("clock", "this machine's clock is behind the ledger's last entry")])
    if not policy.in_force_at(now):
        late = now >= moment(policy.expires)
        refuse(
            [("expires", "the policy has expired")]
            if late
            else [("issued", "the policy is not yet in force")]
        )
    seen = [entry.detail for entry in entries if entry.type is EntryType.policy]
    if not seen or seen[-1]["sha256"] == policy.digest:
        return
    if policy.version <= int(seen[-1]["version"]):
        refuse([("version", "the ledger has seen a newer policy, or another one of this number")])
    if policy.supersedes_hash != seen[-1]["sha256"]:
        refuse([("supersedes_hash", "it does not name the policy that it replaces")])


def policy_record(policy: Policy) -> dict[str, Any]:
    """What a POLICY entry of the ledger says of a policy that came into force."""
    return {"sha256": policy.digest, "version": policy.version, "policy_id": policy.policy_id,
            "issued": policy.issued, "expires": policy.expires}  # fmt: skip


def refuse(faults: Iterable[Fault]) -> None:
    """Raises ``PolicyRefusal`` if there are any."""
    found = list(dict.fromkeys(faults))
    if not found:
        return
    refusal = PolicyRefusal("refused by this site's policy", field=found[0][0])
    refusal.faults = tuple(f"{name}: {why}" for name, why in found)
    raise refusal


def _stage_faults(policy: Policy, asked: Asked) -> Iterator[Fault]:
    for stage in asked.runs:
        rule = getattr(policy.stages, stage, StageRule.forbidden)
        if rule is StageRule.forbidden:
            yield f"stages.{stage}", "this stage may not run here"
        elif rule is not StageRule.dp_required and stage in asked.sends:
            yield f"stages.{stage}", "nothing of this stage may leave"
        elif rule is StageRule.dp_required and stage in asked.sends and stage not in asked.noised:
            yield (
                f"stages.{stage}",
                "what leaves must come from noised steps, and the run has no plan for them",
            )
    if asked.private_tuning:
        yield "stages.tuning", "settings may not be tuned on patients"


def _plan_faults(policy: Policy, asked: Asked) -> Iterator[Fault]:
    for plan in asked.plans.values():
        checks = [
            ("unit", plan.unit is Unit.patient, "the plan clips images, not patients"),
            ("sampling", plan.sampling is Sampling.poisson, "the plan does not draw patients independently"),
            ("delta", plan.delta <= policy.delta, "the plan asks a larger delta"),
            ("min_noise_multiplier", plan.noise_multiplier >= policy.min_noise_multiplier,
             "the plan has less noise"),
            ("min_patients", plan.patients >= policy.min_patients, "the plan is for fewer patients"),
            ("max_images_per_unit", plan.max_images_per_patient <= policy.max_images_per_unit,
             "the plan uses more images of a patient"),
        ]  # fmt: skip
        yield from ((name, why) for name, holds, why in checks if not holds)
    if joint_epsilon(asked, policy.delta, policy.discretisation) > policy.max_epsilon_per_run:
        yield "max_epsilon_per_run", "the run asks a larger epsilon"


def joint_epsilon(asked: Asked, delta: float, interval: float) -> float:
    """Of the patients who are charged most: those who train, or those who test, who are others."""
    trained = [plan.event() for plan in asked.plans.values()]
    tested = [] if asked.published is None else [asked.published.event]
    groups = [events for events in (trained, tested) if events]
    return max((epsilon(one, delta, interval=interval) for one in groups), default=0.0)


def _payload_faults(policy: Policy, asked: Asked) -> Iterator[Fault]:
    for payload in asked.outbound:
        rules = [rule for rule in policy.payload.outbound if fnmatchcase(payload.name, rule.name)]
        if not any(payload.dtype == rule.dtype and payload.bytes <= rule.max_bytes for rule in rules):
            yield "payload.outbound", "a tensor that the policy does not list would leave, or a larger one"
        elif any(rule.mechanism == "dp_sgd" for rule in rules) and payload.stage not in asked.plans:
            yield "payload.outbound", "a tensor would leave that no noised step made"
    if set(asked.base_models) - set(policy.payload.base_model_sha256):
        yield "payload.base_model_sha256", "another base model"
    if set(asked.a_matrices) - set(policy.payload.a_matrix_sha256):
        yield "payload.a_matrix_sha256", "another fixed factor"


def _metric_faults(policy: Policy, asked: Asked) -> Iterator[Fault]:
    if not asked.metrics:
        return
    rules, published = policy.metrics, asked.published
    checks = [
        ("metrics.allowed", set(asked.metrics) <= set(rules.allowed), "a number that may not be published"),
        ("metrics.per_site", rules.per_site, "no number may be published of this site alone"),
        ("metrics.epsilon_each", published is not None and published.epsilon_each <= rules.epsilon_each,
         "a number would be published with a larger epsilon, or without noise"),
        ("metrics.min_patients", published is None or published.patients >= rules.min_patients,
         "a number would be of fewer patients"),
    ]  # fmt: skip
    yield from ((name, why) for name, holds, why in checks if not holds)


def _federation_faults(policy: Policy, asked: Asked) -> Iterator[Fault]:
    rules = policy.federation
    if len(asked.sites) < rules.min_sites:
        yield "federation.min_sites", "too few sites take part"
    if set(asked.sites) - set(rules.allowed_sites):
        yield "federation.allowed_sites", "a site takes part that is not listed"
    if rules.require_secure_aggregation and not asked.secure_aggregation:
        yield "federation.require_secure_aggregation", "the run does not hide single updates"
    if asked.rounds > rules.max_rounds:
        yield "federation.max_rounds", "the run asks more rounds"


def _code_faults(policy: Policy, asked: Asked) -> Iterator[Fault]:
    digest, signer = asked.code
    if digest not in policy.code.allowed_fab_sha256:
        yield "code.allowed_fab_sha256", "code that was not approved"
    if policy.code.allowed_signers and signer not in policy.code.allowed_signers:
        yield "code.allowed_signers", "code signed by nobody who is listed"
    if not SpecifierSet(policy.code.guard_version).contains(asked.guard_version, prereleases=True):
        yield "code.guard_version", "another version of the guard is installed"
