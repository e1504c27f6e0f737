"""A made-up site with every kind of evidence, for the tests of the officer's statement and page."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from scipy.stats import norm

from common.canonical import canonical_json, sha256_of
from common.privacy.budget import Caps
from common.privacy.entries import Context, EntryType, Payload
from common.privacy.heads import SignedHead
from common.privacy.ledger import RECEIPTS, Ledger
from common.privacy.plan import PlanSettings, PrivacyPlan
from common.privacy.policy import read_policy
from common.privacy.receipts import ReceiptLine
from common.privacy.witness import write_heads
from simulations.privacy_exam.site import make_site

RUN_PLAN = {
    "run_id": "run-1", "sites": ["harbour", "hill", "lake"], "stages": ["propose", "adapt", "student"],
    "models": {"ward-sam-tiny": "b" * 64}, "code_sha256": "c" * 64,
}  # fmt: skip
DRAWS, STEPS, PATIENTS, RATE = 20_000, 400, 60, 0.1


def audited_site(folder: Path, officer: Ed25519PrivateKey) -> None:
    """A private run under a policy, rehearsed, its adapter attacked, and heads of two other sites kept."""
    make_site(folder, officer)
    audits = folder / "audits"
    audits.mkdir()
    (audits / "rehearsal.json").write_text(json.dumps(rehearsal_file()))
    artefact = json.dumps(artefact_file())
    (audits / "artefact-adapter.json").write_text(artefact)
    ledger = Ledger.open(folder, read_policy(folder / "policy.json").caps)
    detail = {"kind": "artefact", "lower": 0.134, "upper": 1.2, "ceiling": 3.49}
    detail["sha256"] = sha256_of(artefact.encode())
    ledger.record(EntryType.audit, Context(run_id="run-1", plan_sha256="d" * 64), detail)
    signer = Ed25519PrivateKey.generate()
    heads = [SignedHead.sign(site, (7, sha256_of(site.encode())), signer) for site in ("hill", "lake")]
    write_heads(folder / "witnessed.jsonl", heads)
    (folder / "plan.json").write_text(json.dumps(RUN_PLAN))


def bare_site(folder: Path) -> None:
    """A site after a run without noise: its plan and its receipts, and no ledger."""
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps({**RUN_PLAN, "run_id": "run-b"}))
    for number, name in enumerate(("answer", "adapt.adapter", "adapt.numbers", "metrics")):
        digest = sha256_of(name.encode())
        _receive(folder, ReceiptLine("quay", "adapt", 0, name, 100 + number, digest, "none"))


def two_runs(folder: Path) -> None:
    """Two private runs of a site without a policy: two steps, then one with more noise for some patients."""
    ledger = Ledger.create(folder, "pier", Caps(1e-5))
    for run, noise, steps, patients in (("run-1", 1.5, 2, 12), ("run-2", 3.0, 1, 8)):
        plan = PrivacyPlan.make(PlanSettings(12, 1.0, steps), noise)
        context = Context(run, sha256_of(run.encode()))
        ledger.record(EntryType.plan, context, {"plans": {"adapt": plan.to_json()}})
        for number in range(steps):
            members = [f"patient-{index}" for index in range(patients)]
            seq = ledger.reserve(context, "adapt", members, [plan.event(1)])
            digest = sha256_of(f"{run} {number}".encode())
            name = "adapt.adapter"
            _receive(folder, ReceiptLine("pier", "adapt", number, name, 900, digest, "dp_sgd", 1.25))
            ledger.commit(seq, [Payload(name, digest, 900)], [plan.event(1)])
    ledger.record(EntryType.checkpoint, context, {})


def _receive(folder: Path, receipt: ReceiptLine) -> None:
    with (folder / RECEIPTS).open("a", encoding="utf-8") as file:
        file.write(canonical_json(asdict(receipt)) + "\n")


def rehearsal_file() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    noise = rng.standard_normal(DRAWS)
    shares = np.arange(1, 100) / 100
    found = np.quantile(noise, shares)
    sizes, counts = np.unique(rng.binomial(PATIENTS, RATE, STEPS), return_counts=True)
    return {
        "schema": 1, "kind": "rehearsal", "passed": True, "code_sha256": "c" * 64,
        "noise": {
            "count": DRAWS, "std": float(noise.std()), "std_allowed": 0.01645, "ks_p": 0.41237,
            "neighbours": 0.001, "steps": -0.002, "correlation_allowed": 0.02, "repeats": 0,
            "quantiles": [[float(norm.ppf(p)), float(q)] for p, q in zip(shares, found, strict=True)],
        },
        "sampler": {
            "asked_rate": RATE, "rate": 0.10021, "patients": PATIENTS, "steps": STEPS, "counts_p": 0.4133,
            "variance_p": 0.7021, "empty": 1,
            "sizes": {str(size): int(count) for size, count in zip(sizes, counts, strict=True)},
        },
        "clip": {"outlier": 1.0, "many_images": 0.999999, "ordinary": 0.5},
        "canaries": {"canaries": 2000, "guesses": 400, "right": 310, "lower": 0.6, "ceiling": 5, "upper": 1},
        "worst_case": {"trainings": 128, "lower": 0.32, "ceiling": 3.53, "upper": 1.2},
    }  # fmt: skip


def artefact_file() -> dict[str, Any]:
    return {
        "schema": 1, "kind": "artefact", "artefact": "adapter", "artefact_sha256": "a" * 64,
        "attack": "calibrated loss", "unit": "patient", "assignment": "coin", "members": 52, "others": 48,
        "auc": {"value": 0.58123, "low": 0.4612, "high": 0.6931},
        "tpr": [
            {"fpr": 0.01, "value": None, "low": None, "high": None, "limit": 0.0377, "measurable": False},
            {"fpr": 0.1, "value": 0.18, "low": 0.0912, "high": 0.3122, "limit": 0.2301, "measurable": True},
        ],
        "roc": [[0.0, 0.0], [0.04, 0.08], [0.1, 0.18], [0.5, 0.6], [1.0, 1.0]],
        "right": 62, "guesses": 100, "lower": 0.134, "ceiling": 3.49, "upper": 1.2, "verdict": "CONSISTENT",
        "not_run": ["LiRA", "malicious server", "gradient inversion"],
    }  # fmt: skip
