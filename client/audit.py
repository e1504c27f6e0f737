"""A site audits itself after a run: its build, and whether what it made tells who was in it.

Nothing leaves: findings go into ``audits/`` in the site's folder and, by digest and bounds, into its ledger.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.account import STAGE, privacy_plan
from client.dp.dress_rehearsal import Rehearsal, rehearse
from client.membership import STUDENT_FILE, Subjects, audit_adapter, audit_student, subjects_of
from client.site import Site
from common.errors import ArtefactError, DataError
from common.plan import RunPlan
from common.privacy.audits import ARTEFACT, REHEARSAL, save_audit
from common.privacy.entries import Context, Entry, EntryType
from common.privacy.journal import LEDGER, read_lines
from common.privacy.ledger_commands import open_ledger
from common.privacy.membership import Assignment, Claim, Membership, Verdict, claim_of
from common.privacy.policy import POLICY, AuditRules, read_policy

ADAPTER_FILE, ADAPTER_CARD = "teacher/adapter.safetensors", "teacher/card.json"  # below a run's folder


@dataclass(frozen=True)
class Audit:
    """What was found at a site after its last run.

    Attributes:
        plan: of the run.
        rehearsal: of the mechanism; None: the run has no noise.
        artefacts: that were attacked.
        missing: what was not there to be attacked, in words.
    """

    plan: RunPlan
    rehearsal: Rehearsal | None
    artefacts: list[Membership]
    missing: list[str]

    @property
    def contradictions(self) -> list[str]:
        """What cannot be true at once; empty if nothing was found, which proves nothing."""
        failed = self.rehearsal is not None and not self.rehearsal.passed
        found = ["the rehearsal failed: this build does not do what its plan says"] if failed else []
        wrong = [one for one in self.artefacts if one.verdict is Verdict.inconsistent]
        return found + [
            f"{one.artefact}: epsilon is at least {one.bound.lower:.2f}, and {one.claim.upper} is claimed"
            for one in wrong
        ]


def audit_site(site: Site, run: Path | None = None) -> Audit:
    """Rehearse thoroughly if the last run has noise, and attack what it left.

    Args:
        run: its folder, for the teacher's adapter; None: two above the site's, if that is one.

    Raises:
        ArtefactError: the site took part in no run, or what is there is of another.
        DataError: its patients cannot be read, all of them were trained on, or coins do not fit the run.
    """
    plan, rules = last_plan(site), AuditRules()
    if (site.folder / POLICY).exists():
        rules = read_policy(site.folder / POLICY).audit
    subjects, entries = subjects_of(site, plan), _entries(site)
    _check_coins(subjects, [entry for entry in entries if entry.run_id == plan.run_id])
    artefacts: list[Membership] = []
    missing = ["the rounds before the last: a run keeps its last teacher alone"]
    folder = run or site.folder.resolve().parent.parent
    if run is not None or (folder / ADAPTER_FILE).exists():
        _check_run(folder, plan)
        claim = claim_of_run(plan, entries)
        artefacts.append(audit_adapter(folder / ADAPTER_FILE, plan, subjects, claim, rules.alpha))
    else:
        missing.append("the teacher's adapter: name the run's folder with --run")
    if (site.folder / STUDENT_FILE).exists():
        artefacts.append(audit_student(site, plan, subjects, rules.alpha))
    else:
        missing.append("the student: the run did not come so far")
    rehearsal = None
    if plan.privacy.asked and site.declared is not None:
        rehearsal = rehearse(privacy_plan(plan.privacy, site.declared), thorough=True)
    return Audit(plan, rehearsal, artefacts, missing)


def claim_of_run(plan: RunPlan, entries: Sequence[Entry]) -> Claim:
    """What the site's ledger claims of the teacher that ``plan``'s run left.

    Nothing, where something left without noise, in this run or before.
    """
    if not plan.privacy.asked or any(entry.type is EntryType.export for entry in entries):
        return Claim(None, plan.privacy.delta)
    booked = (entry for entry in entries if entry.run_id == plan.run_id and entry.type is EntryType.reserve)
    own = [entry for entry in booked if entry.stage == STAGE]
    return claim_of([event for entry in own for event in entry.listed()], plan.privacy.delta)


def keep(site: Site, audit: Audit) -> bool:
    """Write ``audits/`` and book each finding; whether there is a ledger to book it in.

    Raises:
        LedgerBroken: the ledger does not hold.
        DiskFault: a file cannot be written.
    """
    details: list[dict[str, Any]] = []
    if audit.rehearsal is not None:
        found = audit.rehearsal
        detail = {"kind": REHEARSAL, "passed": found.passed, "code_sha256": found.code_sha256}
        details.append({**detail, **save_audit(site.folder, REHEARSAL, found.to_json())})
    for one in audit.artefacts:
        detail = {
            "kind": ARTEFACT, "artefact": one.artefact, "artefact_sha256": one.artefact_sha256,
            "lower": one.bound.lower, "upper": one.claim.upper, "ceiling": one.bound.ceiling,
            "verdict": str(one.verdict),
        }  # fmt: skip
        details.append({**detail, **save_audit(site.folder, f"{ARTEFACT}-{one.artefact}", one.to_json())})
    if not (site.folder / LEDGER).exists():
        return False
    ledger = open_ledger(site.folder)
    policies = [entry.detail["sha256"] for entry in ledger.entries if entry.type is EntryType.policy]
    plan = audit.plan
    context = Context(plan.run_id, plan.digest, policies[-1] if policies else "", plan.code_sha256)
    for detail in details:
        ledger.record(EntryType.audit, context, detail)
    return True


def last_plan(site: Site) -> RunPlan:
    """The plan that the site agreed to last. Raises ``ArtefactError`` if there is none."""
    path = site.folder / "plan.json"
    if not path.exists():
        raise ArtefactError(f"{path} is missing: this site took part in no run, so there is nothing to audit")
    return RunPlan.from_json(path.read_text(encoding="utf-8"))


def _check_run(folder: Path, plan: RunPlan) -> None:
    """The teacher in ``folder`` is that of the run of ``plan``. Raises ``ArtefactError``."""
    try:
        card = json.loads((folder / ADAPTER_CARD).read_text(encoding="utf-8"))
        of = str(card["run_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(
            f"{folder} holds no finished teacher: name the run's folder with --run"
        ) from error
    if of != plan.run_id:
        raise ArtefactError(f"{folder} is of run {of}, and the site took part in {plan.run_id} last")


def _check_coins(subjects: Subjects, own: Sequence[Entry]) -> None:
    """Whom the coins put in are as many as the run's reservations are about. Raises ``DataError``."""
    booked = {sum(entry.cohort.classes.values()) for entry in own if entry.type is EntryType.reserve}
    if subjects.assignment is Assignment.by_coin and booked and booked != {sum(subjects.inside)}:
        raise DataError(
            "the run was of other patients than the coins put in: audit a run that was made with holdout: "
            "coin from its beginning, and with the same manifest"
        )


def _entries(site: Site) -> list[Entry]:
    path = site.folder / LEDGER
    return read_lines(path.read_bytes()) if path.exists() else []
