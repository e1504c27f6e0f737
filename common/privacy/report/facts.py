"""``privacy.json``: one document with every number of the officer's page. The page is made from it alone."""

from __future__ import annotations

import json
import platform
from collections import Counter
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common.canonical import sha256_of
from common.errors import ArtefactError
from common.privacy.entries import EntryType
from common.privacy.journal import head_of
from common.privacy.keys import key_id
from common.privacy.policy import Policy
from common.privacy.report import figures, plots
from common.privacy.report.audits import artefacts, rehearsal
from common.privacy.report.hazards import MET, NOT_CHECKED, NOT_MET, enforced, hazards
from common.privacy.report.legal import assessment, edpb_index
from common.privacy.report.outgoing import outgoing
from common.privacy.report.protection import NOT_COVERED, federation, protection
from common.privacy.report.record import SiteRecord
from common.privacy.report.registry import registry_entry
from common.privacy.report.rounding import spelled
from common.privacy.report.statement import ADVISORY, DISCLAIMER, HOLDS, sentences, verdict

SCHEMA = 1
DEFAULT_DELTA = 1e-5
SECOND_DELTA = 1e-3
PACKAGES = ("wardround", "dp-accounting", "cryptography")
Document = dict[str, Any]


def document_of(record: SiteRecord) -> Document:
    """Everything that the statement, the page and the registry entry say of ``record``.

    Guarantees: bounds are rounded up and never down; equal records give equal documents on one installation.

    Raises:
        ArtefactError: an audit's file is damaged.
    """
    document = _about(record)
    document["rehearsal"] = rehearsal(record)
    document["artefacts"] = artefacts(record)
    document |= _accounted(record) if record.guaranteed else _unaccounted(record)
    first = document["budget"]["epsilons"][0]
    document["protection"] = protection(first["run"], first["total"], document["federation"]["count"])
    found = [asdict(item) for item in hazards(record, document["rehearsal"], document["artefacts"])]
    document["hazards"] = found
    counts = Counter(item["status"] for item in found)
    document["hazard_counts"] = {status: counts[status] for status in (MET, NOT_MET, NOT_CHECKED)}
    document["verdict"] = verdict(document)
    document["statement"] = sentences(document)
    document["dpia"] = assessment(document)
    document["edpb"] = edpb_index(document)
    document["registry"] = registry_entry(document)
    document["plots"] = plots.plots_of(document)
    result: Document = spelled(document)
    return result


def to_json(document: Document) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(path: Path) -> Document:
    """Raises ``ArtefactError`` if ``path`` holds no document of this version."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["schema"] != SCHEMA:
            raise ValueError(f"schema {value['schema']!r}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtefactError(f"{path} is no privacy.json of this version: make the page again") from error
    document: Document = value
    return document


def _about(record: SiteRecord) -> Document:
    """What needs no accounting."""
    return {
        "schema": SCHEMA,
        "site": record.site,
        "run": _run(record),
        "guarantee": record.guaranteed,
        "gaps": record.gaps,
        "disclaimer": DISCLAIMER,
        "enforcement": ADVISORY,
        "not_covered": list(NOT_COVERED),
        "policy": _policy(record),
        "verification": _verification(record),
        "egress": outgoing(record),
        "federation": federation(record),
        "reproducibility": _reproducibility(record),
        "settings": _settings(record),
    }


def _run(record: SiteRecord) -> Document:
    times = [entry.ts for entry in record.own]
    return {
        "id": record.run_id,
        "started": times[0] if times else "",
        "finished": times[-1] if times else "",
        "private": record.terms is not None,
        "enforced": enforced(record),
        "stages": [] if record.plan is None else record.plan.stages,
    }


def _policy(record: SiteRecord) -> Document | None:
    policy = record.policy
    if policy is None:
        return None
    return {
        "policy_id": policy.policy_id,
        "version": policy.version,
        "sha256": policy.digest,
        "officer": policy.officer.name,
        "key_id": policy.officer.key_id,
        "issued": policy.issued,
        "expires": policy.expires,
        "delta": policy.delta,
        "max_epsilon_total": policy.max_epsilon_total,
        "max_epsilon_per_run": policy.max_epsilon_per_run,
        "max_epsilon_per_year": policy.max_epsilon_per_year,
        "signature": _signature(record, policy),
    }


def _signature(record: SiteRecord, policy: Policy) -> str:
    officer = record.inquiry.officer_public
    if officer is None or record.findings is None:
        return NOT_CHECKED
    wrong = key_id(officer) != policy.officer.key_id or any("policy" in f for f in record.findings.faults)
    return "DOES NOT HOLD" if wrong else HOLDS


def _verification(record: SiteRecord) -> Document:
    options = "" if record.inquiry.officer_public is None else " --officer-key OFFICER_KEY"
    options += "".join(f" --ledger-head {head}" for head in record.inquiry.heads)
    options += " --witness WITNESS_FILE" if record.inquiry.witnesses else ""
    found = record.findings
    return {
        "command": f"wardround privacy verify --bundle SITE_FOLDER{options}",
        "holds": None if found is None else found.holds,
        "entries": len(record.entries),
        "merges": record.number_of(EntryType.merge),
        "faults": [] if found is None else found.faults,
        "owed": [] if found is None else found.owed,
        "cautions": [] if found is None else found.cautions,
        "facts": None if found is None else found.facts,
    }


def _reproducibility(record: SiteRecord) -> Document:
    head = head_of(list(record.entries))
    plan = record.own[0].plan_sha256 if record.own else ""
    if record.plan is not None:
        plan = plan or record.plan.digest
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "code_sha256": record.code,
        "plan_sha256": plan,
        "policy_sha256": "" if record.policy is None else record.policy.digest,
        "base_models": {} if record.plan is None else record.plan.models,
        "ledger_head": head.hash,
        "ledger_head_seq": head.seq,
        "audits": {name: sha256_of(data) for name, data in record.audits.items()},
    }


def _settings(record: SiteRecord) -> Document:
    terms = record.terms
    if terms is None:
        return {"patients": None, "sampling": None, "max_images_per_patient": None}
    return {
        "patients": terms.patients,
        "sampling": {"poisson": "Poisson"}.get(str(terms.sampling), str(terms.sampling)),
        "max_images_per_patient": terms.max_images_per_patient,
        "unit": str(terms.unit),
        "stage": terms.stage,
        "noise_multiplier": terms.noise_multiplier,
        "sample_rate": terms.sample_rate,
        "steps": terms.steps,
        "max_grad_norm": terms.max_grad_norm,
        "delta": terms.delta,
        "noise_per_coordinate": round(terms.noise_per_coordinate, 6),
    }


def _accounted(record: SiteRecord) -> Document:
    """Budget, meaning and what-ifs of a run with a guarantee."""
    assert record.terms is not None
    plan = record.terms
    delta = plan.delta if record.policy is None else record.policy.delta  # that of the caps
    spent = figures.spending(record, delta)
    tenth = float(f"{0.1 / plan.patients:.3g}")
    deltas = list(dict.fromkeys([delta, SECOND_DELTA, DEFAULT_DELTA, tenth]))
    epsilons = figures.epsilons(spent, deltas)
    used = figures.histogram(spent, delta)
    return {
        "band": figures.worded(epsilons[0]["total"]),
        "budget": {
            "delta": delta,
            "epsilons": epsilons,
            "stages": figures.stages(record, spent, delta),
            "by_step": figures.by_step(record, spent, delta),
            "classes": used,
            "most_used_patients": used[-1]["patients"] if used else 0,
        },
        "meaning": {
            "odds": figures.odds(spent.run, delta),
            "odds_total": figures.odds(spent.total, delta) if spent.total != spent.run else None,
            "roc": figures.roc(spent.run, delta),
        },
        "what_ifs": figures.what_ifs(spent.run, plan.max_images_per_patient, deltas) if spent.run else [],
    }


def _unaccounted(record: SiteRecord) -> Document:
    """The same places, without a number where there is no guarantee."""
    deltas = [DEFAULT_DELTA, SECOND_DELTA]
    return {
        "band": figures.worded(None),
        "budget": {
            "delta": deltas[0],
            "epsilons": [{"delta": delta, "run": None, "total": None} for delta in deltas],
            "stages": [
                {"stage": stage, "alone": None, "joint": None, "added": None}
                for stage in _run(record)["stages"]
            ],
            "by_step": None,
            "classes": [],
            "most_used_patients": 0,
        },
        "meaning": {"odds": None, "odds_total": None, "roc": None},
        "what_ifs": [],
    }
