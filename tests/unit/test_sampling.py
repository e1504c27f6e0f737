"""Patches: where they come from, and that the same seed gives the same ones."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.patients import Patient, Sample, Split
from client.sampling import PatchSampler, _dihedral
from common.errors import DataError

SIZE = 16


def sample(seed: int, shape: tuple[int, int] = (40, 56), labelled: bool = True, grey: bool = True) -> Sample:
    """A mask whose foreground is where the image is bright, so that a patch's two halves can be compared."""
    rng = np.random.default_rng(seed)
    mask = torch.from_numpy((rng.random((2, *shape)) < 0.02).astype(np.uint8))
    image = 0.2 + 0.5 * mask.amax(dim=0, keepdim=True).float().repeat(3, 1, 1)
    if not grey:
        image = image * torch.tensor([1.0, 0.7, 0.4])[:, None, None]
    return Sample(image, mask if labelled else None, torch.ones(shape, dtype=torch.bool))


def patients() -> list[Patient]:
    """Four labelled patients, the first with five images; two without a mask; one with both kinds."""
    found = [
        Patient(f"p{n}", Split.train, tuple(sample(10 * n + k) for k in range(5 if n == 0 else 1)))
        for n in range(4)
    ]
    found += [Patient(f"u{n}", Split.train, (sample(90 + n, labelled=False),)) for n in range(2)]
    return [*found, Patient("both", Split.train, (sample(7), sample(8, labelled=False)))]


def same(left: PatchSampler, right: PatchSampler) -> bool:
    one, two = left.batch(8), right.batch(8)
    return (
        one.index == two.index and torch.equal(one.images, two.images) and torch.equal(one.masks, two.masks)
    )


def test_shapes_and_ranges() -> None:
    batch = PatchSampler(patients(), SIZE, seed=1, labelled=None).batch(12)
    assert batch.images.shape == (12, 3, SIZE, SIZE)
    assert batch.masks.shape == (12, 2, SIZE, SIZE)
    assert batch.images.dtype == batch.masks.dtype == torch.float32
    assert batch.images.min() >= 0
    assert batch.images.max() <= 1
    assert set(batch.masks.unique().tolist()) <= {0.0, 1.0}
    everyone = patients()
    for (patient, number), labelled, mask in zip(batch.index, batch.labelled, batch.masks, strict=True):
        assert bool(labelled) == (everyone[patient].samples[number].mask is not None)
        assert labelled or mask.sum() == 0


def test_the_same_seed_gives_the_same_batches() -> None:
    first, second = (PatchSampler(patients(), SIZE, seed=5, labelled=None) for _ in range(2))
    assert same(first, second)
    second.crops(3)  # crops have a generator of their own
    assert same(first, second)
    assert not same(PatchSampler(patients(), SIZE, 5, None), PatchSampler(patients(), SIZE, 6, None))


def test_global_generators_do_not_matter() -> None:
    np.random.seed(0)
    torch.manual_seed(0)
    first = PatchSampler(patients(), SIZE, seed=5, labelled=None).batch(4)
    np.random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(first.images, PatchSampler(patients(), SIZE, seed=5, labelled=None).batch(4).images)


@pytest.mark.parametrize("labelled", [True, False])
def test_only_images_of_the_asked_kind_are_drawn(labelled: bool) -> None:
    everyone = patients()
    batch = PatchSampler(everyone, SIZE, seed=0, labelled=labelled).batch(60)
    assert set(batch.labelled.tolist()) == {labelled}
    assert all((everyone[p].samples[s].mask is not None) == labelled for p, s in batch.index)
    assert len({patient for patient, _ in batch.index}) == (5 if labelled else 3)


def test_no_image_of_the_asked_kind_is_an_error() -> None:
    with pytest.raises(DataError, match="no labelled image"):
        PatchSampler(patients()[4:6], SIZE, seed=0, labelled=True)
    with pytest.raises(DataError, match="no unlabelled image"):
        PatchSampler(patients()[:4], SIZE, seed=0, labelled=False)
    with pytest.raises(DataError, match="no image"):
        PatchSampler([], SIZE, seed=0, labelled=None)


def test_patients_are_drawn_uniformly_whatever_their_number_of_images() -> None:
    index = PatchSampler(patients()[:4], SIZE, seed=2, labelled=True).batch(800).index
    counts = Counter(patient for patient, _ in index)
    assert all(150 < counts[place] < 250 for place in range(4)), counts
    own = Counter(number for patient, number in index if patient == 0)
    assert set(own) == {0, 1, 2, 3, 4}


def test_image_and_mask_are_moved_together() -> None:
    batch = PatchSampler(patients(), SIZE, seed=3, labelled=True).batch(40)
    inside = batch.masks.amax(dim=1).bool()
    brightness = batch.images.mean(dim=1)
    assert inside.any()
    for patch, where in zip(brightness, inside, strict=True):
        if where.any() and (~where).any():
            assert patch[where].mean() > patch[~where].mean() + 0.2


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_the_eight_symmetries_are_different_and_keep_the_pixels(seed: int) -> None:
    tensor = torch.rand((2, 5, 5), generator=torch.Generator().manual_seed(seed))
    moved = [_dihedral([tensor], element)[0] for element in range(8)]
    assert all(torch.equal(m.flatten(1).sort().values, tensor.flatten(1).sort().values) for m in moved)
    assert all(not torch.equal(moved[a], moved[b]) for a in range(8) for b in range(a))


def test_grey_stays_grey_and_every_patch_is_changed() -> None:
    batch = PatchSampler(patients(), SIZE, seed=4, labelled=None).batch(20)
    assert torch.equal(batch.images[:, 0], batch.images[:, 1])
    assert torch.equal(batch.images[:, 0], batch.images[:, 2])
    plain = PatchSampler(patients(), SIZE, seed=4, labelled=None).crops(1)[0].image
    assert set(plain.unique().tolist()) <= {np.float32(0.2).item(), np.float32(0.7).item()}
    assert all(len(image.unique()) > 50 for image in batch.images)  # noise


def test_half_of_the_labelled_patches_have_foreground_at_their_centre() -> None:
    shape = (65, 65)
    mask = torch.zeros(1, *shape, dtype=torch.uint8)
    mask[0, 32, 32] = 1  # one pixel: almost never at the centre by chance
    lone = Patient(
        "p", Split.train, (Sample(torch.rand(3, *shape), mask, torch.ones(shape, dtype=torch.bool)),)
    )
    crops = PatchSampler([lone], SIZE, seed=0, labelled=True).crops(400)
    centred = sum(float(crop.mask[0, SIZE // 2, SIZE // 2]) for crop in crops if crop.mask is not None)
    assert 150 < centred < 250


def test_a_rare_class_is_centred_as_often_as_a_common_one() -> None:
    shape = (64, 64)
    mask = torch.zeros(2, *shape, dtype=torch.uint8)
    mask[0, 10:50, 10:50] = 1
    mask[1, 30, 30] = 1
    lone = Patient(
        "p", Split.train, (Sample(torch.rand(3, *shape), mask, torch.ones(shape, dtype=torch.bool)),)
    )
    crops = PatchSampler([lone], SIZE, seed=0, labelled=True).crops(400)
    centred = sum(float(crop.mask[1, SIZE // 2, SIZE // 2]) for crop in crops if crop.mask is not None)
    assert 60 < centred < 140  # half of the centred half


def with_valid(valid: torch.Tensor) -> Patient:
    image = torch.rand((3, *valid.shape), generator=torch.Generator().manual_seed(0)) * valid
    return Patient("p", Split.train, (Sample(image, None, valid),))


@pytest.mark.parametrize("shape", [(60, 90), (12, 40), (9, 11), (16, 16), (17, 5)])
def test_centres_are_valid(shape: tuple[int, int]) -> None:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    distance = ((rows - shape[0] / 2) / shape[0]) ** 2 + ((columns - shape[1] / 2) / shape[1]) ** 2
    valid = torch.from_numpy(distance < 0.2**2)
    marked = with_valid(valid)
    # The image carries its own validity, so that a patch shows where its centre lay.
    sampled = Patient("p", Split.train, (Sample(valid.float().repeat(3, 1, 1), None, valid),))
    for crop in PatchSampler([sampled], SIZE, seed=1, labelled=None).crops(80):
        assert crop.image.shape == (3, SIZE, SIZE)
        assert crop.image[0, SIZE // 2, SIZE // 2] == 1
    batch = PatchSampler([marked], SIZE, seed=1, labelled=None).batch(8)
    assert ((batch.images == 0).any(dim=1)).float().mean() > 0.01


def test_a_single_valid_pixel_near_the_border_is_in_the_patch() -> None:
    valid = torch.zeros(50, 50, dtype=torch.bool)
    valid[1, 48] = True
    only = Patient("p", Split.train, (Sample(valid.float().repeat(3, 1, 1), None, valid),))
    assert all(crop.image.max() == 1 for crop in PatchSampler([only], SIZE, 0, None).crops(5))


def test_augmentation_leaves_the_surround_black() -> None:
    valid = torch.zeros(40, 40, dtype=torch.bool)
    valid[10:30, 10:30] = True
    image = valid.float().repeat(3, 1, 1) * 0.6
    batch = PatchSampler([Patient("p", Split.train, (Sample(image, None, valid),))], SIZE, 0, None).batch(20)
    assert (batch.images == 0).any()
    outside = batch.images < 0.2
    assert (batch.images[outside] == 0).all()


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_any_image_size_gives_full_patches_with_its_own_pixels(height: int, width: int, seed: int) -> None:
    values = torch.arange(height * width).reshape(1, height, width).float().repeat(3, 1, 1) / (height * width)
    one = Patient("p", Split.train, (Sample(values, None, torch.ones(height, width, dtype=torch.bool)),))
    (crop,) = PatchSampler([one], SIZE, seed, None).crops(1)
    assert crop.image.shape == (3, SIZE, SIZE)
    assert torch.isin(crop.image, values).all()
    if height >= SIZE and width >= SIZE:
        assert len(crop.image[0].unique()) == SIZE * SIZE  # nothing reflected


def test_a_smaller_image_is_reflected() -> None:
    values = torch.arange(20.0).repeat(8, 1)[None].repeat(3, 1, 1) / 20  # 8 rows, 20 columns
    one = Patient("p", Split.train, (Sample(values, None, torch.ones(8, 20, dtype=torch.bool)),))
    for patient_shape, tensor in (((8, 20), values), ((20, 8), values.transpose(1, 2))):
        one = Patient("p", Split.train, (Sample(tensor, None, torch.ones(patient_shape, dtype=torch.bool)),))
        image = PatchSampler([one], SIZE, 0, None).crops(1)[0].image
        short = image if patient_shape[0] == 8 else image.transpose(1, 2)
        assert torch.equal(short[:, 3], short[:, 5])  # 4 rows above, 4 below: row 4 is the mirror
        assert (short[0, 0].diff() > 0).all()


def test_crops_are_the_same_at_every_call_and_a_prefix_of_more() -> None:
    sampler = PatchSampler(patients(), SIZE, seed=8, labelled=None)
    first = sampler.crops(6)
    sampler.batch(3)
    more = sampler.crops(20)
    again = PatchSampler(patients(), SIZE, seed=8, labelled=None).crops(20)
    assert [crop.id for crop in first] == [crop.id for crop in more[:6]]
    assert [crop.id for crop in more] == [crop.id for crop in again]
    assert all(torch.equal(one.image, two.image) for one, two in zip(more, again, strict=True))


def test_crops_are_pixels_of_the_place_that_their_id_names() -> None:
    everyone = patients()
    for crop in PatchSampler(everyone, SIZE, seed=8, labelled=None).crops(12):
        patient, number, row, column = map(int, crop.id.split("."))
        source = everyone[patient].samples[number]
        assert torch.equal(crop.image, source.image[:, row : row + SIZE, column : column + SIZE])
        assert (crop.mask is None) == (source.mask is None)
        if crop.mask is not None and source.mask is not None:
            assert torch.equal(crop.mask, source.mask[:, row : row + SIZE, column : column + SIZE].float())


def test_crops_cover_every_patient_before_any_comes_again() -> None:
    everyone = patients()
    ids = [crop.id.split(".") for crop in PatchSampler(everyone, SIZE, seed=8, labelled=None).crops(5 * 7)]
    for turn in range(5):
        assert {int(parts[0]) for parts in ids[7 * turn : 7 * turn + 7]} == set(range(7))
    assert {parts[1] for parts in ids if parts[0] == "0"} == {"0", "1", "2", "3", "4"}


def test_crops_share_no_memory_with_the_patients() -> None:
    everyone = patients()
    before = everyone[0].samples[0].image.clone()
    for crop in PatchSampler(everyone[:1], SIZE, seed=0, labelled=True).crops(5):
        crop.image.zero_()
    assert torch.equal(everyone[0].samples[0].image, before)
