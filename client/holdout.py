"""Patients whom a fair coin leaves out of training, so that an audit afterwards can be proved right or wrong.

A lower bound on epsilon from one training wants independent coins (Steinke et al. 2023): who ends up in the
test split of a manifest says nothing about them. It costs about half of the patients, so it is off unless
``holdout: coin`` stands in ``site.yaml``.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from client.patients import Patient, Split
from common.durable import write_atomic
from common.errors import ArtefactError
from common.recipe import Holdout, SiteFile

HOLDOUT = "holdout.json"  # patient id -> whether the coin put them in; never leaves the site's folder


def read_coins(folder: Path) -> dict[str, bool]:
    """Patient id -> True: in. Empty where no coin was thrown. Raises ``ArtefactError`` for another file."""
    path = folder / HOLDOUT
    if not path.exists():
        return {}
    try:
        coins = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(coins, dict) or not all(isinstance(coin, bool) for coin in coins.values()):
            raise ValueError("no table of coins")
    except ValueError as error:
        raise ArtefactError(
            f"{path} is damaged: restore it from a backup, or remove it and audit no earlier run"
        ) from error
    return coins


def leave_out(folder: Path, patients: Sequence[Patient]) -> list[Patient]:
    """``patients``, those of the labelled training ones whose coin says so moved to the validation split.

    Guarantees: a patient's coin is thrown once, by the system's randomness, and kept: in every later run the
    same patients are left out. Nobody trains on the validation split.

    Raises:
        ArtefactError: the coins cannot be read.
        DiskFault: or written.
    """
    coins = read_coins(folder)
    train = [patient for patient in patients if patient.split is Split.train and patient.labelled]
    new = {patient.id: bool(secrets.randbits(1)) for patient in train if patient.id not in coins}
    if new:
        coins |= new
        write_atomic(folder / HOLDOUT, json.dumps(coins, indent=1, sort_keys=True).encode())
    out = {patient.id for patient in train if not coins[patient.id]}
    return [replace(patient, split=Split.val) if patient.id in out else patient for patient in patients]


def with_holdout(said: SiteFile, holdout: Holdout) -> SiteFile:
    """``said`` of a site with ``holdout``: where coins leave out about half, half as many are declared."""
    if holdout is Holdout.none:
        return said
    declared = None if said.patients is None else max(1, said.patients // 2)
    return replace(said, holdout=holdout, patients=declared)
