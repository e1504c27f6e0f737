"""What a site's folder holds about one run: read once, checked, and never written to.

Whatever is absent stays absent here (None, or empty): the page says NOT CHECKED of it. Whatever is there and
does not hold is an error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from common.canonical import sha256_of
from common.errors import ArtefactError, ConfigError, VerificationFailed
from common.plan import Stage
from common.privacy.audits import AUDITS
from common.privacy.bundle import read_bundle
from common.privacy.entries import Entry, EntryType, chain_faults
from common.privacy.heads import SignedHead
from common.privacy.journal import HEAD, LEDGER, check_head, read_head, read_lines
from common.privacy.ledger import RECEIPTS
from common.privacy.plan import PrivacyPlan
from common.privacy.policy import POLICY, Policy, policy_from
from common.privacy.receipts import NO_MECHANISM, ReceiptLine, read_receipts
from common.privacy.verify import Evidence, Findings, verify
from common.privacy.witness import read_heads

RUN_PLAN = "plan.json"
WITNESSED = "witnessed.jsonl"  # as `client.witnesses` keeps it


@dataclass(frozen=True)
class Inquiry:
    """What is asked of a record.

    Attributes:
        run: its id; None: the newest.
        officer_public: the officer's key, for the policy's signature; None: not checked.
        heads: head hashes that others have seen.
        witnesses: signed heads that others kept, of whatever ledgers.
        most_steps: how many spending entries a whole verification may recompute; beyond it is left out and
            the page says so. None: any number.
    """

    run: str | None = None
    officer_public: str | None = None
    heads: tuple[str, ...] = ()
    witnesses: tuple[SignedHead, ...] = ()
    most_steps: int | None = None


@dataclass(frozen=True)
class AgreedPlan:
    """What the page says of the last run plan that the site agreed to; of any version of it."""

    run_id: str
    sites: list[str]
    stages: list[str]
    models: dict[str, str]
    code_sha256: str
    digest: str


@dataclass(frozen=True)
class SiteRecord:
    """One run at one site.

    Attributes:
        receipts: of the run, as far as the ledger tells runs apart; without a ledger, all.
        others: the site's receipts of other runs.
        plan: of the run, as the site agreed to it, if it is the site's newest.
        findings: of the verifier; None where that was left out.
        audits: file name -> content, of ``audits/*.json``.
        witnessed: the last heads of other sites' ledgers that this site was shown.
    """

    site: str
    run_id: str
    entries: Sequence[Entry]
    receipts: Sequence[ReceiptLine]
    others: Sequence[ReceiptLine]
    plan: AgreedPlan | None
    policy: Policy | None
    findings: Findings | None
    audits: dict[str, bytes]
    witnessed: Sequence[SignedHead]
    inquiry: Inquiry

    @cached_property
    def own(self) -> list[Entry]:
        """The run's entries in the ledger."""
        return [entry for entry in self.entries if entry.run_id == self.run_id and entry.run_id]

    @cached_property
    def terms(self) -> PrivacyPlan | None:
        """The plan of the run's noised steps; None: none is booked, so nothing was noised."""
        booked = [entry.detail["plans"] for entry in self.own if entry.type is EntryType.plan]
        return PrivacyPlan.from_json(booked[-1][str(Stage.adapt)]) if booked else None

    @cached_property
    def gaps(self) -> list[str]:
        """Why there is no guarantee; empty: there is one, for everything that left."""
        found = []
        if self.terms is None:
            found.append("no plan of noised steps is booked for it")
        if bare := bare_of(self.receipts):
            found.append(f"{bare} of its payloads left without a mechanism")
        if bare := bare_of(self.others):
            found.append(f"{bare} payloads of other runs left without a mechanism")
        if exports := self.number_of(EntryType.export):
            found.append(f"the ledger holds {exports} releases without noise, which nothing takes back")
        return found

    @property
    def code(self) -> str:
        """Digest of the code that the run proposed; empty if none is recorded."""
        booked = self.own[0].code_sha256 if self.own else ""
        return booked or ("" if self.plan is None else self.plan.code_sha256)

    def number_of(self, kind: EntryType) -> int:
        """Entries of that type in the whole ledger."""
        return sum(entry.type is kind for entry in self.entries)

    @property
    def guaranteed(self) -> bool:
        return not self.gaps


def read_record(folder: Path, inquiry: Inquiry) -> SiteRecord:
    """The record in ``folder``.

    Raises:
        VerificationFailed: the ledger or the receipts are damaged.
        ArtefactError: there is neither a ledger nor a plan, the run is unknown, or another file is damaged.
    """
    files = read_bundle(folder)
    entries = _entries(files)
    plan = _agreed_plan(folder)
    run_id = _which(inquiry.run, entries, plan)
    receipts, others = _divided(run_id, entries, files.get(RECEIPTS, b""))
    return SiteRecord(
        site=str(entries[0].detail["site"]) if entries else _site_of([*receipts, *others], folder),
        run_id=run_id,
        entries=entries,
        receipts=receipts,
        others=others,
        plan=plan if plan is not None and plan.run_id == run_id else None,
        policy=_policy(files),
        findings=_findings(files, entries, inquiry),
        audits={path.name: path.read_bytes() for path in sorted((folder / AUDITS).glob("*.json"))},
        witnessed=read_heads(folder / WITNESSED) if (folder / WITNESSED).exists() else [],
        inquiry=inquiry,
    )


def _entries(files: dict[str, bytes]) -> list[Entry]:
    if LEDGER not in files:
        return []
    entries = read_lines(files[LEDGER])
    check_head(entries, read_head(files[HEAD]) if HEAD in files else None)
    faults = chain_faults(entries)
    if faults or not entries:
        raise VerificationFailed("the ledger does not hold: nothing is said of it", faults)
    return entries


def _agreed_plan(folder: Path) -> AgreedPlan | None:
    path = folder / RUN_PLAN
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return AgreedPlan(
            run_id=str(value["run_id"]),
            sites=[str(site) for site in value.get("sites", [])],
            stages=[str(stage) for stage in value["stages"]],
            models={str(name): str(digest) for name, digest in value["models"].items()},
            code_sha256=str(value["code_sha256"]),
            digest=sha256_of(value),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtefactError(f"{path} is no run plan: the site writes it when it agrees to one") from error


def _which(asked: str | None, entries: Sequence[Entry], plan: AgreedPlan | None) -> str:
    """The run asked for, or the newest: that of the last plan agreed to, else of the last entry."""
    known = list(dict.fromkeys(entry.run_id for entry in entries if entry.run_id))
    if plan is not None and plan.run_id not in known:
        known.append(plan.run_id)
    if not known:
        raise ArtefactError("this folder has seen no run: name a site's folder, with its ledger or plan.json")
    if asked is not None and asked not in known:
        raise ArtefactError(f"run {asked} is not in this folder; it knows {', '.join(known)}")
    return asked or (plan.run_id if plan is not None else known[-1])


def _site_of(receipts: Sequence[ReceiptLine], folder: Path) -> str:
    return receipts[0].site if receipts else folder.resolve().name


def _divided(
    run_id: str, entries: Sequence[Entry], data: bytes
) -> tuple[list[ReceiptLine], list[ReceiptLine]]:
    """The run's receipts and the others. A receipt carries no run: the ledger anchors their bytes."""
    start, end = 0, len(data)
    own = [entry.seq for entry in entries if entry.run_id == run_id]
    first, last = (own[0], own[-1]) if own else (len(entries), len(entries))
    later = any(entry.run_id not in ("", run_id) for entry in entries[last + 1 :])
    for entry in entries:
        size = int(entry.detail.get("receipts", {}).get("bytes", 0))
        start = size if entry.seq <= first else start
        end = size if later and entry.seq <= last else end
    return read_receipts(data[start:end]), read_receipts(data[:start] + data[end:])


def bare_of(receipts: Sequence[ReceiptLine]) -> int:
    return sum(receipt.mechanism == NO_MECHANISM for receipt in receipts)


def _policy(files: dict[str, bytes]) -> Policy | None:
    if POLICY not in files:
        return None
    try:
        return policy_from(json.loads(files[POLICY]), POLICY)
    except (ValueError, ConfigError) as error:
        raise ArtefactError(f"{POLICY} is no policy of this version: {error}") from error


def _findings(files: dict[str, bytes], entries: Sequence[Entry], inquiry: Inquiry) -> Findings | None:
    steps = sum(bool(entry.spent()) for entry in entries)
    if not entries or (inquiry.most_steps is not None and steps > inquiry.most_steps):
        return None
    return verify(files, Evidence(inquiry.officer_public, inquiry.heads, inquiry.witnesses))
