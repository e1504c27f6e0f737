"""The verdict and the five sentences, from fixed templates and the numbers of the document alone.

Guarantee: no sentence is looser than the accounting. Epsilon and an attacker's rates stand in the document
rounded up, and are only written out here. Without a guarantee every sentence says so.
"""

from __future__ import annotations

from typing import Any

from common.pages.wording import exact, plural
from common.privacy.membership import Verdict

HOLDS, BROKEN = "holds", "does not hold"
ADVISORY = "policy advisory, not enforced"
DISCLAIMER = (
    "This report does not state that the model is anonymous, that its use is safe, or that anything here "
    "is compliant with a law: it lists evidence for those who decide."
)
Document = dict[str, Any]


def verdict(document: Document) -> dict[str, Any]:
    """One word for the run, and what tempers it."""
    cautions = list(dict.fromkeys(_cautions(document)))
    faults = [*document["verification"]["faults"], *document["verification"]["owed"]]
    return {
        "word": _word(document),
        "cautions": cautions,
        "faults": faults,
        "number_of_cautions": len(cautions),
    }


def _word(document: Document) -> str:
    verification, policy = document["verification"], document["policy"]
    if verification["faults"]:
        return "THE RECORD DOES NOT HOLD"
    if not document["guarantee"]:
        return "NO GUARANTEE"
    if any(audit["verdict"] == Verdict.inconsistent for audit in document["artefacts"]):
        return "AN AUDIT CONTRADICTS THE CLAIM"
    if policy is None:
        return "BOUNDED, UNDER NO POLICY"
    if verification["owed"]:
        return "BOUNDED, AN AUDIT IS OWED"
    return "WITHIN POLICY" if verification["holds"] else "BOUNDED, NOT YET VERIFIED"


def _cautions(document: Document) -> list[str]:
    found = [] if document["run"]["enforced"] else [ADVISORY]
    known = "; the figures assume so" if document["guarantee"] else ""
    found.append(f"secure aggregation was off: the server saw each update{known}")
    if document["guarantee"] and document["band"].startswith(("weak", "not")):
        found.append(f"an epsilon of this size is by custom {document['band']}")
    if document["verification"]["holds"] is None:
        found.append("the record was not verified for this page")
    return found + list(document["verification"]["cautions"])


def sentences(document: Document) -> list[dict[str, str]]:
    """Statement, plain terms, scope, cautions, evidence."""
    guarantee = document["guarantee"]
    texts = {
        "Statement": _statement(document) if guarantee else _no_statement(document),
        "In plain terms": _plain(document) if guarantee else _nothing_plain(),
        "Holds against": _scope(document) if guarantee else _no_scope(document),
        "Caution": _caution(document),
        "Evidence": _evidence(document),
    }
    return [{"title": title, "text": text} for title, text in texts.items()]


def _statement(document: Document) -> str:
    first, second = document["budget"]["epsilons"][:2]
    settings, policy = document["settings"], document["policy"]
    noised, public = document["egress"]["noised"], document["egress"]["public"]
    cap = "" if policy is None else f" of {exact(policy['max_epsilon_total'])}"
    used = f"patients ({document['budget']['most_used_patients']} of them)"
    return (
        f"{document['site']} sent {plural(noised['payloads'], 'noised payload')} ({noised['size']}) computed "
        f"from {settings['patients']} declared patients, and {public['payloads']} of public values. For any "
        "one patient, whether or not all of their images were used changes what anyone could conclude from "
        f"them by at most \u03b5 = {exact(first['run'])} at \u03b4 = {exact(first['delta'])} "
        f"({exact(second['run'])} at {exact(second['delta'])}), one patient added or removed, "
        f"{settings['sampling']} sampling, over this run. Counting everything in the ledger, the most-used "
        f"{used} have spent {exact(first['total'])}{cap} "
        f"at \u03b4 = {exact(first['delta'])}; by custom this is {document['band']}."
    )


def _no_statement(document: Document) -> str:
    egress, gaps = document["egress"], "; ".join(document["gaps"])
    return (
        f"{document['site']} sent {plural(egress['payloads'], 'payload')} ({egress['size']}) in this run, "
        f"with NO GUARANTEE: {gaps}. Nothing bounds what they say about one patient."
    )


def _plain(document: Document) -> str:
    parts = []
    for row in document["meaning"]["odds"][1:]:
        wrong, found = exact(row["wrongly_named_per_100"]), exact(row["found_per_100"])
        parts.append(
            f"wrongly naming at most {wrong} in 100 patients who were not, they could pick out at most "
            f"{found} in 100 of those who were (guessing gives {wrong})"
        )
    return f"Suppose someone tries to tell whose images were used. {_sentence('; '.join(parts))}"


def _nothing_plain() -> str:
    return (
        "Suppose someone tries to tell whose images were used. No limit is known to how often they could "
        "be right: NO GUARANTEE."
    )


def _scope(document: Document) -> str:
    missing = "; ".join(document["not_covered"])
    return (
        "The server, other hospitals and anyone who later gets the model, even together. Does not cover: "
        f"{missing}."
    )


def _no_scope(document: Document) -> str:
    missing = "; ".join(document["not_covered"])
    return (
        "Nobody: NO GUARANTEE. That images stayed here bounds nothing by itself, for the numbers that "
        f"left were computed from them. Not covered either: {missing}."
    )


def _caution(document: Document) -> str:
    return _sentence("; ".join(document["verdict"]["cautions"]) or "none")


def _evidence(document: Document) -> str:
    verification = document["verification"]
    parts = [_rehearsed(document["rehearsal"])]
    parts += [_audited(audit) for audit in document["artefacts"]] or ["no artefact was audited"]
    if verification["holds"] is None:
        parts.append("the ledger was not verified here")
    else:
        outcome = BROKEN if verification["faults"] else HOLDS
        outcome += ", but for an audit that is owed" if verification["owed"] else ""
        parts.append(
            f"the verifier recomputed the ledger's {verification['entries']} entries: the record {outcome}"
        )
    return _sentence("; ".join(parts))


def _audited(audit: dict[str, Any]) -> str:
    if not audit["bounded"]:
        return f"audit of the {audit['artefact']}: no bound follows from it"
    return (
        f"audit of the {audit['artefact']}: lower bound {exact(audit['lower'])}, the most that it could have "
        f"found {exact(audit['ceiling'])}, {audit['verdict']}"
    )


def _rehearsed(rehearsal: dict[str, Any]) -> str:
    figures = rehearsal["figures"]
    if figures:
        noise, sampler = figures["noise"], figures["sampler"]
        return (
            f"noise {exact(noise['std'])} of what is claimed (allowed {exact(noise['std_low'])} to "
            f"{exact(noise['std_high'])}); sampler test p = {exact(sampler['counts_p'])}"
        )
    states = {None: "no rehearsal was run", True: "a rehearsal passed", False: "THE REHEARSAL FAILED"}
    return states[rehearsal["passed"]]


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
