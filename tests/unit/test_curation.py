"""Copies are found, chance is not called a copy, and what the tests say is no more than they know."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from client.curation import copies
from client.curation.consistency import Curated
from client.curation.copies import (
    CopyTest,
    Limits,
    Nearness,
    at_least,
    clique,
    copied_by_any,
    covered_patients,
    distances,
    upper_coverage,
)
from client.curation.encodings import dihedral_views, encode_pixels, encoders, standardised, tiles_of
from client.curation.gate import FOUND_NOTHING, Findings, Verdict, examine
from client.curation.learnability import keep_learnable, learnability
from client.curation.memorising import Conditions, attack
from client.curation.quarantine import (
    FINDINGS,
    QUARANTINE,
    SHEET,
    Screened,
    keep_quarantine,
    screen,
    told_counts,
)
from client.curation.sheet import WARNING
from client.painters import SyntheticSet
from client.patients import Patient, Sample, Split
from client.students import build_student
from client.transfer.gallery import read_synthetic, save_synthetic
from client.transfer.sets import TransferSet
from common.errors import ArtefactError
from common.plan import RunPlan
from common.recipe import GeneratorScope, PolicyConfig
from common.seeding import derive_rng

SIDE = 32
Grey = Sequence[Tensor]


def person(name: str, split: Split, *images: Tensor) -> Patient:
    samples = [
        Sample(image, (image[:1] > 0.5).to(torch.uint8), torch.ones(image.shape[1:], dtype=torch.bool))
        for image in images
    ]
    return Patient(name, split, tuple(samples))


def texture(*path: str | int, side: int = SIDE) -> Tensor:
    """(3, side, side) blotches that no other path has."""
    rng = derive_rng(7, *path)
    coarse = torch.from_numpy(rng.random((1, 1, side // 4, side // 4))).float()
    fine = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    return fine[0].clamp(0, 1).expand(3, -1, -1).contiguous()


def people(split: Split, count: int) -> list[Patient]:
    return [person(f"{split}-{n}", split, texture(split, n)) for n in range(count)]


@pytest.fixture(scope="module")
def local_plan(smoke_plan: RunPlan) -> RunPlan:
    generator = replace(smoke_plan.generator, scope=GeneratorScope.local)
    return replace(smoke_plan, data=replace(smoke_plan.data, image_size=SIDE), generator=generator)


@pytest.fixture(scope="module")
def hospital() -> list[Patient]:
    return [*people(Split.train, 12), *people(Split.val, 20)]


def copy_of(patient: Patient, view: int, seed: int = 0) -> Tensor:
    turned = dihedral_views(patient.samples[0].image[None])[0, view]
    noise = torch.randn(turned.shape, generator=torch.Generator().manual_seed(seed))
    return (turned + 0.05 * noise).clamp(0, 1)


# --- distances ----------------------------------------------------------------------------------------


def by_hand(images: Tensor, patients: Sequence[Patient]) -> list[list[float]]:
    """A plain double loop over images, patients, tiles and ways to lie."""

    def row(image: Tensor) -> np.ndarray:
        values = image.double().flatten().numpy()
        values = values - values.mean()
        return values / np.linalg.norm(values)

    table = []
    for image in images:
        line = []
        for patient in patients:
            found = math.inf
            for sample in patient.samples:
                for tile in tiles_of(sample.image, SIDE):
                    for mirrored in (tile, tile.flip(2)):
                        for turn in range(4):
                            apart = row(image) - row(mirrored.rot90(turn, (1, 2)))
                            found = min(found, float(np.linalg.norm(apart)))
            line.append(found)
        table.append(line)
    return table


def test_distances_are_those_of_a_plain_double_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "REAL_AT_ONCE", 3)  # chunks that end in the middle of a patient
    monkeypatch.setattr(copies, "IMAGES_AT_ONCE", 2)
    large = texture("large", side=48)
    patients = [
        person("a", Split.train, texture("a"), texture("b")),
        person("b", Split.train, large),
        person("c", Split.train, texture("c")),
    ]
    images = torch.stack([texture("x"), texture("y"), texture("c").flip(2), large[:, 16:, 16:], texture("z")])
    found = distances(images, patients, encode_pixels)
    np.testing.assert_allclose(found.numpy(), by_hand(images, patients), atol=2e-3)
    assert found[2].argmin() == 2
    assert found[3].argmin() == 1
    assert float(found[2, 2]) < 2e-3


def test_the_eight_views_are_all_and_different() -> None:
    views = dihedral_views(texture("v")[None])[0]
    assert len({view.numpy().tobytes() for view in views}) == 8
    again = dihedral_views(views[5][None])[0]
    assert {view.numpy().tobytes() for view in again} == {view.numpy().tobytes() for view in views}


@pytest.mark.parametrize(("height", "width", "tiles"), [(32, 32, 1), (48, 32, 2), (80, 64, 12), (20, 24, 1)])
def test_tiles_cover_an_image_whatever_its_size(height: int, width: int, tiles: int) -> None:
    places = torch.arange(1.0, height * width + 1).view(1, height, width)
    found = list(tiles_of(places, SIDE))
    assert len(found) == tiles
    assert all(tile.shape == (1, SIDE, SIDE) for tile in found)
    assert set(torch.cat([tile.flatten() for tile in found]).tolist()) - {0.0} == set(
        places.flatten().tolist()
    )


def test_brightness_and_contrast_do_not_hide_a_copy_and_a_blank_image_is_nobodys() -> None:
    rows = standardised(
        torch.stack([texture("q"), texture("q") * 0.3 + 0.4, torch.full((3, SIDE, SIDE), 0.5)]).flatten(1)
    )
    assert float((rows[0] - rows[1]).norm()) < 1e-3
    assert float(rows[2].norm()) == 0


# --- what is near, and what a copy --------------------------------------------------------------------


def test_the_limits_are_the_holdouts_own_smallest_values() -> None:
    few = Nearness.of(torch.rand(50, 30, generator=torch.Generator().manual_seed(0)))
    limits = Limits.of(few)
    assert (limits.tau, limits.null_rate) == (float(few.distance.min()), 1 / 51)
    many = Nearness.of(torch.rand(399, 30, generator=torch.Generator().manual_seed(0)))
    limits = Limits.of(many)
    assert limits.tau == float(many.distance.sort().values[3])  # the fourth of 400 places: one percent
    assert limits.null_rate == 4 / 400
    assert limits.ratio <= 1


def test_a_neighbourhood_of_two_makes_no_copy() -> None:
    found = Nearness.of(torch.tensor([[0.0, 1.0], [0.5, 0.1]]))
    assert found.patient.tolist() == [0, 1]
    assert found.ratio.isinf().all()


def test_planted_copies_are_found_with_their_patients_and_nothing_else_is(
    hospital: list[Patient], local_plan: RunPlan
) -> None:
    whose = [1, 4, 9]
    planted = torch.stack([copy_of(hospital[place], view) for view, place in enumerate(whose, start=1)])
    others = torch.stack([texture("new", n) for n in range(30)])
    found = examine(torch.cat([others[:10], planted, others[10:]]), hospital, local_plan)
    assert found is not None
    assert torch.nonzero(found.copied).flatten().tolist() == [10, 11, 12]
    assert found.covered == 3
    assert covered_patients(found.found) == set(whose)
    assert found.coverage_limit > 0.5  # three of twelve may well be more than half
    assert set(found.found) == {"pixels", "public encoder"}


def test_a_patient_with_many_images_alike_is_one_neighbour(local_plan: RunPlan) -> None:
    """By images the neighbourhood of a copy would be as near as the copy."""
    base = texture("many")
    alike = [
        (base + 0.02 * torch.randn(base.shape, generator=torch.Generator().manual_seed(n))).clamp(0, 1)
        for n in range(12)
    ]
    train = [person("many", Split.train, *alike), *people(Split.train, 11)]
    test = CopyTest(train, people(Split.val, 20), {"pixels": encode_pixels}, SIDE)
    found = test.examine(base[None])
    assert copied_by_any(found).tolist() == [True]


def test_images_of_others_are_hardly_ever_copies(hospital: list[Patient], local_plan: RunPlan) -> None:
    train, holdout = hospital[:12], hospital[12:]
    test = CopyTest(train, holdout, encoders(local_plan), SIDE)
    fresh = torch.stack([texture("fresh", n) for n in range(100)])
    assert float(copied_by_any(test.examine(fresh)).float().mean()) <= 0.02


def test_nobody_to_compare_with_is_no_test(hospital: list[Patient], local_plan: RunPlan) -> None:
    images = texture("x")[None]
    assert examine(images, hospital[:12], local_plan) is None
    assert examine(images[:0], hospital, local_plan) is None
    with pytest.raises(ValueError, match="and others"):
        CopyTest(hospital[:12], [], {"pixels": encode_pixels}, SIDE)


def test_the_binomial_tail_is_exact() -> None:
    for successes, trials, chance in ((0, 10, 0.1), (1, 10, 0.1), (7, 400, 0.01), (10, 10, 0.5)):
        assert at_least(successes, trials, chance) == pytest.approx(binom.sf(successes - 1, trials, chance))


def test_no_copy_leaves_three_in_n_and_copies_leave_more() -> None:
    assert upper_coverage(0, 100) == 0.03
    assert upper_coverage(0, 2) == 1.0
    for covered, patients in ((1, 100), (5, 20), (20, 20)):
        limit = upper_coverage(covered, patients)
        assert binom.cdf(covered, patients, limit) == pytest.approx(0.05 if covered < patients else 1.0)


def test_a_clique_is_found_and_a_chain_is_none() -> None:
    same = texture("same")
    noise = [0.01 * torch.randn(same.shape, generator=torch.Generator().manual_seed(n)) for n in range(6)]
    mixed = torch.stack([*(same + one for one in noise), *(texture("other", n) for n in range(5))])
    assert clique(mixed, 0.3, encode_pixels) == 6
    assert clique(mixed[6:], 0.3, encode_pixels) == 1
    assert clique(mixed[:0], 0.3, encode_pixels) == 0
    first, second = (standardised(texture(name).flatten()[None])[0] for name in ("one end", "the other"))
    angles = torch.tensor([0.0, 0.4, 0.8, 1.2])
    chain = angles.cos()[:, None] * first + angles.sin()[:, None] * second  # each near the next alone
    assert clique(chain.view(4, 3, SIDE, SIDE), 0.5, encode_pixels) == 2


# --- what it adds up to -------------------------------------------------------------------------------


def membership(apart: float, members: int = 40):
    rng = np.random.default_rng(0)
    inside = [True] * members + [False] * members
    before = torch.zeros(2 * members)
    after = torch.from_numpy(rng.normal(0, 1, 2 * members) - apart * np.array(inside)).float()
    blank = torch.zeros(1)
    return attack(Conditions(blank, blank, blank, blank, inside), before, after, "ab" * 32)


def test_a_verdict_is_never_more_than_that_nothing_was_found(
    hospital: list[Patient], local_plan: RunPlan
) -> None:
    clean = examine(torch.stack([texture("new", n) for n in range(20)]), hospital, local_plan)
    copied = examine(copy_of(hospital[0], 3)[None], hospital, local_plan)
    said = {
        Verdict.found_nothing: Findings(clean, membership(0.0), trained=True),
        Verdict.not_tested: Findings(clean, None, trained=True, why="no generator"),
        Verdict.not_applicable: Findings(None, None, trained=False),
    }
    for verdict, findings in said.items():
        assert findings.verdict is verdict
        assert findings.reasons == []
    assert Findings(copied, None, trained=False).verdict is Verdict.blocked  # by chance or not: it stays
    assert Findings(clean, membership(2.0), trained=True).reasons == [
        "the generator tells whom it was trained on"
    ]
    text = "\n".join(said[Verdict.found_nothing].lines())
    assert f"{FOUND_NOTHING} (that is all it says)" in text
    assert "at most 25.0% of patients" in text  # three of twelve
    assert "not measurable with 40 others" in text
    for word in ("safe", "anonymous", "private", "guarantee"):
        assert word not in text.lower()


# --- the attack on a generator ------------------------------------------------------------------------


def test_the_attack_sees_each_patient_once_and_the_same_draws(hospital: list[Patient]) -> None:
    from common.generator import shipped_generator

    network = shipped_generator("ward-diffusion-tiny").eval()
    seen = Conditions.of(hospital[:2], hospital[12:15], SIDE)
    assert seen.inside == [True, True, False, False, False]
    first, again = seen.log_losses(network, 3), seen.log_losses(network, 3)
    assert torch.equal(first, again)
    assert len(first) == 5
    assert not torch.equal(first, seen.log_losses(network, 4))
    nothing_learned = attack(seen, first, again, "ab" * 32)
    assert nothing_learned.auc.value == 0.5


# --- quarantine ---------------------------------------------------------------------------------------


def painted(images: Tensor) -> SyntheticSet:
    return SyntheticSet(images, (images[:, :1] > 0.5).float())


def test_copies_leave_the_set_and_a_sheet_stays(
    hospital: list[Patient], local_plan: RunPlan, tmp_path: Path
) -> None:
    images = torch.stack([texture("new", 0), copy_of(hospital[3], 2), texture("new", 1)])
    found = screen(painted(images), hospital, local_plan)
    assert torch.equal(found.kept.images, images[[0, 2]])
    assert torch.equal(found.removed.images, images[1:2])
    worst = found.pairs[0]
    assert worst.copied
    assert torch.equal(worst.synthetic, images[1])
    assert float((worst.real - images[1]).abs().mean()) < 0.1  # turned as it lies
    (tmp_path / QUARANTINE).mkdir()
    (tmp_path / QUARANTINE / "0007.png").write_bytes(b"of an earlier run")
    keep_quarantine(found, tmp_path)
    assert sorted(path.name for path in (tmp_path / QUARANTINE).iterdir()) == ["0000.png", FINDINGS, SHEET]
    page = (tmp_path / QUARANTINE / SHEET).read_text()
    assert WARNING in page
    assert page.count("<img") == 6
    assert "http" not in page.replace("http://www.w3.org", "")
    assert not any(patient.id in page for patient in hospital)


def test_a_generator_that_saw_nobody_is_not_tested(
    hospital: list[Patient], smoke_plan: RunPlan, tmp_path: Path
) -> None:
    copy = painted(copy_of(hospital[0], 1)[None])
    found = screen(copy, hospital, smoke_plan)
    assert found.examined is None
    assert found.kept is copy
    keep_quarantine(found, tmp_path)
    assert not (tmp_path / QUARANTINE).exists()


def curated(count: int) -> Curated:
    blank = torch.zeros(count, 3, SIDE, SIDE)
    return Curated(TransferSet(blank, blank, torch.ones(count, dtype=torch.bool)), count, 1)


def screened(hospital: list[Patient], plan: RunPlan, copied: int) -> Screened:
    images = [texture("new", n) for n in range(10)] + [copy_of(hospital[n], 1) for n in range(copied)]
    found = screen(painted(torch.stack(images)), hospital, plan)
    assert len(found.removed) == copied
    return found


def test_how_many_copies_there_are_is_told_where_it_is_of_enough_patients(
    hospital: list[Patient], local_plan: RunPlan
) -> None:
    policy = PolicyConfig(min_cell_patients=5)
    none, two, six = (screened(hospital, local_plan, copied) for copied in (0, 2, 6))
    told = told_counts(curated(10), six, local_plan, policy)
    assert (told.generated, told.kept, told.dropped_copy, told.copy_rate) == (16, 9, 6, 6 / 16)
    assert told_counts(curated(10), none, local_plan, policy).dropped_copy == 0
    withheld = told_counts(curated(10), two, local_plan, policy)
    assert (withheld.generated, withheld.kept, withheld.dropped_copy, withheld.copy_rate) == (
        12,
        11,
        None,
        None,
    )
    assert withheld.generated - withheld.kept - withheld.dropped_inconsistent == 0
    few = replace(policy, min_cell_patients=13)  # more than train
    private = replace(local_plan, privacy=replace(local_plan.privacy, noise_multiplier=1.0))
    for found in (none, six):
        assert told_counts(curated(10), found, local_plan, few).dropped_copy is None
        assert told_counts(curated(10), found, private, policy).dropped_copy is None
    assert told_counts(None, None, local_plan, policy).generated == 0


# --- the folder ---------------------------------------------------------------------------------------


def kept_set(images: Tensor) -> TransferSet:
    count = len(images)
    return TransferSet(images, (images[:, :1] > 0.5).float(), torch.ones(count, dtype=torch.bool))


def test_a_saved_set_comes_back_and_nothing_else_is_taken_for_it(local_plan: RunPlan, tmp_path: Path) -> None:
    images = torch.stack([texture("kept", n) for n in range(3)])
    save_synthetic(kept_set(images), tmp_path, local_plan)
    save_synthetic(kept_set(images[:2]), tmp_path, local_plan)  # fewer than before: the third goes
    saved = read_synthetic(tmp_path, local_plan)
    assert saved.images.shape == (2, 3, SIDE, SIDE)
    assert float((saved.images - images[:2]).abs().max()) <= 0.5 / 255 + 1e-6
    assert sorted(saved.files) == ["0000.png", "0000_mask.png", "0001.png", "0001_mask.png"]
    with pytest.raises(ArtefactError, match="another run"):
        read_synthetic(tmp_path, replace(local_plan, run_id="other"))
    (tmp_path / "0000.png").write_bytes((tmp_path / "0001.png").read_bytes())
    (tmp_path / "0001_mask.png").unlink()
    (tmp_path / "patient.png").write_bytes(b"slipped in")
    with pytest.raises(ArtefactError) as caught:
        read_synthetic(tmp_path, local_plan)
    assert caught.value.faults == (
        "patient.png: not of this run", "0001_mask.png: missing", "0000.png: changed since"
    )  # fmt: skip
    with pytest.raises(ArtefactError, match="no synthetic images"):
        read_synthetic(tmp_path / "nowhere", local_plan)


# --- learnability -------------------------------------------------------------------------------------


def labelled(logits: Tensor, masks: Tensor, synthetic: list[bool]) -> TransferSet:
    count = len(logits)
    images = torch.stack([texture("learn", n) for n in range(count)])
    return TransferSet(
        images, masks, torch.tensor(synthetic), logits, torch.zeros(count, 1), torch.zeros(count, 1)
    )


def test_most_is_learned_where_the_teacher_is_right_and_the_student_is_not(local_plan: RunPlan) -> None:
    student = build_student("unet-xs", local_plan.data, True, 0)
    with torch.no_grad():
        own = student.eval()(torch.stack([texture("learn", n) for n in range(4)]))
    masks = (own > 0).float()
    masks[1] = 1 - masks[1]  # the teacher is right, the student wrong
    masks[3] = 1 - masks[3]  # real
    logits = (masks * 2 - 1) * 6
    logits[2] = -logits[2]  # the teacher is wrong
    logits[0] = own[0]  # both say the same
    images = labelled(logits, masks, [True, True, True, False])
    scores = learnability(images, student, False)
    assert int(scores[:3].argmax()) == 1
    start = Curated(images, 4, 1)
    kept = keep_learnable(start, student, 0.34, False)
    assert torch.equal(kept.transfer.images, images.images[[1, 3]])
    assert (kept.generated, kept.dropped_inconsistent, kept.passed_over, kept.kept) == (4, 1, 2, 1)
    assert keep_learnable(start, student, 1.0, False) is start
    assert torch.equal(scores, learnability(images, student, False))
    unlabelled = Curated(replace(images, logits=None), 4, 1)
    assert keep_learnable(unlabelled, student, 0.34, False) is unlabelled


def test_of_equal_scores_the_earlier_image_stays(local_plan: RunPlan) -> None:
    student = build_student("unet-xs", local_plan.data, True, 0)
    one = torch.zeros(1, 1, SIDE, SIDE)
    images = labelled(one.expand(4, -1, -1, -1).clone(), one.expand(4, -1, -1, -1), [True] * 4)
    images = replace(images, images=images.images[:1].expand(4, -1, -1, -1))
    keep = keep_learnable(Curated(images, 4, 0), student, 0.5, False)
    assert keep.kept == 2
    assert keep_learnable(Curated(images, 4, 0), student, 0.01, False).kept == 1
