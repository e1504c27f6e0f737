"""The release gate: may synthetic images leave this hospital? Asked by its own people, and no by default.

No plan has room for an image, so that none leaves with a run; whoever wants to take some out asks here. They
may go only if the officer's signed policy says so, of a generator that was trained with differential privacy,
or that was never shown a patient's image if the policy says that too. What tests find can only forbid: that
nothing was found is no proof that nothing is there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from client.audit import last_plan
from client.consent import signed_policy
from client.curation.gate import Findings, examine, sides, trains_on_patients
from client.curation.memorising import Conditions, attack
from client.egress import Parcel, Receipt, release_parcel
from client.painters import PAINTERS, painter_of
from client.patients import Patient
from client.site import Site
from client.transfer.gallery import GENERATOR_FILE, PROVENANCE, SYNTHETIC, SavedSet, read_synthetic
from common.adapter import Adapter
from common.errors import ArtefactError, DataError, PolicyRefusal, WardroundError
from common.generator import generator_of, initial_adapter
from common.plan import RunPlan, Stage
from common.privacy.entries import Context, Entry, EntryType, LedgerBroken
from common.privacy.journal import LEDGER, read_lines
from common.privacy.ledger import Ledger, system_clock
from common.privacy.ledger_commands import open_ledger
from common.privacy.membership import Membership
from common.privacy.policy import Policy, SyntheticRelease
from common.privacy.terms import Fault, check_in_force, refuse
from common.seeding import derive_seed

NAME = "synthetic.images"  # on the receipt


class Origin(StrEnum):
    """How the generator of a set came by what it knows of the site's patients."""

    own = "made of patients' own pixels"
    untrained = "never shown a patient's image"
    noised = "trained with differential privacy"
    trained = "trained on patients without differential privacy"


@dataclass(frozen=True)
class Checked:
    """A set that a site keeps, and what is to be said of it.

    Attributes:
        refusals: the policy's fields that keep it in, each with why; empty: it may leave.
    """

    origin: Origin
    saved: SavedSet
    findings: Findings
    refusals: list[Fault]


def check_set(site: Site, anyway: bool = False) -> Checked:
    """Examine the synthetic images that the site's last run left, and hold them against its policy.

    Args:
        anyway: look for copies even if the generator was never shown a patient.

    Raises:
        ArtefactError: there was no run, or its images are not as it left them.
        DataError: the patients cannot be read.
        LedgerBroken: the ledger is damaged.
    """
    plan = last_plan(site)
    saved = read_synthetic(site.folder / SYNTHETIC, plan)
    origin = origin_of(plan, _entries(site))
    findings = Findings(None, None, trains_on_patients(plan))
    if findings.trained or anyway:
        findings = _tested(site, plan, saved)
    return Checked(origin, saved, findings, [*_rule_faults(site, origin), *_test_faults(site, findings)])


def origin_of(plan: RunPlan, entries: Sequence[Entry]) -> Origin:
    """Of the generator of ``plan``'s run, as the site's ledger has it.

    Noised: steps of its stage were reserved with noise, and nothing of it left, or was reserved, without.
    """
    painter = painter_of(plan.generator.scope)
    if painter is not None and PAINTERS[painter].own_pixels:
        return Origin.own
    if not trains_on_patients(plan):
        return Origin.untrained
    own = [one for one in entries if (one.run_id, one.stage) == (plan.run_id, str(Stage.generator))]
    spent = [event for entry in own for event in entry.spent()]
    noised = bool(spent) and all(event.noise_multiplier > 0 for event in spent)
    return Origin.noised if noised else Origin.trained


def export_set(site: Site, to: Path) -> Receipt:
    """Let the set leave to the new folder ``to``; booked in the ledger as a release without noise.

    A set of an untrained generator is so too: its colours are the site's, and a teacher chose the images.
    What the policy forbids at once is refused before an image is opened.

    Raises:
        PolicyRefusal: with every field that says no.
        ArtefactError: there is no ledger to book it in, and what `check_set` and `release_parcel` raise.
        BudgetExceeded, LedgerBroken: as the ledger says.
    """
    plan = last_plan(site)
    ledger = open_ledger(site.folder) if (site.folder / LEDGER).exists() else None
    policy = signed_policy(site)
    context = Context(plan.run_id, plan.digest, "" if policy is None else policy.digest, plan.code_sha256)
    try:
        refuse(_rule_faults(site, origin_of(plan, _entries(site))))
        if policy is not None:
            check_in_force(policy, system_clock(), () if ledger is None else ledger.entries)
        checked = check_set(site)
        refuse(checked.refusals)
    except PolicyRefusal as refusal:
        _book_refusal(ledger, context, refusal)
        raise
    if ledger is None:
        raise ArtefactError(
            f"no ledger in {site.folder} to book it in: start one with `wardround privacy ledger new`"
        )
    patients = [patient.id for patient in sides(_patients(site, plan))[0]]
    return release_parcel(site, ledger, context, Parcel(NAME, _files(checked), patients), to)


def _tested(site: Site, plan: RunPlan, saved: SavedSet) -> Findings:
    patients = _patients(site, plan)
    examined = examine(saved.images, patients, plan)
    why = [] if examined is not None else ["copies: there is no image, or nobody was left out of training"]
    attacked = None
    if trains_on_patients(plan):
        try:
            attacked = _attacked(site, plan, saved, patients)
        except WardroundError as error:
            if not isinstance(error, (ArtefactError, DataError)):
                raise
            why.append(f"membership: {error.message}")
    return Findings(examined, attacked, trains_on_patients(plan), "; ".join(why))


def _attacked(site: Site, plan: RunPlan, saved: SavedSet, patients: Sequence[Patient]) -> Membership:
    """Raises ``ArtefactError`` if the painter of the set is not kept, ``DataError`` without others."""
    path = site.folder / GENERATOR_FILE
    adapter = Adapter.load(path)
    if adapter.digest != saved.provenance["generator_adapter_sha256"]:
        raise ArtefactError(f"{path} did not paint these images: run again")
    conditions = Conditions.of(*sides(patients), plan.data.image_size)
    generator = generator_of(plan.generator)
    seed = derive_seed(plan.seed, "synthetic", "attack")
    losses = []
    for given in (initial_adapter(plan.generator, plan.seed), adapter):
        with generator.visit(given) as network:
            losses.append(conditions.log_losses(network, seed))
    return attack(conditions, losses[0], losses[1], adapter.digest)


def _rule_faults(site: Site, origin: Origin) -> list[Fault]:
    """What the policy says before anything is opened."""
    policy, name = signed_policy(site), "synthetic.release"
    if policy is None:
        return [(name, "this site has no signed policy, and without one no synthetic image leaves")]
    rule = policy.synthetic.release
    if rule is SyntheticRelease.forbidden:
        return [(name, "no synthetic image may leave")]
    if origin is Origin.own:
        return [(name, f"these images are {origin}, and no policy lets them go")]
    if origin is Origin.trained:
        return [(name, f"the generator was {origin}")]
    if origin is Origin.untrained and rule is not SyntheticRelease.dp_or_untrained:
        return [(name, "the policy wants a generator that was trained with differential privacy")]
    return []


def _test_faults(site: Site, findings: Findings) -> list[Fault]:
    policy = signed_policy(site)
    faults = [("synthetic.release", reason) for reason in findings.reasons]
    if policy is not None and findings.trained:
        faults += _evidence_faults(policy, findings)
    return faults


def _evidence_faults(policy: Policy, findings: Findings) -> list[Fault]:
    """Of a trained generator, whose tests must have run, on enough others."""
    if findings.examined is None or findings.attacked is None:
        return [("synthetic.min_holdout", f"not tested: {findings.why}")]
    fewest = min(findings.examined.holdout, findings.attacked.others)
    if fewest < policy.synthetic.min_holdout:
        return [("synthetic.min_holdout", "too few patients were left out of training to test it")]
    return []


def _files(checked: Checked) -> dict[str, bytes]:
    """Images and masks, and what the world may know of where they come from: no count of patients."""
    told = {
        **{name: value for name, value in checked.saved.provenance.items() if name != "run_id"},
        "origin": str(checked.origin),
        "tests": str(checked.findings.verdict),
    }
    return {**checked.saved.files, PROVENANCE: (json.dumps(told, indent=2) + "\n").encode()}


def _book_refusal(ledger: Ledger | None, context: Context, refusal: PolicyRefusal) -> None:
    if ledger is not None:
        detail = {"code": refusal.border_code, "field": refusal.field}
        with suppress(PolicyRefusal, ArtefactError, LedgerBroken):
            ledger.record(EntryType.refuse, context, detail, SYNTHETIC)


def _patients(site: Site, plan: RunPlan) -> list[Patient]:
    return site.patients(plan.data, plan.seed)


def _entries(site: Site) -> list[Entry]:
    path = site.folder / LEDGER
    return read_lines(path.read_bytes()) if path.exists() else []
