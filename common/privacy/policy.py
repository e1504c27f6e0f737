"""A site's privacy policy: what its officer allows, signed, and denying whatever it does not name.

Written as YAML or JSON, in force only as ``policy.json``: canonical JSON with the officer's Ed25519 signature
beside it in ``policy.json.sig``. The defaults allow nothing: a policy says what it opens up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.canonical import canonical_json, sha256_of
from common.durable import write_atomic
from common.errors import ConfigError, PolicyRefusal
from common.privacy.accounting import Neighbouring
from common.privacy.budget import Caps
from common.privacy.keys import key_id, public_key, sign, signature_holds
from common.schema_check import read_section

POLICY = "policy.json"
SIGNATURE_SUFFIX = ".sig"
# What a private run sends (the decoder, and the factors B of preset dp) and is sent (the fixed A besides).
OUTBOUND = ("decoder.*", "encoder.*.lora_B")
INBOUND = (*OUTBOUND, "encoder.*.lora_A")
WIRE_DTYPES = ("bfloat16", "float32")


class StageRule(StrEnum):
    forbidden = "forbidden"
    local_only = "local_only"  # may run; nothing of it leaves
    public_data_only = "public_data_only"  # may run, on public data
    dp_required = "dp_required"  # what leaves comes from noised steps of a plan


class SyntheticRelease(StrEnum):
    """Of which generators synthetic images may leave, by the release gate (`client.curation.release`)."""

    forbidden = "forbidden"
    dp_required = "dp_required"  # trained on patients by noised steps of a plan
    dp_or_untrained = "dp_or_untrained"  # those, and ones that were never shown a patient's image


class Need(StrEnum):
    required = "required"
    optional = "optional"


class OnlyPatient(StrEnum):
    patient = "patient"


class OnlyPld(StrEnum):
    pld = "pld"


class OnlyPoisson(StrEnum):
    poisson_only = "poisson_only"


class OnlyCsprng(StrEnum):
    csprng_required = "csprng_required"


class OnBreach(StrEnum):
    stop_and_seal = "stop_and_seal"


@dataclass(frozen=True)
class Officer:
    name: str = ""
    key_id: str = ""


@dataclass(frozen=True)
class StageRules:
    """One rule a stage of the run plan, and one for tuning of settings."""

    adapt: StageRule = StageRule.forbidden
    style: StageRule = StageRule.forbidden
    generator: StageRule = StageRule.forbidden
    student: StageRule = StageRule.forbidden
    evaluate: StageRule = StageRule.forbidden
    tuning: StageRule = StageRule.forbidden


@dataclass(frozen=True)
class PayloadRule:
    """Tensors whose name matches ``name`` (``*`` stands for anything) may pass.

    Attributes:
        max_bytes: of one tensor as it is sent.
        max_l2: largest Euclidean norm of one tensor's values; of what leaves, after the noise.
        mechanism: what must have made it; not looked at inbound.
    """

    name: str = ""
    dtype: str = "float32"
    max_bytes: int = 0
    max_l2: float = 0.0
    mechanism: str = "dp_sgd"


@dataclass(frozen=True)
class PayloadRules:
    outbound: list[PayloadRule] = field(default_factory=list)
    inbound: list[PayloadRule] = field(default_factory=list)
    base_model_sha256: list[str] = field(default_factory=list)
    a_matrix_sha256: list[str] = field(default_factory=list)
    max_messages_per_round: int = 1


@dataclass(frozen=True)
class MetricRules:
    """Numbers measured on patients. ``epsilon_each`` is the most that a published number may cost."""

    per_site: bool = False
    min_patients: int = 100
    epsilon_each: float = 0.1
    allowed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FederationRules:
    min_sites: int = 3
    allowed_sites: list[str] = field(default_factory=list)
    require_secure_aggregation: bool = True
    secagg_profile: str = ""
    max_rounds: int = 0
    server_key: str = ""


@dataclass(frozen=True)
class CodeRules:
    allowed_fab_sha256: list[str] = field(default_factory=list)
    allowed_signers: list[str] = field(default_factory=list)
    guard_version: str = ">=0.1"


@dataclass(frozen=True)
class AuditRules:
    rehearsal_max_age_days: int = 30
    artefact_mia: Need = Need.required
    alpha: float = 0.05
    fail_if_lower_exceeds_upper: bool = True


@dataclass(frozen=True)
class SyntheticRules:
    """Synthetic images. ``min_holdout``: patients not trained on, without whom no test of copies counts."""

    release: SyntheticRelease = SyntheticRelease.forbidden
    min_holdout: int = 30


@dataclass(frozen=True)
class Policy:
    """Times are ISO 8601. ``supersedes_hash`` is the digest of the version before, empty for the first."""

    schema: int = 1
    policy_id: str = ""
    version: int = 1
    site_id: str = ""
    issued: str = ""
    expires: str = ""
    officer: Officer = field(default_factory=Officer)
    supersedes_hash: str = ""
    unit: OnlyPatient = OnlyPatient.patient
    unit_key: str = "patient"
    max_images_per_unit: int = 8
    neighbouring: Neighbouring = Neighbouring.add_remove
    delta: float = 1e-5
    max_epsilon_total: float = 0.0
    max_epsilon_per_run: float = 0.0
    max_epsilon_per_year: float = 0.0
    accountant: OnlyPld = OnlyPld.pld
    verify_with: list[str] = field(default_factory=lambda: ["rdp", "prv"])
    discretisation: float = 1e-4
    sampling: OnlyPoisson = OnlyPoisson.poisson_only
    min_noise_multiplier: float = 0.8
    min_patients: int = 40
    public_weight: int = 0
    stages: StageRules = field(default_factory=StageRules)
    payload: PayloadRules = field(default_factory=PayloadRules)
    metrics: MetricRules = field(default_factory=MetricRules)
    synthetic: SyntheticRules = field(default_factory=SyntheticRules)
    federation: FederationRules = field(default_factory=FederationRules)
    code: CodeRules = field(default_factory=CodeRules)
    randomness: OnlyCsprng = OnlyCsprng.csprng_required
    audit: AuditRules = field(default_factory=AuditRules)
    on_breach: OnBreach = OnBreach.stop_and_seal
    retention_days: int = 3650
    legal_note: str = ""

    def text(self) -> str:
        """The one text of this policy, which is signed."""
        return canonical_json(asdict(self))

    @property
    def digest(self) -> str:
        return sha256_of(self.text().encode())

    @property
    def caps(self) -> Caps:
        return Caps(self.delta, self.max_epsilon_total, self.max_epsilon_per_run, self.max_epsilon_per_year)

    def in_force_at(self, now: datetime) -> bool:
        return moment(self.issued) <= now < moment(self.expires)


def read_policy(path: Path) -> Policy:
    """A draft: YAML or JSON. Raises ``ConfigError`` listing every fault, unknown keys among them."""
    try:
        text = path.read_text(encoding="utf-8")
        value = yaml.load(text, Loader=_PolicyLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as a policy: {error}") from error
    return policy_from(value, str(path))


def policy_from(value: Any, what: str) -> Policy:
    """Raises ``ConfigError`` listing every fault."""
    policy, found = read_section(Policy, value)
    assert isinstance(policy, Policy)
    faults = [str(fault) for fault in found] + _faults(policy)
    if faults:
        raise ConfigError(f"{what} is no policy", faults)
    return policy


def sign_policy(policy: Policy, folder: Path, officer_key: Ed25519PrivateKey) -> Path:
    """Write ``policy.json`` and its signature; returns the former's path.

    Raises ``ConfigError`` if the policy names another officer's key.
    """
    own = key_id(public_key(officer_key))
    if policy.officer.key_id != own:
        raise ConfigError(
            f"the policy names officer.key_id {policy.officer.key_id!r}, this key's id is {own}"
        )
    path = folder / POLICY
    write_atomic(path, policy.text().encode())
    signature = canonical_json({"key_id": own, "signature": sign(officer_key, policy.text())})
    write_atomic(signature_path(path), signature.encode())
    return path


def signature_path(path: Path) -> Path:
    return path.with_name(path.name + SIGNATURE_SUFFIX)


def load_signed(path: Path, officer_public: str) -> Policy:
    """The policy in ``path``, if the officer signed exactly this text.

    Raises ``PolicyRefusal``: fields ``signature`` and ``officer`` (another key), or ``policy`` (no policy, an
    unknown key in it, another spelling).
    """
    try:
        text = path.read_text(encoding="utf-8")
        signed = signature_path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyRefusal(f"{path} or its signature cannot be read", field="policy") from error
    check_signature(text, signed, officer_public)
    try:
        policy = policy_from(json.loads(text), path.name)
    except (ValueError, ConfigError) as error:
        raise PolicyRefusal(f"{path} is signed, but no policy of this version: {error}", "policy") from error
    if policy.text() != text or policy.officer.key_id != key_id(officer_public):
        raise PolicyRefusal(f"{path} is not as `wardround privacy policy sign` writes it", field="policy")
    return policy


def check_signature(text: str, signed: str, officer_public: str) -> None:
    """Raises ``PolicyRefusal`` unless ``signed`` is the officer's signature over ``text``."""
    try:
        parsed = json.loads(signed)
        named, signature = parsed["key_id"], parsed["signature"]
        whole = canonical_json({"key_id": named, "signature": signature}) == signed
    except (ValueError, TypeError, KeyError) as error:
        raise PolicyRefusal("the policy's signature file is damaged", field="signature") from error
    if not whole or named != key_id(officer_public):
        raise PolicyRefusal("the policy is signed with a key that this site does not know", field="officer")
    if not signature_holds(officer_public, text, str(signature)):
        raise PolicyRefusal("the policy's signature is not of this text", field="signature")


def template(site: str, officer_name: str, officer_public: str, issued: datetime) -> dict[str, Any]:
    """A policy that is valid and allows no release, to be filled in: plain values for YAML.

    Its payload rules are those of a private run, which no stage may begin until the officer says so.
    """
    days = issued.replace(microsecond=0)
    expires = days.replace(year=days.year + 1, day=min(days.day, 28))
    officer = Officer(officer_name, key_id(officer_public))
    policy = Policy(
        policy_id=f"{site}-privacy", site_id=site, issued=days.isoformat(), expires=expires.isoformat(),
        officer=officer, max_epsilon_total=8.0, max_epsilon_per_run=4.0, max_epsilon_per_year=6.0,
    )  # fmt: skip
    plain: dict[str, Any] = json.loads(policy.text())
    plain["payload"] |= {"outbound": _rules(OUTBOUND, 100.0), "inbound": _rules(INBOUND, 1000.0)}
    return plain


def _rules(names: Sequence[str], max_l2: float) -> list[dict[str, Any]]:
    """One rule a name and dtype of the wire, room for a tensor of a million numbers."""
    rules = [PayloadRule(name, dtype, 4 << 20, max_l2) for name in names for dtype in WIRE_DTYPES]
    return [asdict(rule) for rule in rules]


def _faults(policy: Policy) -> list[str]:
    caps = (policy.max_epsilon_total, policy.max_epsilon_per_run, policy.max_epsilon_per_year)
    checks = [
        (policy.schema == 1, "schema: this version reads schema 1"),
        (bool(re.fullmatch(r"[A-Za-z0-9_.\-]{1,200}", policy.policy_id)), "policy_id: give it a name"),
        (policy.version >= 1, "version: counts from 1"),
        (bool(policy.site_id), "site_id: name the site"),
        (bool(re.fullmatch(r"[0-9a-f]{16}", policy.officer.key_id)), "officer.key_id: 16 hex digits"),
        (bool(re.fullmatch(r"[0-9a-f]{64}|", policy.supersedes_hash)), "supersedes_hash: 64 hex digits"),
        (0 < policy.delta < 1, "delta: above 0, below 1"),
        (all(cap >= 0 for cap in caps), "max_epsilon_*: at least 0"),
        (policy.min_noise_multiplier > 0, "min_noise_multiplier: above 0"),
        (policy.synthetic.min_holdout >= 1, "synthetic.min_holdout: at least 1"),
        (0 < policy.discretisation <= 1e-3, "discretisation: above 0, at most 1e-3"),
    ]  # fmt: skip
    found = [text for holds, text in checks if not holds]
    for side in ("outbound", "inbound"):
        for index, rule in enumerate(getattr(policy.payload, side)):
            if not (rule.max_bytes > 0 and rule.max_l2 > 0):
                found.append(
                    f"payload.{side}[{index}]: max_bytes and max_l2 above 0, or nothing passes by it"
                )
    try:
        if moment(policy.issued) >= moment(policy.expires):
            found.append("expires: must be later than issued")
    except ValueError:
        found.append("issued, expires: write them as 2026-01-31T00:00:00+00:00")
    return found


def moment(text: str) -> datetime:
    """An ISO 8601 time; without a zone it is UTC. Raises ``ValueError``."""
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


class _PolicyLoader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """Times stay text, and 1e-5 is a number."""


_PolicyLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PolicyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
