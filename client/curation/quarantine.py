"""Images that look like a patient's are taken out of the set before anything learns from them.

They go to ``quarantine/`` in the site's folder, with a sheet of the most alike pairs for the officer's own
eyes. What the server is told of it are counts, and not even those where they would speak of too few patients
or the run asks for privacy.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from client.curation.consistency import Curated
from client.curation.encodings import Encoder, dihedral_views, encoders, real_chunks
from client.curation.gate import Examined, examine, sides, trains_on_patients
from client.curation.sheet import Pair, sheet
from client.painters import SyntheticSet
from client.patients import Patient
from client.transfer.gallery import clear, png
from common.durable import write_atomic
from common.plan import RunPlan
from common.recipe import PolicyConfig

QUARANTINE = "quarantine"  # below the site's folder
SHEET, FINDINGS = "worst-pairs.html", "findings.json"
WORST = 12


@dataclass(frozen=True)
class Screened:
    """A synthetic set without copies.

    Attributes:
        kept, removed: of the images that came, in their order.
        examined: by which they were parted; None: no test ran, and all are kept.
        pairs: the most alike, the worst first; patients' images among them.
    """

    kept: SyntheticSet
    removed: SyntheticSet
    examined: Examined | None = None
    pairs: tuple[Pair, ...] = ()

    @classmethod
    def whole(cls, images: SyntheticSet) -> Screened:
        """``images`` that no test looked at."""
        nothing = SyntheticSet(images.images[:0], images.masks[:0], images.own_pixels)
        return cls(images, nothing)

    def may_tell(self, plan: RunPlan, policy: PolicyConfig) -> bool:
        """Whether the server may know how many images were removed.

        That says something of the patients who were copied. So it stays here in a run that asks for privacy,
        and where it is of fewer patients than the site's smallest cell; that none was copied is told if as
        many were trained on.
        """
        if self.examined is None or plan.privacy.asked or self.examined.patients < policy.min_cell_patients:
            return False
        return not 0 < self.examined.covered < policy.min_cell_patients


@dataclass(frozen=True)
class Told:
    """What the server learns of a site's synthetic images.

    Attributes:
        kept: of ``generated``; where the copies are withheld, they are among them.
        dropped_copy, copy_rate: None: no test ran, or they are withheld.
    """

    generated: int
    kept: int
    dropped_inconsistent: int
    dropped_copy: int | None = None
    copy_rate: float | None = None


def told_counts(
    curated: Curated | None, screened: Screened | None, plan: RunPlan, policy: PolicyConfig
) -> Told:
    """Of the set that the student learned from; all zeros without one.

    Guarantee: where copies are withheld, no other number changes with how many there were, but for those
    that the teacher would have dropped as inconsistent besides.
    """
    if curated is None or screened is None:
        return Told(0, 0, 0)
    removed = len(screened.removed)
    every = Told(curated.generated + removed, curated.kept + removed, curated.dropped_inconsistent)
    if not screened.may_tell(plan, policy):
        return every
    return replace(
        every, kept=curated.kept, dropped_copy=removed, copy_rate=removed / max(1, every.generated)
    )


def screen(images: SyntheticSet, patients: Sequence[Patient], plan: RunPlan) -> Screened:
    """Part ``images`` into what is like nobody and what is like a patient of the site.

    A generator that was never shown a patient has nothing to hand out: nothing is tested then.
    """
    examined = examine(images.images, patients, plan) if trains_on_patients(plan) else None
    if examined is None:
        return Screened.whole(images)
    copied = examined.copied
    kept, removed = (SyntheticSet(images.images[part], images.masks[part]) for part in (~copied, copied))
    return Screened(kept, removed, examined, tuple(worst_pairs(images.images, patients, plan, examined)))


def worst_pairs(images: Tensor, patients: Sequence[Patient], plan: RunPlan, examined: Examined) -> list[Pair]:
    """`WORST` images at most, those nearest to a training patient for what is usual, and that patient's."""
    train, _ = sides(patients)
    names = list(examined.found)
    near = torch.stack([one.nearness.distance / one.limits.tau for one in examined.found.values()])
    least, by = near.min(0)
    encode = encoders(plan)
    pairs = []
    for place in least.argsort(stable=True)[:WORST].tolist():
        name = names[int(by[place])]
        patient = train[int(examined.found[name].nearness.patient[place])]
        real = _nearest_view(images[place], patient, encode[name])
        pairs.append(Pair(images[place], real, float(least[place]), name, bool(examined.copied[place])))
    return pairs


def keep_quarantine(screened: Screened, folder: Path) -> None:
    """Write ``quarantine/`` below the site's ``folder``, if a test ran; what an earlier run left there goes.

    Raises ``DiskFault`` if the disk does not take it.
    """
    place = folder / QUARANTINE
    if place.exists():
        clear(place)
    if screened.examined is None:
        return
    for index, image in enumerate(screened.removed.images):
        write_atomic(place / f"{index:04d}.png", png(image), lasting=False)
    write_atomic(place / SHEET, sheet(screened.pairs).encode(), lasting=False)
    found = json.dumps(screened.examined.to_json(), indent=2) + "\n"
    write_atomic(place / FINDINGS, found.encode())


def _nearest_view(image: Tensor, patient: Patient, encode: Encoder) -> Tensor:
    """The tile of the patient, turned as it is nearest to ``image``."""
    row = encode(image[None])
    best, found = -2.0, image
    for tiles, _ in real_chunks([patient], image.shape[-1], 8):
        views = dihedral_views(tiles).flatten(0, 1)
        alike = (encode(views) @ row.T).flatten()
        if float(alike.max()) > best:
            best, found = float(alike.max()), views[int(alike.argmax())]
    return found
