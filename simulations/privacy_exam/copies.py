"""Item 30: copies of patients among synthetic images are found, and a generator that learned them by heart.

Of one made-up hospital. Copies are planted as they might come out of a generator: turned, mirrored and with
noise on them. Beside that two generators are put before the gate: the shipped one, trained whole on few
patients for far too long, and its adapter, trained as a recipe has it by default.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from client.curation.copies import CopyTest, copied_by_any
from client.curation.encodings import dihedral_views, encoders
from client.curation.gate import Findings, Verdict, examine, sides
from client.curation.memorising import Conditions, attack
from client.data import load_patients
from client.deadline import Deadline
from client.fitting import Schedule, fit
from client.generation import fine_tune, synthesise
from client.patients import Patient, Split
from client.style import summarise_style
from common.adapter import Adapter
from common.config import load_recipe
from common.generator import (
    ResidentGenerator,
    StyleDiffusion,
    diffusion_loss,
    initial_adapter,
    resident_generator,
    shipped_generator,
)
from common.plan import RunPlan
from common.recipe import Anatomy, GeneratorConfig, GeneratorScope
from common.seeding import derive_rng
from server.planning import build_plan
from simulations.phantoms import write_site
from simulations.privacy_exam.verdict import Verdict as Outcome

SIDE = 32  # pixels: the smallest that the teacher takes, and the cheapest to learn by heart
NOISE = 0.05  # standard deviation on a planted copy, of the full range
FALSE_COPIES = 0.02  # the most, of images of patients whom nobody was trained on
BATCH, RATE = 8, 2e-3  # of the training that goes on for too long
SHOWN = 100  # images of each generator that the gate looks at


@dataclass(frozen=True)
class Counts:
    """How large the exam is.

    Attributes:
        patients: trained on; as many more are the holdout, and as many again have no part in the test.
        images, planted: synthetic ones, those that are copies among them.
        remembered, steps: patients whom the over-trained generator sees, and for how long.
    """

    patients: int = 100
    images: int = 1000
    planted: int = 5
    remembered: int = 20
    steps: int = 600


@dataclass(frozen=True)
class Hospital:
    """Of ``patients`` a third trains a generator, a third is held out, a third has no part in the test."""

    plan: RunPlan
    patients: list[Patient]

    @classmethod
    def draw(cls, folder: Path, each: int, images: int, seed: int) -> Hospital:
        """Thrice ``each`` patients of one image, below ``folder``; plans make ``images`` synthetic ones."""
        recipe = load_recipe("smoke", [f"data.image_size={SIDE}"])
        generator = GeneratorConfig(scope=GeneratorScope.local, images=images)  # a recipe's defaults
        base = recipe.sites[0].phantom
        assert base is not None
        scanner = replace(base.scanner, contrast=0.3, noise=0.05, speckle=0.35, bright_objects=False)
        phantom = replace(
            base, anatomy=Anatomy.lesions, train_patients=each, val_patients=each, test_patients=each,
            images_per_patient=1, image_size=SIDE, object_size=[0.1, 0.3], scanner=scanner,
        )  # fmt: skip
        plan = build_plan(replace(recipe, generator=generator), f"exam-{seed}")
        return cls(plan, load_patients(write_site(phantom, folder, seed, "exam"), plan.data, seed))

    @property
    def in_the_test(self) -> list[Patient]:
        return [patient for patient in self.patients if patient.split is not Split.test]

    @property
    def nobodys(self) -> Tensor:
        return pictures([patient for patient in self.patients if patient.split is Split.test])

    def with_fewer(self, trained: int) -> list[Patient]:
        """Those of the test, of whom only the first ``trained`` train."""
        train, holdout = sides(self.in_the_test)
        return [*train[:trained], *holdout]


class WholeNetwork:
    """A generator without slots, where one with them is asked for."""

    def __init__(self, network: StyleDiffusion) -> None:
        self.network = network

    @contextmanager
    def visit(self, _: Adapter) -> Iterator[StyleDiffusion]:
        yield self.network


def item_30(counts: Counts) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        hospital = Hospital.draw(Path(folder), counts.patients, counts.images, 0)
    start = initial_adapter(hospital.plan.generator, 0)
    resident = resident_generator(hospital.plan.generator.name, hospital.plan.generator.rank)
    found, others = planted_found(hospital, painted(resident, start, hospital, hospital.in_the_test), counts)
    false = false_copies(hospital)
    over = over_trained(hospital, counts)
    proper = properly_trained(hospital)
    figure = (
        f"{found} of {counts.planted} planted found, {others} of the other {counts.images - counts.planted} "
        f"called copies; false on nobody's {false:.1%}; over-trained: {verdict_in_words(over)}; "
        f"by default: {verdict_in_words(proper)}"
    )
    passed = found == counts.planted and false <= FALSE_COPIES
    passed = passed and over.verdict is Verdict.blocked and proper.verdict is Verdict.found_nothing
    asked = f"copies of {counts.patients} patients among {counts.images} images; two generators"
    return Outcome("30", asked, figure, "all; <= 2 %; blocked; not blocked", passed)


def planted_found(hospital: Hospital, images: Tensor, counts: Counts) -> tuple[int, int]:
    """How many of the copies planted among ``images`` are found, and how many others are called copies."""
    train, _ = sides(hospital.in_the_test)
    rng = derive_rng(0, "planted")
    draw = torch.Generator().manual_seed(0)
    places = rng.choice(len(images), counts.planted, replace=False).tolist()
    views = dihedral_views(pictures(train))
    mixed = images.clone()
    for place, whose in zip(places, rng.choice(len(train), counts.planted, replace=False), strict=True):
        copy = views[whose, int(rng.integers(1, views.shape[1]))]
        mixed[place] = (copy + NOISE * torch.randn(copy.shape, generator=draw)).clamp(0, 1)
    examined = examine(mixed, hospital.in_the_test, hospital.plan)
    assert examined is not None, "a third of the patients is held out"
    found = int(examined.copied[places].sum())
    return found, int(examined.copied.sum()) - found


def false_copies(hospital: Hospital) -> float:
    """The share of images called copies of patients who have no part in anything."""
    train, holdout = sides(hospital.in_the_test)
    test = CopyTest(train, holdout, encoders(hospital.plan), SIDE)
    return float(copied_by_any(test.examine(hospital.nobodys)).float().mean())


def over_trained(hospital: Hospital, counts: Counts) -> Findings:
    """The whole network, shown few patients until it knows them by heart."""
    patients = hospital.with_fewer(counts.remembered)
    seen = Conditions.of(*sides(patients), SIDE)
    own = torch.tensor(seen.inside)[seen.owners]
    given = (seen.images[own], seen.masks[own], seen.styles[own])
    network = shipped_generator(hospital.plan.generator.name)
    draw = torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        rows = torch.randint(len(given[0]), (BATCH,), generator=draw)
        return diffusion_loss(network, *(part[rows] for part in given), draw)

    fit(list(network.parameters()), Schedule(RATE, counts.steps), loss, Deadline(1e9), "learning by heart")
    network.eval()
    before = shipped_generator(hospital.plan.generator.name).eval()
    losses = [seen.log_losses(one, 0) for one in (before, network)]
    start = initial_adapter(hospital.plan.generator, 0)
    images = painted(WholeNetwork(network), start, hospital, patients)[:SHOWN]
    return Findings(examine(images, patients, hospital.plan), attack(seen, *losses, digest=""), trained=True)


def properly_trained(hospital: Hospital) -> Findings:
    """The adapter, for as many steps as a recipe has without saying so."""
    patients, plan = hospital.in_the_test, hospital.plan
    train, _ = sides(patients)
    resident = resident_generator(plan.generator.name, plan.generator.rank)
    start = initial_adapter(plan.generator, 0)
    adapter = fine_tune(resident, start, train, plan, (0, 0), Deadline(1e9)).adapter
    seen = Conditions.of(*sides(patients), SIDE)
    losses = []
    for given in (start, adapter):
        with resident.visit(given) as network:
            losses.append(seen.log_losses(network, 0))
    images = painted(resident, adapter, hospital, patients)[:SHOWN]
    found = attack(seen, *losses, digest=adapter.digest)
    return Findings(examine(images, patients, plan), found, trained=True)


def painted(
    generator: ResidentGenerator | WholeNetwork,
    adapter: Adapter,
    hospital: Hospital,
    patients: Sequence[Patient],
) -> Tensor:
    """Images in the hospital's own style, as many as its plan says."""
    groups = hospital.plan.generator.style_groups
    style = summarise_style(sides(patients)[0], SIDE, groups, 1, 0)
    return synthesise(generator, adapter, [style], hospital.plan, 0).images


def pictures(patients: Sequence[Patient]) -> Tensor:
    return torch.stack([patient.samples[0].image for patient in patients])


def verdict_in_words(found: Findings) -> str:
    assert found.examined is not None
    assert found.attacked is not None
    area = found.attacked.auc
    return (
        f"{found.verdict} (coverage {found.examined.covered} of {found.examined.patients}, "
        f"AUC {area.value:.2f} [{area.low:.2f}, {area.high:.2f}])"
    )
