"""A made-up site with everything that a verifier looks at: policy, plan, ledger, receipts, checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.canonical import canonical_json, sha256_of
from common.privacy.audits import ADAPTER, ARTEFACT
from common.privacy.bundle import CHECKPOINT
from common.privacy.checkpoint import signed_checkpoint
from common.privacy.entries import Context, EntryType, Payload
from common.privacy.keys import public_key
from common.privacy.ledger import RECEIPTS, Ledger
from common.privacy.plan import PlanSettings, PrivacyPlan
from common.privacy.policy import Policy, policy_from, sign_policy, template
from common.privacy.receipts import ReceiptLine
from common.privacy.terms import policy_record

SITE = "harbour"
PATIENTS = [f"patient-{number}" for number in range(60)]
PLAN = PrivacyPlan.make(PlanSettings(60, 0.1, 4), 2.0)


def policy_for(officer: Ed25519PrivateKey, **changes: object) -> Policy:
    """A policy that lets noised updates of stage adapt leave."""
    plain = template(SITE, "A. Officer", public_key(officer), datetime.now(UTC))
    plain["stages"]["adapt"] = "dp_required"
    plain["payload"]["outbound"] = [{"name": "decoder.*", "max_bytes": 1 << 20, "max_l2": 5.0}]
    plain["payload"]["base_model_sha256"] = ["b" * 64]
    plain["federation"] |= {
        "allowed_sites": [SITE, "hill", "lake"], "max_rounds": 4, "require_secure_aggregation": False,
    }  # fmt: skip
    plain["code"]["allowed_fab_sha256"] = ["c" * 64]
    return policy_from(plain | changes, "the exam's policy")


def make_site(folder: Path, officer: Ed25519PrivateKey, policy: Policy | None = None) -> Ledger:
    """One whole run of `PLAN`, a round a step, committed, audited and checkpointed; `policy_for` it."""
    policy = policy or policy_for(officer)
    ledger = Ledger.create(folder, SITE, policy.caps)
    sign_policy(policy, folder, officer)
    run = Context("run-1", "d" * 64, policy.digest, "c" * 64)
    ledger.record(EntryType.policy, Context(policy_sha256=policy.digest), policy_record(policy))
    ledger.record(EntryType.audit, run, {"kind": "rehearsal", "passed": True})
    ledger.record(EntryType.plan, run, {"plans": {"adapt": PLAN.to_json()}})
    for number in range(PLAN.steps):
        seq = ledger.reserve(run, "adapt", PATIENTS, [PLAN.event(1)])
        digest = sha256_of(f"update {number}".encode())
        receipt = ReceiptLine(SITE, "adapt", number, "adapt.adapter", 1000 + number, digest, "dp_sgd", None)
        with (folder / RECEIPTS).open("a", encoding="utf-8") as file:
            file.write(canonical_json(asdict(receipt)) + "\n")
        ledger.commit(seq, [Payload(receipt.name, digest, receipt.bytes)], [PLAN.event(1)])
    audited = {"kind": ARTEFACT, "artefact": ADAPTER, "lower": 0.0, "upper": PLAN.epsilon()}
    ledger.record(EntryType.audit, run, audited)
    ledger.record(EntryType.checkpoint, Context(), {"officer": public_key(officer)})
    (folder / CHECKPOINT).write_text(signed_checkpoint(SITE, ledger.head, officer))
    return ledger
