"""Assumptions and hazards, each MET, NOT MET or NOT CHECKED, with the evidence.

The order is that of NIST SP 800-226: the promise, what can undermine it, and the trust that both stand on. An
item whose evidence is not in the site's record is NOT CHECKED, however likely it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from common.pages.wording import exact
from common.privacy.entries import EntryType
from common.privacy.membership import Verdict
from common.privacy.plan import Unit
from common.privacy.receipts import NO_MECHANISM
from common.privacy.report.record import SiteRecord

MET, NOT_MET, NOT_CHECKED = "MET", "NOT MET", "NOT CHECKED"
PROMISE, UNDERMINED, TRUST = "The promise", "What can undermine it", "Trust and security"
NEARLY = 1 - 1e-6  # what two machines' arithmetic may differ by
STAYS = ("student", "synthetic", "generator")  # what is trained on real images without noise


@dataclass(frozen=True)
class Hazard:
    level: str
    name: str
    status: str
    evidence: str


def hazards(
    record: SiteRecord, rehearsal: dict[str, Any], artefacts: Sequence[dict[str, Any]]
) -> list[Hazard]:
    """Every item, in order."""
    return [
        *_promise(record),
        *_mechanism(record, rehearsal, artefacts),
        *_beyond_the_record(),
        *_trust(record),
        *_code_and_guard(record),
    ]


def tested(met: bool | None) -> str:
    """None: nobody looked."""
    return NOT_CHECKED if met is None else MET if met else NOT_MET


def _promise(record: SiteRecord) -> Iterator[Hazard]:
    gaps = "; ".join(record.gaps) or "every receipt names a mechanism or public values"
    yield Hazard(PROMISE, "Everything that left is bounded by a mechanism", tested(record.guaranteed), gaps)
    terms = record.terms
    if terms is None:
        yield Hazard(PROMISE, "The unit is the patient", NOT_MET, "no plan of noised steps")
        return
    by_patient = terms.unit is Unit.patient
    images = terms.max_images_per_patient
    unit = f"the plan forms one clipped gradient a {terms.unit}, of at most {images} images"
    yield Hazard(PROMISE, "The unit is the patient", tested(by_patient), unit)
    share = f"delta {exact(terms.delta)} times {terms.patients} declared patients is below 1"
    yield Hazard(
        PROMISE, "Delta is small for this many patients", tested(terms.delta * terms.patients < 1), share
    )
    merges = record.number_of(EntryType.merge)
    people = f"ids were merged {merges} times; nobody can see from the record which ids are one person"
    yield Hazard(PROMISE, "One person has one patient id", NOT_CHECKED, people)
    yield Hazard(
        PROMISE, "No patient is at two sites", NOT_CHECKED, "epsilons of the sites add for one who is"
    )


def _mechanism(
    record: SiteRecord, rehearsal: dict[str, Any], artefacts: Sequence[dict[str, Any]]
) -> Iterator[Hazard]:
    passed, figures = rehearsal["passed"], rehearsal["figures"]
    evidence = "audits/rehearsal.json" if figures else "the ledger's AUDIT entry, without figures"
    if passed is None:
        evidence = "no rehearsal was run"
    elif passed and rehearsal["code_sha256"] not in ("", record.code):
        passed, evidence = None, "a rehearsal passed, of other code than the run's"
    for name in (
        "Noise is drawn as strong as claimed",
        "Patients are drawn independently",
        "Each patient is clipped",
    ):
        yield Hazard(UNDERMINED, name, tested(passed), evidence)
    yield from _recomputed(record)
    yield _attacked(artefacts)


def _attacked(artefacts: Sequence[dict[str, Any]]) -> Hazard:
    """An audit of what nothing is claimed of, or where no coin decided who was used, has checked nothing."""
    judged = [audit for audit in artefacts if audit["verdict"] != Verdict.no_claim]
    claims = {audit["file"]: audit["verdict"] != Verdict.inconsistent for audit in judged}
    name = "No attack found more than is claimed"
    if not claims:
        why = "no audit could contradict a claim" if artefacts else "no artefact audit was run"
        return Hazard(UNDERMINED, name, NOT_CHECKED, why)
    return Hazard(UNDERMINED, name, tested(all(claims.values())), ", ".join(claims))


def _recomputed(record: SiteRecord) -> Iterator[Hazard]:
    """What the verifier computed anew: steps, and epsilon by a second accountant."""
    facts = {} if record.findings is None else record.findings.facts
    runs = [run for run in facts.get("runs", []) if run["run"] == record.run_id]
    steps = [run["planned"] is not None and run["reserved"] <= run["planned"] for run in runs]
    counted = "steps of PLAN, RESERVE and COMMIT" if runs else "the verifier saw no step of this run"
    done = tested(all(steps) if steps else None)
    yield Hazard(UNDERMINED, "No more steps ran than were planned and booked", done, counted)
    pairs = [(figure["rdp"], figure["pld"]) for figure in facts.get("epsilon", {}).values()]
    known = bool(pairs) and all(rdp is not None and pld is not None for rdp, pld in pairs)
    agrees = all(rdp >= pld * NEARLY for rdp, pld in pairs) if known else None
    formulas = "Renyi accounting, from other formulas, is not below" if known else "it was not asked"
    yield Hazard(UNDERMINED, "A second accountant agrees", tested(agrees), formulas)


def _beyond_the_record() -> Iterator[Hazard]:
    """What no file of the site can show."""
    seeded = "rests on the code of the digest below, which lets out no noise that came from a seed"
    floats = "four draws are summed in double precision; nothing here measures it"
    tuned = "a plan made after looking at the data shows no sign of it"
    times = "refusals carry a code and a field; times were not measured"
    yield Hazard(UNDERMINED, "Randomness comes from the system's generator", NOT_CHECKED, seeded)
    yield Hazard(UNDERMINED, "Floating point does not betray the noise", NOT_CHECKED, floats)
    yield Hazard(UNDERMINED, "Settings were not tuned on these patients", NOT_CHECKED, tuned)
    yield Hazard(UNDERMINED, "Times and refusals say nothing of a patient", NOT_CHECKED, times)


def _trust(record: SiteRecord) -> Iterator[Hazard]:
    found = record.findings
    if found is None:
        why = "left out here for its length: run the verify command below" if record.entries else "no ledger"
        yield Hazard(TRUST, "The ledger holds", NOT_CHECKED, why)
    else:
        said = "; ".join(found.faults) or f"chain, signatures and epsilon of {len(record.entries)} entries"
        yield Hazard(TRUST, "The ledger holds", tested(not found.faults), said)
    seen = bool(found is not None and found.facts.get("witnessed"))
    head = (
        "a head that somebody else has seen is in the chain"
        if seen
        else "no witness was given: a cut cannot be told"
    )
    yield Hazard(TRUST, "The ledger was not cut or rolled back", MET if seen else NOT_CHECKED, head)
    yield _signed(record)
    yield Hazard(
        TRUST,
        "Single updates are hidden from the server",
        NOT_MET,
        "secure aggregation was off" + ("; the figures do not need it" if record.guaranteed else ""),
    )


def _signed(record: SiteRecord) -> Hazard:
    name = "A policy signed by the officer allowed the run"
    if record.policy is None:
        return Hazard(TRUST, name, NOT_MET, "no policy: nobody has signed for what was spent")
    if record.inquiry.officer_public is None or record.findings is None:
        return Hazard(
            TRUST, name, NOT_CHECKED, "no officer's key was given, so the signature was not checked"
        )
    wrong = [fault for fault in record.findings.faults if "policy" in fault]
    return Hazard(TRUST, name, tested(not wrong), "; ".join(wrong) or f"version {record.policy.version}")


def _code_and_guard(record: SiteRecord) -> Iterator[Hazard]:
    separate = enforced(record)
    process = (
        "the guard ran as a process of its own" if separate else "policy advisory, not enforced: one process"
    )
    yield Hazard(TRUST, "The guard is a process of its own", tested(separate), process)
    allowed = None if record.policy is None else record.code in record.policy.code.allowed_fab_sha256
    shown = f"code {record.code[:12]}" if record.code else "no code digest is recorded"
    yield Hazard(TRUST, "The code is what the policy allows", tested(allowed), shown)
    left = [r.name for r in record.receipts if r.name.startswith(STAYS) and r.mechanism == NO_MECHANISM]
    kept = "of the run's receipts none names it" if not left else f"left: {', '.join(sorted(set(left)))}"
    yield Hazard(TRUST, "Student and synthetic images stayed here", tested(not left), kept)
    yield Hazard(
        TRUST, "Keys and images are out of others' reach", NOT_CHECKED, "rests on this site's machines"
    )


def enforced(record: SiteRecord) -> bool:
    """Whether the guard booked that it runs as a process of its own, out of reach of the run's code."""
    return any(
        entry.detail.get("own_process") is True for entry in record.own if entry.type is EntryType.plan
    )
