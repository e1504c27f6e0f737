"""Whom a job is put to: each site by its keys, and which of the connected nodes is whose.

A name can be anybody's and a node id changes; a key cannot be had without its private half. So which node is
a site's is read off the key with which the node registered, and no message is needed to find out.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from common.canonical import canonical_json
from common.durable import write_atomic
from common.errors import ArtefactError
from common.network.identity import fingerprint_of_pem
from common.recipe_rules import SITE_NAME
from common.strict_json import read_strictly
from server.collect import POLL_S, Collector, monotonic

ROSTER = "roster.json"
SCHEMA = 1
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Invited:
    """A site as the coordinator knows it.

    Attributes:
        node: fingerprint of its Flower node's key (`common.network.identity`).
        ledger_key: the public key with which its guard signs, 64 hex digits.
    """

    site: str
    node: str
    ledger_key: str


@dataclass(frozen=True)
class _File:
    schema: int
    sites: list[Invited]


def write_roster(path: Path, sites: Iterable[Invited]) -> None:
    document = _File(SCHEMA, sorted(sites, key=lambda one: one.site))
    write_atomic(path, canonical_json(asdict(document)).encode())


def read_roster(path: Path) -> dict[str, Invited]:
    """Site -> its keys. Raises ``ArtefactError`` listing every fault of the file."""
    try:
        found = read_strictly(path.read_text(encoding="utf-8"), _File, "roster")
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read ({error.strerror}): name the members' file") from error
    except (UnicodeDecodeError, ArtefactError) as error:
        raise ArtefactError(f"{path} is no roster of sites: write it anew") from error
    faults = [] if found.schema == SCHEMA else [f"schema {found.schema}: use the release that wrote it"]
    for kind in ("site", "node", "ledger_key"):
        values = [getattr(one, kind) for one in found.sites]
        form = SITE_NAME if kind == "site" else _DIGEST
        faults += [f"{kind} {value!r} is malformed" for value in values if not form.fullmatch(value)]
        faults += [f"{kind} {value!r} stands there twice" for value in set(values) if values.count(value) > 1]
    if faults:
        raise ArtefactError(f"{path} is no roster of sites: correct it", faults)
    return {one.site: one for one in found.sites}


def locate(collector: Collector, wanted: Mapping[str, Invited], wait_s: float) -> dict[str, int]:
    """Site -> node id, of those of ``wanted`` that are connected: as soon as all are, or after ``wait_s`` s.

    Guarantee: a node is a site's by its key alone, whatever it is called; nothing is sent to find out.
    """
    sites = {one.node: site for site, one in wanted.items()}
    until = monotonic() + wait_s
    while True:
        found = {sites[key]: node for key, node in _nodes(collector) if key in sites}
        if len(found) == len(sites) or monotonic() >= until:
            return dict(sorted(found.items()))
        time.sleep(POLL_S)


def _nodes(collector: Collector) -> list[tuple[str, int]]:
    """(fingerprint, node id). An engine without keys says itself which node is whose."""
    told: Mapping[str, int] | None = getattr(collector.grid, "fingerprints", None)
    if told is not None:
        return list(told.items())
    return [(fingerprint_of_pem(node.public_key), node.node_id) for node in collector.grid.get_nodes()]
