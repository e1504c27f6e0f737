"""Who is protected against whom, and what sites that work together could learn.

The rows are those of local DP-SGD: each site clips and noises by itself, so the bound asks nothing of the
server, of other sites, or of the channel between them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from common.privacy.entries import EntryType
from common.privacy.report.record import SiteRecord

NOT_COVERED = (
    "that this hospital took part at all",
    "its declared number of patients, which is public",
    "times of messages and of computation",
    "facts about the data set as a whole, and harm to groups",
    "what the base model was trained on before",
    "this hospital's own staff, and the student that stays with it (trained on real images without noise)",
)


def protection(run: float | None, total: float | None, sites: int) -> list[dict[str, Any]]:
    """One row an adversary: what it sees, whether a bound holds, and which (None: NO GUARANTEE)."""
    share = "exactly this site's share" if sites == 2 else "the sum of the others' shares"
    rows = [
        ("The server, honest but curious", "each update of this site, every round", run),
        ("Another hospital", f"the shared adapter, so, minus its own share, {share}", run),
        ("An outsider with the final model", "the last adapter", run),
        (
            "A malicious server, or one that sends sites different models",
            "updates to what it chose to send",
            run,
        ),
        ("All of these together, over every run in the ledger", "everything that ever left", total),
    ]
    found: list[dict[str, Any]] = [
        {"adversary": who, "sees": sees, "bounded": bound is not None, "epsilon": bound, "note": ""}
        for who, sees, bound in rows
    ]
    if run is not None:
        found[3]["note"] = "as far as the guard itself clips and noises: see the hazard on its process"
    own = {
        "adversary": "This hospital's own staff; whoever holds its student",
        "sees": "images, masks, student",
    }
    found.append({**own, "bounded": False, "epsilon": None, "note": "not protected, by design"})
    return found


def federation(record: SiteRecord) -> dict[str, Any]:
    """Sites, secure aggregation, what colluding sites see, refusals, heads of others that are kept here."""
    sites = [] if record.plan is None else record.plan.sites
    refused = Counter(
        (str(entry.detail.get("code")), str(entry.detail.get("field")))
        for entry in record.own
        if entry.type is EntryType.refuse
    )
    lost = sum(entry.type is EntryType.void_counted for entry in record.own)
    return {
        "sites": sites,
        "count": len(sites),
        "secure_aggregation": "off",
        "collusion": _collusion(len(sites)),
        "refusals": [
            {"code": code, "field": field, "times": n} for (code, field), n in sorted(refused.items())
        ],
        "steps_lost": lost,
        "witnessed": {
            "heads": len(record.witnessed),
            "sites": sorted({head.site for head in record.witnessed}),
        },
    }


def _collusion(sites: int) -> list[dict[str, str]]:
    """What each coalition sees without secure aggregation, and with a sound one."""
    if sites < 2:
        return []
    rows = [("the server alone", "this site's update", "the sum of all sites")]
    if sites == 2:
        rows.append(("the other site, from the shared adapter", "this site's update", "this site's update"))
    else:
        rows.append(("one other site, from the shared adapter", "the sum of the rest", "the sum of the rest"))
        rows.append(("the server and all other sites but one", "this site's update", "the sum of two sites"))
    rows.append(("the server and all other sites", "this site's update", "this site's update"))
    return [{"coalition": who, "without": without, "with": sound} for who, without, sound in rows]
