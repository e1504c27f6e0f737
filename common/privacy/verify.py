"""Does a site's record hold? Everything is recomputed from its files, offline and without torch.

Chain, signatures and head; the heads that others witnessed; the policy's signature and whether it was in
force at each entry; epsilon of every entry, again by PLD with RDP above it; steps against the plan; what left
against the receipts; audits that the policy requires. The answer depends on the files alone: equal input
gives an equal answer, byte for byte.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.errors import ArtefactError, PolicyRefusal, VerificationFailed
from common.privacy.accounting import epsilon, rdp_epsilon
from common.privacy.audits import owed_audits
from common.privacy.budget import Histories, booked_epsilon, settled, spent_epsilon
from common.privacy.bundle import CHECKPOINT
from common.privacy.checkpoint import read_checkpoint
from common.privacy.entries import Entry, EntryType, LedgerBroken, chain_faults
from common.privacy.events import Event
from common.privacy.heads import SignedHead
from common.privacy.journal import HEAD, LEDGER, check_head, head_of, read_head, read_lines
from common.privacy.ledger import RECEIPTS, covers
from common.privacy.plan import PrivacyPlan
from common.privacy.policy import (
    POLICY,
    SIGNATURE_SUFFIX,
    Policy,
    StageRule,
    SyntheticRelease,
    check_signature,
    moment,
    policy_from,
)
from common.privacy.published import PublishedMetrics
from common.privacy.receipts import SYNTHETIC, read_receipts, receipt_faults
from common.privacy.witness import ROLLED_BACK, chain_keys, heads_of, witness_faults
from common.strict_json import parse_strictly

TOLERANCE = 1e-6  # relative: what two machines' arithmetic may differ by


@dataclass(frozen=True)
class Evidence:
    """What the verifier is given besides the site's files.

    Attributes:
        witnessed: hashes of heads that somebody has seen.
        heads: signed ones, of whatever ledgers (`common.privacy.witness.read_heads`).
    """

    officer_public: str | None = None
    witnessed: Sequence[str] = ()
    heads: Sequence[SignedHead] = ()


@dataclass
class Findings:
    """``faults`` say that the record does not hold, ``cautions`` what it cannot show.

    ``owed``: what the policy requires and the record has not yet; it holds when that is there.
    """

    faults: list[str] = field(default_factory=list)
    owed: list[str] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        return not self.faults and not self.owed

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "holds": self.holds,
            "faults": self.faults,
            "owed": self.owed,
            "cautions": self.cautions,
            **self.facts,
        }


def verify(files: Mapping[str, bytes], evidence: Evidence) -> Findings:
    """Check a site's ``files`` (name -> content, see `common.privacy.bundle`)."""
    found = Findings()
    entries = _chain(files, found)
    if not entries:
        return found
    policy = _policy(files, evidence, found)
    checks: tuple[Callable[[], None], ...] = (
        lambda: _witnesses(entries, files, evidence, found),
        lambda: _policy_over_time(entries, policy, found),
        lambda: _budget(entries, policy, found),
        lambda: _steps(entries, found),
        lambda: _published(entries, found),
        lambda: _payloads(entries, files, policy, found),
        lambda: _audits(entries, policy, found),
    )
    for check in checks:
        try:
            check()
        except (VerificationFailed, ArtefactError, KeyError, TypeError, ValueError) as error:
            found.faults.append(str(error) or f"an entry is malformed ({type(error).__name__})")
    return found


def _chain(files: Mapping[str, bytes], found: Findings) -> list[Entry]:
    if LEDGER not in files:
        found.faults.append(f"{LEDGER} is missing")
        return []
    try:
        entries = read_lines(files[LEDGER])
        found.faults += chain_faults(entries)
        if not entries:
            found.faults.append("the ledger is empty")
        check_head(entries, read_head(files[HEAD]) if HEAD in files else None)
    except LedgerBroken as broken:
        found.faults += [broken.message, *broken.faults]
    if found.faults:
        return []
    last = head_of(entries)
    found.facts |= {"site": entries[0].detail.get("site"), "entries": len(entries), "head": vars(last)}
    return entries


def _policy(files: Mapping[str, bytes], evidence: Evidence, found: Findings) -> Policy | None:
    if POLICY not in files:
        found.cautions.append("no policy was given: what was allowed is not checked")
        return None
    try:
        text = files[POLICY].decode("utf-8")
        if evidence.officer_public is None:
            found.cautions.append("no officer's key was given: the policy's signature is not checked")
        else:
            signed = files.get(POLICY + SIGNATURE_SUFFIX, b"").decode("utf-8")
            check_signature(text, signed, evidence.officer_public)
        policy = policy_from(parse_strictly(text, "policy"), POLICY)
        if policy.text() != text:
            raise PolicyRefusal(f"{POLICY} is not in its canonical spelling", field="policy")
    except Exception as error:  # whatever a changed byte leads to, it is one and the same finding
        found.faults.append(f"the policy does not hold: {error}")
        return None
    found.facts["policy"] = {"id": policy.policy_id, "version": policy.version, "sha256": policy.digest}
    return policy


def _witnesses(
    entries: Sequence[Entry], files: Mapping[str, bytes], evidence: Evidence, found: Findings
) -> None:
    seen = {entry.hash for entry in entries}
    heads = list(evidence.witnessed)
    if CHECKPOINT in files and evidence.officer_public is not None:
        heads.append(read_checkpoint(files[CHECKPOINT].decode("utf-8"), evidence.officer_public).hash)
    own = heads_of(str(entries[0].detail.get("site")), chain_keys(entries), evidence.heads)
    faults = dict.fromkeys(witness_faults(entries, own))
    if any(head not in seen for head in heads):
        faults[ROLLED_BACK] = None
    found.faults += faults
    if not heads and not own:
        found.cautions.append("unwitnessed: without a head that others have seen, a cut cannot be told")
    if evidence.heads and not own:
        found.cautions.append("the witness names no head of this ledger")
    found.facts["witnessed"] = bool(heads or own)
    if own:
        found.facts["witnessed_seq"] = max(head.seq for head in own)


def _policy_over_time(entries: Sequence[Entry], policy: Policy | None, found: Findings) -> None:
    """Each spending entry names the policy that was last put in force, and is within its dates.

    A site that never had a policy spends under none: nobody has signed for it, and that is said.
    """
    current: dict[str, Any] | None = None
    bare = policy is None and all(entry.type is not EntryType.policy for entry in entries)
    if bare and any(entry.spent() and not entry.policy_sha256 for entry in entries):
        found.cautions.append("no policy was in force: what was spent, nobody signed for")
    for entry in entries:
        if entry.type is EntryType.policy:
            current = entry.detail
        elif entry.spent() and entry.type is not EntryType.export:
            if bare and not entry.policy_sha256:
                continue
            if current is None or entry.policy_sha256 != current["sha256"]:
                found.faults.append(f"entry {entry.seq}: spends under a policy that was not in force")
            elif not moment(current["issued"]) <= entry.time < moment(current["expires"]):
                found.faults.append(f"entry {entry.seq}: spends outside the policy's dates")
    if policy is not None and current is not None and current["sha256"] != policy.digest:
        found.faults.append("the ledger's last policy is another than the one given")
    if policy is not None and current is None:
        found.cautions.append("the ledger names no policy")


def _budget(entries: Sequence[Entry], policy: Policy | None, found: Findings) -> None:
    histories = Histories()
    for entry in entries:
        histories.apply(entry)
        for delta, recorded in entry.epsilon_after.items():
            if not _agrees(recorded, booked_epsilon(histories.most(float(delta)))):
                found.faults.append(
                    f"entry {entry.seq}: its epsilon at {delta} is not what its history gives"
                )
        if policy is not None and entry.spent() and entry.type is not EntryType.export:
            passed = histories.over(policy.caps, entry.cohort.classes, entry.run_id, entry.time)
            if passed is not None and entry.policy_sha256 == policy.digest:
                found.faults.append(f"entry {entry.seq}: passes {passed}")
    target = policy.delta if policy is not None else 1e-5
    deltas = sorted({1e-3, target})
    found.facts["epsilon"] = {
        f"{delta:g}": _figures(histories.most_used(delta), delta, found) for delta in deltas
    }
    found.facts["classes"] = sorted(
        [group.patients, booked_epsilon(spent_epsilon(events, target))]
        for group, events in ((g, histories.events(n)) for n, g in histories.classes.items())
        if group.patients
    )


def _figures(events: tuple[Event, ...], delta: float, found: Findings) -> dict[str, float | None]:
    """PLD on its fine grid, and RDP where it is known, which must not be below."""
    if not events:
        return {"pld": 0.0, "rdp": 0.0}
    pld, rdp = epsilon(events, delta), rdp_epsilon(events, delta)
    if math.isinf(pld):
        found.cautions.append(f"NO GUARANTEE at delta {delta:g}: something left without noise")
        return {"pld": None, "rdp": None}
    if rdp is not None and rdp < pld * (1 - TOLERANCE):
        found.faults.append(f"RDP is below PLD at delta {delta:g}: one of the accountants is wrong")
    return {"pld": round(pld, 6), "rdp": None if rdp is None else round(rdp, 6)}


_Stage = tuple[str, str]  # run, stage


def _steps(entries: Sequence[Entry], found: Findings) -> None:
    """Steps that ran (COMMIT), that were reserved (RESERVE) and that were planned (PLAN), for each stage."""
    plans: dict[_Stage, PrivacyPlan] = {}
    digests: dict[str, str] = {}
    reserved: dict[_Stage, list[Event]] = {}
    executed: Counter[_Stage] = Counter()
    for entry in entries:
        key = (entry.run_id, entry.stage)
        if entry.type is EntryType.plan:
            digests[entry.run_id] = entry.plan_sha256
            for stage, plan in entry.detail["plans"].items():
                plans[entry.run_id, stage] = PrivacyPlan.from_json(plan)
        elif entry.type is EntryType.reserve:
            reserved.setdefault(key, []).extend(entry.listed())
            if key not in plans:
                found.faults.append(f"entry {entry.seq}: reserves for a stage that no plan names")
            elif entry.plan_sha256 != digests[entry.run_id]:
                found.faults.append(f"entry {entry.seq}: reserves under another plan than its run's")
        elif entry.type is EntryType.commit:
            executed[key] += sum(event.count for event in entry.listed())
            if not covers(entries[int(entry.detail["settles"])].listed(), entry.listed()):
                found.faults.append(f"entry {entry.seq}: more steps ran than were reserved")
    found.facts["runs"] = [
        _run(key, plans.get(key), events, executed[key], found) for key, events in sorted(reserved.items())
    ]
    closed = settled(entries)
    left = [e.seq for e in entries if e.type is EntryType.reserve and e.seq not in closed]
    if left:
        found.cautions.append(f"{len(left)} reservations were never closed; they are counted as spent")


def _run(
    key: _Stage, plan: PrivacyPlan | None, reserved: Sequence[Event], ran: int, found: Findings
) -> dict[str, Any]:
    name = f"run {key[0]}, stage {key[1]}"
    planned = None if plan is None else plan.steps
    if plan is not None and not covers([plan.event()], reserved):
        found.faults.append(f"{name}: more was reserved than its plan has")
    if ran != planned:
        found.cautions.append(f"{name}: {ran} of {planned} steps are committed")
    booked = sum(event.count for event in reserved)
    return {"run": key[0], "stage": key[1], "planned": planned, "reserved": booked, "ran": ran}


def _published(entries: Sequence[Entry], found: Findings) -> None:
    """Numbers that were charged (METRIC), each against the plan of its run."""
    planned: dict[str, PublishedMetrics] = {}
    charged: dict[str, list[Event]] = {}
    for entry in entries:
        if entry.type is EntryType.plan and "metrics" in entry.detail:
            planned[entry.run_id] = PublishedMetrics.from_json(entry.detail["metrics"])
        elif entry.type is EntryType.metric:
            charged.setdefault(entry.run_id, []).extend(entry.listed())
            if entry.run_id not in planned:
                found.faults.append(f"entry {entry.seq}: publishes numbers that no plan names")
    for run, events in charged.items():
        if run in planned and not covers([planned[run].event], events):
            found.faults.append(f"run {run}: more numbers were published than its plan has")
    if charged:
        found.facts["published"] = {
            run: sum(event.count for event in events) for run, events in sorted(charged.items())
        }


def _payloads(
    entries: Sequence[Entry], files: Mapping[str, bytes], policy: Policy | None, found: Findings
) -> None:
    """What left by the ledger is what left by the receipts, and nothing left that the policy keeps in."""
    if RECEIPTS not in files:
        if any(entry.payload for entry in entries):
            found.faults.append(f"{RECEIPTS} is missing, and the ledger says that something left")
        return
    receipts = read_receipts(files[RECEIPTS])
    found.faults += receipt_faults(entries, files[RECEIPTS], receipts)
    open_stages = sorted({receipt.stage for receipt in receipts if receipt.mechanism == "none"})
    for stage in open_stages:
        rule = None if policy is None else _rule(policy, stage)
        if policy is not None and rule is not None and rule is not StageRule.dp_required:
            found.faults.append(f"stage {stage}: something left, and the policy says {rule}")
        elif rule is StageRule.dp_required:
            found.faults.append(
                f"stage {stage}: something left without a mechanism, and the policy wants one"
            )
        else:
            found.cautions.append(f"NO GUARANTEE for stage {stage}: something left without a mechanism")
    found.facts["egress"] = {
        "payloads": len(receipts), "bytes": sum(receipt.bytes for receipt in receipts),
        "without_mechanism": sum(receipt.mechanism == "none" for receipt in receipts),
    }  # fmt: skip


def _rule(policy: Policy, stage: str) -> StageRule | None:
    """What ``policy`` says of what leaves in ``stage``; of synthetic images only whether any may."""
    if stage == SYNTHETIC and policy.synthetic.release is SyntheticRelease.forbidden:
        return StageRule.forbidden
    found: StageRule | None = getattr(policy.stages, stage, None)
    return found


def _audits(entries: Sequence[Entry], policy: Policy | None, found: Findings) -> None:
    audits = [entry for entry in entries if entry.type is EntryType.audit]
    for entry in audits:
        upper = entry.detail["upper"] if entry.detail["kind"] == "artefact" else None
        if upper is not None and entry.detail["lower"] > upper:  # None: nothing is claimed of it
            found.faults.append(f"entry {entry.seq}: an audit found more than the claimed epsilon")
    first = next((entry.seq for entry in entries if entry.type is EntryType.reserve), None)
    rehearsed = [a.seq for a in audits if a.detail["kind"] == "rehearsal" and a.detail["passed"] is True]
    if first is not None and not any(seq < first for seq in rehearsed):
        found.cautions.append("no rehearsal passed before the first reservation")
    if policy is not None:
        owed, later = owed_audits(entries, policy)
        found.owed += owed
        found.cautions += later


def _agrees(recorded: float | None, recomputed: float | None) -> bool:
    if recorded is None or recomputed is None:
        return recorded is recomputed
    return abs(recorded - recomputed) <= TOLERANCE * max(1.0, recomputed)
