"""The files of ``audits/``: the rehearsal of the mechanism, and attacks on what left.

They are read field by field, so that a later audit may say more; a file that lacks what the page shows is
refused rather than shown in part.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from scipy.stats import binom, norm

from common.canonical import sha256_of
from common.errors import ArtefactError
from common.privacy.audits import REHEARSAL
from common.privacy.entries import EntryType
from common.privacy.report.record import SiteRecord
from common.privacy.report.rounding import per_hundred, upper, upper_rate

REHEARSAL_FILE = f"{REHEARSAL}.json"
BAND_LEVEL = 0.001  # of each point of the quantile plot: how often a right build strays from the band
BINS = 40  # of batch sizes, at most


def rehearsal(record: SiteRecord) -> dict[str, Any]:
    """The rehearsal's findings with what its plots need; without the file, what the ledger knows of it."""
    booked = [e for e in record.entries if e.type is EntryType.audit and e.detail.get("kind") == REHEARSAL]
    last = booked[-1].detail if booked else {}
    passed = bool(last.get("passed")) if booked else None
    code = str(last.get("code_sha256", ""))
    found: dict[str, Any] = {"booked": len(booked), "passed": passed, "code_sha256": code, "figures": None}
    if REHEARSAL_FILE in record.audits:
        value = _read(record, REHEARSAL_FILE)
        try:
            found |= {"passed": bool(value["passed"]), "code_sha256": str(value["code_sha256"])}
            found["figures"] = _figures(value)
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(REHEARSAL_FILE) from error
    return found


def _figures(value: dict[str, Any]) -> dict[str, Any]:
    noise, sampler, clip = value["noise"], value["sampler"], value["clip"]
    found: dict[str, Any] = {
        "noise": {
            **_figures_of(noise, ("count", "ks_p", "repeats")),
            **{"std": round(noise["std"], 6), "std_allowed": round(noise["std_allowed"], 6)},
        },
        "quantiles": _quantiles(noise),
        "sampler": _figures_of(
            sampler, ("asked_rate", "rate", "patients", "steps", "counts_p", "variance_p", "empty")
        ),
        "batches": _batches(sampler),
        "clip": {key: round(clip[key], 6) for key in ("outlier", "many_images", "ordinary")},
        "canaries": _bounds(value.get("canaries"), ("canaries", "guesses", "right")),
        "worst_case": _bounds(value.get("worst_case"), ("trainings",)),
    }
    found["noise"]["std_low"] = round(1 - noise["std_allowed"], 6)
    found["noise"]["std_high"] = round(1 + noise["std_allowed"], 6)
    return found


def _bounds(value: dict[str, Any] | None, counts: Sequence[str]) -> dict[str, Any] | None:
    """An audit of the mechanism: how much was tried, and its lower bound, its ceiling, what was claimed."""
    if value is None:
        return None
    claimed = None if value["upper"] is None else upper(value["upper"])
    shown = {key: round(value[key], 3) for key in ("lower", "ceiling")}
    return {**{key: int(value[key]) for key in counts}, **shown, "upper": claimed}


def _figures_of(value: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Numbers to four figures, which is more than their tests can tell."""
    return {key: float(f"{value[key]:.4g}") if isinstance(value[key], float) else value[key] for key in keys}


def _quantiles(noise: dict[str, Any]) -> list[list[float]]:
    """[expected quantile, found minus expected, half width of the band of a right build]."""
    z = float(norm.isf(BAND_LEVEL / 2))
    rows = []
    for expected, found in noise["quantiles"]:
        below = float(norm.cdf(expected))
        half = z * math.sqrt(below * (1 - below) / noise["count"]) / float(norm.pdf(expected))
        rows.append([round(expected, 4), round(found - expected, 6), round(half, 6)])
    return rows


def _batches(sampler: dict[str, Any]) -> list[list[float]]:
    """[batch size, steps of that size, steps expected of independent draws]; the rare ends are left out."""
    sizes = {int(size): int(steps) for size, steps in sampler["sizes"].items()}
    patients, rate = int(sampler["patients"]), float(sampler["asked_rate"])
    low, high = (int(binom.ppf(share, patients, rate)) for share in (0.0005, 0.9995))
    low, high = min([low, *sizes]), max([high, *sizes])
    width = math.ceil((high - low + 1) / BINS)
    rows = []
    for start in range(low, high + 1, width):
        inside = range(start, start + width)
        expected = float(binom.cdf(inside[-1], patients, rate) - binom.cdf(start - 1, patients, rate))
        rows.append(
            [start, sum(sizes.get(size, 0) for size in inside), round(expected * sampler["steps"], 2)]
        )
    return rows


def artefacts(record: SiteRecord) -> list[dict[str, Any]]:
    """One entry an attack on something that left."""
    found = []
    for name in record.audits:
        if name == REHEARSAL_FILE:
            continue
        value = _read(record, name)
        try:
            found.append({**_artefact(value), "file": name, "booked": _booked(record, name)})
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise _damaged(name) from error
    return found


def _artefact(value: dict[str, Any]) -> dict[str, Any]:
    keys = (
        "artefact",
        "artefact_sha256",
        "attack",
        "unit",
        "assignment",
        "members",
        "others",
        "right",
        "guesses",
    )
    upper_bound = value["upper"]
    return {
        **{key: value[key] for key in keys},
        "auc": {key: round(value["auc"][key], 4) for key in ("value", "low", "high")},
        "tpr": [_rate(row) for row in value["tpr"]],
        "roc": [[round(x, 6), round(y, 6)] for x, y in value["roc"]],
        "lower": round(value["lower"], 3),
        "ceiling": round(value["ceiling"], 3),
        "upper": None if upper_bound is None else upper(upper_bound),
        "verdict": str(value["verdict"]),
        "bounded": value["guesses"] > 0,  # else no coin decided who was used, and no bound follows
        "not_run": [str(attack) for attack in value["not_run"]],
    }


def _rate(row: dict[str, Any]) -> dict[str, Any]:
    """Per hundred patients, as the odds table."""
    measured = bool(row["measurable"]) and row["value"] is not None
    limit = row.get("limit")
    return {
        "wrongly_named_per_100": per_hundred(row["fpr"]),
        "measurable": measured,
        "found_per_100": per_hundred(round(row["value"], 4)) if measured else None,
        "low_per_100": per_hundred(round(row["low"], 4)) if measured else None,
        "high_per_100": per_hundred(round(row["high"], 4)) if measured else None,
        "limit_per_100": None if limit is None else per_hundred(upper_rate(limit)),
    }


def _booked(record: SiteRecord, name: str) -> bool:
    """Whether an AUDIT entry of the ledger names the digest of just this file."""
    digest = sha256_of(record.audits[name])
    audits = (entry for entry in record.entries if entry.type is EntryType.audit)
    return any(digest in _texts(entry.detail) for entry in audits)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for entry in value.values():
            yield from _texts(entry)
    elif isinstance(value, str):
        yield value


def _read(record: SiteRecord, name: str) -> dict[str, Any]:
    try:
        value = json.loads(record.audits[name])
    except ValueError as error:
        raise _damaged(name) from error
    if not isinstance(value, dict) or value.get("schema") != 1:
        raise _damaged(name)
    return value


def _damaged(name: str) -> ArtefactError:
    return ArtefactError(f"audits/{name} is no audit of this version: make it again, or take it away")
