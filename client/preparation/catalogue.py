"""The sets that can be prepared, by name: a new one is a module and a line here."""

from __future__ import annotations

from client.preparation.autooral import AUTOORAL_SET
from client.preparation.chaos import CHAOS_CT_SET, CHAOS_MR_SET
from client.preparation.dsb2018 import DSB2018_SET
from client.preparation.kidneyus import KIDNEYUS_SET
from client.preparation.known_set import KnownSet
from client.preparation.ph2 import PH2_SET
from client.preparation.retina import CHASE_SET, DRIVE_SET, HRF_SET, LES_AV_SET, STARE_SET
from common.errors import UsageError
from common.schema_check import choose_from

CATALOGUE: dict[str, KnownSet] = {
    known.name: known
    for known in (
        KIDNEYUS_SET,
        AUTOORAL_SET,
        CHAOS_CT_SET,
        CHAOS_MR_SET,
        PH2_SET,
        DRIVE_SET,
        CHASE_SET,
        HRF_SET,
        STARE_SET,
        LES_AV_SET,
        DSB2018_SET,
    )
}


def known_set(name: str) -> KnownSet:
    """Raises `UsageError` for a name that is not in the catalogue."""
    if name not in CATALOGUE:
        raise UsageError(f"there is no set {name!r}: {choose_from(name, list(CATALOGUE))}")
    return CATALOGUE[name]
