"""A hospital joins: its keys are made here and stay here, and the consortium's kit is kept beside them.

What the SuperNode needs lies in ``FOLDER/network``, so that its user need not be the guard's: the guard's
keys, ledger and data are above it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from common.canonical import canonical_json
from common.config import load_site
from common.durable import write_atomic
from common.errors import ArtefactError, ConfigError
from common.network.certificates import Expiry
from common.network.documents import JoinRequest, Kit, read_kit, write_document
from common.network.identity import create_node_key, fingerprint_of, read_node_key
from common.privacy.budget import Caps
from common.privacy.journal import LEDGER
from common.privacy.keys import SIGNING_KEY, read_private_key
from common.privacy.ledger import Ledger
from common.recipe_rules import SITE_NAME

SITE_FILE = "site.yaml"
REQUEST = "join.json"
NODE_KEY, KIT, AUTHORITY = Path("network/node.key"), Path("network/kit.json"), Path("network/ca.crt")

_SITE_YAML = """\
# This hospital, in its own words. The guard reads this file; the coordinator never does.
name: {name}
# The table of images, from this folder on; check it with: wardround data check MANIFEST
manifest: {manifest}

# What else may stand here, with what holds without it:
# student: mobile           # the student to go home with; else the plan's
# patients: 120             # labelled training patients, declared in public; a private run needs it
# test_patients: 30         # labelled test patients, the same; metrics with noise need it
# officer_key: officer.pub  # of who signs policy.json here; then nothing else is accepted
# policy:
#   min_group_patients: 5   # a style group of fewer patients is not shared
#   min_cell_patients: 5    # a metric over fewer patients is not shared
#   max_payload_mb: 64.0
#   allow_student: false    # a student trained without noise may leave
"""


@dataclass(frozen=True)
class Prepared:
    """``made``: the files that were not there before, from the site's folder on."""

    request: JoinRequest
    made: list[str]


def prepare_site(folder: Path, name: str, manifest: Path | None) -> Prepared:
    """Keys, ledger and ``site.yaml`` where they are missing, and a fresh ``join.json``.

    Guarantees: what is there is kept; nothing is made if anything there contradicts ``name``; no private key
    is in the request.

    Raises:
        ConfigError: ``name`` cannot name a site, or is not that of what is there; every fault.
        ArtefactError: a key or the ledger is damaged.
    """
    _check_name(folder, name)
    made = []
    if not folder.exists():
        folder.mkdir(mode=0o700, parents=True)
    if not (folder / LEDGER).exists():
        Ledger.create(folder, name, Caps(1e-5))
        made += ["ledger.key", "patients.key", LEDGER]
    if (folder / NODE_KEY).exists():
        node = read_node_key(folder / NODE_KEY)
    else:
        node = create_node_key(folder / NODE_KEY)
        (folder / NODE_KEY).parent.chmod(0o700)
        made.append(str(NODE_KEY))
    if not (folder / SITE_FILE).exists():
        where = "data/manifest.csv" if manifest is None else str(manifest.resolve())
        text = _SITE_YAML.format(name=canonical_json(name), manifest=canonical_json(where))
        write_atomic(folder / SITE_FILE, text.encode())
        made.append(SITE_FILE)
    request = JoinRequest.make(name, node, read_private_key(folder / SIGNING_KEY))
    write_document(folder / REQUEST, request)
    return Prepared(request, made)


def take_kit(folder: Path, path: Path, now: datetime) -> tuple[Kit, Expiry]:
    """Keep the kit in ``path``, once it is seen to be for this site; and when its authority ends.

    Raises ``ArtefactError``: it is no kit, is for another key, is over, or another consortium's is kept here.
    """
    kit, site = read_kit(path), load_site(folder / SITE_FILE).name
    own = fingerprint_of(read_node_key(folder / NODE_KEY).public_key())
    expiry = Expiry.of("the authority's certificate", kit.authority, now)
    faults = []
    if kit.node != own:
        faults.append(f"it was made for the key {kit.node[:16]}..., and this site's is {own[:16]}...")
    if kit.site != site:
        faults.append(f"it was made for {kit.site}, and this site is {site}")
    if expiry.over:
        faults.append(f"{expiry}: ask for a new kit (wardround consortium renew --authority)")
    if (folder / KIT).exists() and read_kit(folder / KIT).consortium != kit.consortium:
        faults.append(f"another consortium's kit is kept here: to leave that one, move {folder / KIT} away")
    if faults:
        raise ArtefactError(f"{path} is not taken", faults)
    write_document(folder / KIT, kit)
    write_atomic(folder / AUTHORITY, kit.ca_certificate.encode())
    return kit, expiry


def _check_name(folder: Path, name: str) -> None:
    faults = []
    if not SITE_NAME.fullmatch(name):
        faults.append(f"{name!r} cannot name a site: use lower-case letters, digits and '-'")
    if (folder / SITE_FILE).exists() and (other := load_site(folder / SITE_FILE).name) != name:
        faults.append(f"{folder / SITE_FILE} names it {other!r}: give --name {other}, or correct the file")
    if (folder / LEDGER).exists():
        other = str(Ledger.open(folder, Caps(1e-5)).entries[0].detail["site"])
        if other != name:
            faults.append(f"{folder / LEDGER} is the ledger of {other!r}, and a ledger keeps its name")
    if faults:
        raise ConfigError(f"{folder} cannot become the site {name!r}", faults)
