"""Reading images: orientation, bit depths, resizing, field of view and stretch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin

from client.data import load_image, load_patients
from client.images import READERS, full_scale_of, read_image, read_mask
from client.patients import Split
from client.pixels import (
    MIN_RANGE,
    area_weights,
    field_of_view,
    percentile_stretch,
    resize,
)
from common.errors import DataError
from common.recipe import ClassConfig, DataConfig

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real image sets are not at {REAL}")
TWO = DataConfig(classes=[ClassConfig("body", 1, "region"), ClassConfig("spot", 2, "blob")])


def ramp(height: int = 10, width: int = 24) -> np.ndarray:
    """Rises with the column alone, so that a transposed image is noticed even where it is square."""
    return np.tile(np.linspace(0, 250, width), (height, 1)).astype(np.uint8)


def save(path: Path, pixels: np.ndarray, mode: str | None = None) -> Path:
    picture = Image.fromarray(pixels)
    (picture.convert(mode) if mode else picture).save(path)
    return path


def write_manifest(
    folder: Path, lines: list[str], header: str = "image,mask,patient,split,spacing_mm"
) -> Path:
    path = folder / "manifest.csv"
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".tif", ".tiff", ".PNG"])
def test_rows_stay_rows(tmp_path: Path, suffix: str) -> None:
    raster = read_image(save(tmp_path / f"a{suffix}", ramp()))
    assert raster.pixels.shape == (1, 10, 24)
    assert np.abs(raster.pixels[0] - ramp()).max() <= 3  # JPEG loses a little
    sample = load_image(tmp_path / f"a{suffix}", DataConfig())
    assert sample.image.shape == (3, 10, 24)
    assert (sample.image[0].diff(dim=1).mean(dim=0) > 0).float().mean() > 0.8
    assert sample.image[0].diff(dim=0).abs().max() < 0.05


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "CMYK"])
def test_every_colour_mode_becomes_three_channels(tmp_path: Path, mode: str) -> None:
    name = "a.tif" if mode == "CMYK" else "a.png"
    sample = load_image(save(tmp_path / name, ramp(), mode), DataConfig())
    assert sample.image.shape == (3, 10, 24)
    assert sample.image.dtype == torch.float32
    assert type(sample.image) is torch.Tensor  # no MONAI metadata: it would carry the file's name along
    assert sample.mask is None
    assert sample.valid.all()


def test_the_alpha_channel_is_dropped(tmp_path: Path) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (6, 9, 3)).astype(np.uint8)
    alpha = np.full((6, 9, 1), 7, np.uint8)
    with_alpha = read_image(save(tmp_path / "a.png", np.concatenate([colour, alpha], axis=2)))
    assert np.array_equal(with_alpha.pixels, colour.transpose(2, 0, 1))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_kept(tmp_path: Path, suffix: str) -> None:
    pixels = np.arange(240, dtype=np.uint16).reshape(10, 24) * 273
    raster = read_image(save(tmp_path / f"a{suffix}", pixels))
    assert np.array_equal(raster.pixels[0], pixels)
    assert raster.full_scale == 65535
    image = load_image(tmp_path / f"a{suffix}", DataConfig()).image
    assert len(image[0].unique()) > 200  # 8 bits of a 24-wide ramp would leave fewer steps


@pytest.mark.parametrize(
    ("largest", "white"), [(200, 255), (256, 1023), (4000, 4095), (4096, 16383), (60000, 65535)]
)
def test_full_scale_is_the_bit_depth_in_use(largest: int, white: float) -> None:
    assert full_scale_of(np.array([[[0, largest]]], np.int32)) == white


def test_full_scale_of_floats_is_their_largest_magnitude() -> None:
    assert full_scale_of(np.array([[[0.0, 0.25, -0.5, np.nan]]], np.float32)) == 0.5
    assert full_scale_of(np.zeros((1, 2, 2), np.float32)) == 1.0


def test_an_exif_rotation_is_applied(tmp_path: Path) -> None:
    picture = Image.fromarray(ramp())
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter for display
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").pixels.shape == (1, 24, 10)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("compression", [None, "tiff_deflate"])
def test_a_tiff_on_its_side_is_turned_upright(tmp_path: Path, kind: type, compression: str | None) -> None:
    """Pillow 13 mangles the uncompressed ones where it is given their name."""
    pixels = np.arange(12 * 20).reshape(12, 20).astype(kind)
    upright = {5: pixels.T, 6: np.rot90(pixels, -1), 7: pixels.T[::-1, ::-1], 8: np.rot90(pixels)}
    for orientation, expected in upright.items():
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[274] = orientation
        Image.fromarray(pixels).save(tmp_path / "a.tif", tiffinfo=tags, compression=compression)
        assert np.array_equal(read_image(tmp_path / "a.tif").pixels[0], expected)


def test_masks_of_any_mode_give_their_labels(tmp_path: Path) -> None:
    labels = np.zeros((6, 9), np.uint8)
    labels[1:3, 2:7] = 1
    labels[4, 5] = 2
    palette = Image.fromarray(labels)
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "palette.png")
    assert np.array_equal(read_mask(tmp_path / "palette.png"), labels)
    assert np.array_equal(read_mask(save(tmp_path / "rgb.png", labels, "RGB")), labels)
    assert np.array_equal(read_mask(save(tmp_path / "wide.png", labels.astype(np.uint16))), labels)
    black_and_white = read_mask(save(tmp_path / "bw.png", labels * 120, "1"))
    assert set(np.unique(black_and_white)) == {0, 255}
    colour = np.stack([labels, labels * 2, labels], axis=2)
    with pytest.raises(DataError, match="colour"):
        read_mask(save(tmp_path / "colour.png", colour))


def test_files_that_are_no_single_picture(tmp_path: Path) -> None:
    pages = [Image.fromarray(ramp()), Image.fromarray(ramp())]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "scan.bmp").write_bytes(b"BM")
    words = {
        "pages.tif": "2 pages",
        "broken.png": "cannot be read",
        "scan.bmp": "no reader",
        "gone.png": "exist",
    }
    for name, word in words.items():
        with pytest.raises(DataError, match=word):
            read_image(tmp_path / name)


def test_the_reader_table_is_the_list_of_formats() -> None:
    assert {".png", ".jpg", ".jpeg", ".tif", ".tiff"} <= set(READERS)


# --- resizing -------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 60))
def test_area_weights_share_each_pixel_out_once(stored: int, wanted: int) -> None:
    weights = area_weights(stored, wanted)
    assert torch.allclose(weights.sum(dim=1), torch.ones(wanted), atol=1e-5)
    assert torch.allclose(weights.sum(dim=0), torch.full((stored,), wanted / stored), atol=1e-4)


@settings(max_examples=30)
@given(st.integers(2, 20), st.integers(2, 20), st.integers(0, 9))
def test_shrinking_keeps_the_mean(height: int, width: int, seed: int) -> None:
    image = torch.rand((2, 20, 20), generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(resize(image, height, width).mean((1, 2)), image.mean((1, 2)), atol=1e-5)


def test_halving_is_the_mean_of_four_pixels() -> None:
    image = torch.arange(24.0).reshape(1, 4, 6)
    expected = image.reshape(1, 2, 2, 3, 2).mean(dim=(2, 4))
    assert torch.allclose(resize(image, 2, 3), expected, atol=1e-5)


def test_the_longest_side_rules_image_mask_and_spacing(tmp_path: Path) -> None:
    save(tmp_path / "a.png", ramp(20, 48))
    labels = np.zeros((20, 48), np.uint8)
    labels[:10] = 1  # even rows: the half-size mask is exact
    labels[10, ::2] = 2  # a quarter of each 2x2 block: lost
    save(tmp_path / "m.png", labels)
    lines = ["a.png,m.png,p,train,0.5x0.7", "a.png,m.png,q,test,"]
    data = DataConfig(longest_side=24, classes=TWO.classes)
    first, second = (
        patient.samples[0] for patient in load_patients(write_manifest(tmp_path, lines), data, 0)
    )
    assert first.image.shape == (3, 10, 24)
    assert first.mask is not None
    assert first.mask.shape == (2, 10, 24)
    assert torch.equal(first.mask[0, :5], torch.ones(5, 24, dtype=torch.uint8))
    assert first.mask[0, 5:].sum() == 0
    assert first.mask[1].sum() == 0
    assert first.spacing_mm == pytest.approx((1.0, 1.4))
    assert second.spacing_mm is None
    larger = load_patients(
        write_manifest(tmp_path, lines), DataConfig(longest_side=96, classes=TWO.classes), 0
    )
    grown = larger[0].samples[0]
    assert grown.mask is not None
    assert grown.image.shape == (3, 40, 96)
    assert grown.mask[0, :20].float().mean() > 0.97
    assert set(grown.mask.unique().tolist()) <= {0, 1}


# --- stretch --------------------------------------------------------------------------------------


def test_the_stretch_ends_at_its_percentiles() -> None:
    image = torch.linspace(0.2, 0.6, 10_000).reshape(1, 100, 100).repeat(3, 1, 1)
    stretched = percentile_stretch(image, torch.ones(100, 100, dtype=torch.bool))
    assert (stretched == 0).float().mean() == pytest.approx(0.005, abs=1e-3)
    assert (stretched == 1).float().mean() == pytest.approx(0.003, abs=1e-3)


def test_a_nearly_constant_channel_is_not_blown_up() -> None:
    noise = 0.5 + 0.001 * torch.randn((3, 40, 40), generator=torch.Generator().manual_seed(0))
    stretched = percentile_stretch(noise, torch.ones(40, 40, dtype=torch.bool))
    assert stretched.amax() - stretched.amin() < 0.01 / MIN_RANGE
    flat = percentile_stretch(torch.full((3, 4, 4), 0.7), torch.ones(4, 4, dtype=torch.bool))
    assert torch.equal(flat, torch.zeros(3, 4, 4))


@settings(max_examples=25)
@given(st.integers(0, 1000), st.sampled_from([None, 13, 40]))
def test_a_grey_image_stays_exactly_grey(
    tmp_path_factory: pytest.TempPathFactory, seed: int, side: int | None
) -> None:
    folder = tmp_path_factory.mktemp("grey")
    pixels = np.random.default_rng(seed).integers(0, 256, (17, 31)).astype(np.uint8)
    image = load_image(save(folder / "a.png", pixels, "RGB"), DataConfig(longest_side=side)).image
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])
    assert image.min() >= 0
    assert image.max() <= 1


# --- field of view --------------------------------------------------------------------------------


def disc(height: int = 180, width: int = 270) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.mgrid[:height, :width]
    inside = (rows - height / 2) ** 2 + (columns - width / 2) ** 2 < (0.46 * height) ** 2
    noise = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    tissue = np.where(inside[..., None], np.array([150, 80, 40]), np.array([6, 5, 4])) + noise
    tissue[80:90, 130:140] = 5  # a black spot in the tissue stays part of the field
    return np.clip(tissue, 0, 255).astype(np.uint8), inside


def test_the_field_of_view_is_found_and_the_rest_is_black(tmp_path: Path) -> None:
    pixels, inside = disc()
    sample = load_image(save(tmp_path / "a.png", pixels), DataConfig(field_of_view=True))
    valid = sample.valid.numpy()
    assert (valid & inside).sum() / (valid | inside).sum() > 0.95
    assert valid[80:90, 130:140].all()
    assert (sample.image[:, ~sample.valid] == 0).all()
    # The stretch looks at tissue alone: its darkest tissue is near 0 although the surround is darker still.
    assert sample.image[:, sample.valid].mean() > 0.3


def test_without_a_dark_surround_everything_is_valid() -> None:
    image = 0.4 + 0.5 * torch.rand((3, 40, 60), generator=torch.Generator().manual_seed(0))
    assert field_of_view(image).all()
    assert field_of_view(torch.zeros(3, 8, 8)).all()
    lamp = torch.zeros(3, 60, 60)
    lamp[:, 2:8, 2:8] = 1.0  # a small bright spot is no field of view
    assert field_of_view(lamp).all()


def test_the_field_of_view_is_off_by_default(tmp_path: Path) -> None:
    assert load_image(save(tmp_path / "a.png", disc()[0]), DataConfig()).valid.all()


@needs_real
@pytest.mark.parametrize(("name", "floor"), [("HRF", 0.99), ("CHASE_DB1", 0.98)])
def test_the_field_of_view_of_real_photographs(name: str, floor: float) -> None:
    data = DataConfig(longest_side=384, field_of_view=True)
    for image in sorted((REAL / name / "images").iterdir())[:6]:
        valid = load_image(image, data).valid.numpy()
        published = Image.open(REAL / name / "fov" / f"{image.stem}.png").resize(valid.shape[::-1])
        inside = np.asarray(published) > 127
        assert (valid & inside).sum() / (valid | inside).sum() > floor, image.name


# --- patients -------------------------------------------------------------------------------------


def cohort(folder: Path, patients: int, labelled: Callable[[int], bool] = lambda _: True) -> Path:
    lines = []
    for number in range(patients):
        for eye in "LR":
            pixels = np.random.default_rng([number, ord(eye)]).integers(0, 256, (12, 18)).astype(np.uint8)
            save(folder / f"{number}{eye}.png", pixels)
            save(folder / f"{number}{eye}_m.png", (pixels > 128).astype(np.uint8))
            lines.append(f"{number}{eye}.png,{f'{number}{eye}_m.png' if labelled(number) else ''},p{number}")
    return write_manifest(folder, lines, "image,mask,patient")


def test_patients_keep_their_images_together(tmp_path: Path) -> None:
    patients = load_patients(cohort(tmp_path, 8), TWO, seed=3)
    assert [patient.id for patient in patients] == [f"p{number}" for number in range(8)]
    assert all(len(patient.samples) == 2 for patient in patients)
    sizes = [sum(patient.split == split for patient in patients) for split in Split]
    assert sizes == [5, 1, 2]


def test_the_automatic_split_is_seeded(tmp_path: Path) -> None:
    path = cohort(tmp_path, 8)
    deals = {tuple(patient.split for patient in load_patients(path, TWO, seed)) for seed in (0, 0, 1, 2, 3)}
    assert 1 < len(deals) <= 4


def test_a_given_split_is_kept(tmp_path: Path) -> None:
    save(tmp_path / "a.png", ramp())
    path = write_manifest(tmp_path, ["a.png,,p,test,", "a.png,,q,val,"])
    assert [patient.split for patient in load_patients(path, TWO, 0)] == [Split.test, Split.val]


def test_train_and_test_have_a_labelled_patient(tmp_path: Path) -> None:
    patients = load_patients(cohort(tmp_path, 9, labelled=lambda number: number in (2, 6)), TWO, seed=0)
    assert {patient.split for patient in patients if patient.labelled} == {Split.train, Split.test}
    assert all(patient.split == Split.train for patient in patients if not patient.labelled)
    with pytest.raises(DataError, match="label at least two"):
        load_patients(cohort(tmp_path, 4, labelled=lambda number: number == 0), TWO, seed=0)


def test_labels_become_planes_in_the_order_of_the_classes(tmp_path: Path) -> None:
    labels = np.zeros((10, 24), np.uint8)
    labels[2:5, 3:20] = 1
    labels[7, 9] = 2
    save(tmp_path / "a.png", ramp())
    save(tmp_path / "m.png", labels)
    (patient,) = load_patients(write_manifest(tmp_path, ["a.png,m.png,p,train,"]), TWO, 0)
    mask = patient.samples[0].mask
    assert mask is not None
    assert mask.dtype == torch.uint8
    assert np.array_equal(mask[0].numpy(), labels == 1)
    assert np.array_equal(mask[1].numpy(), labels == 2)


def test_all_rows_that_cannot_be_used_are_named_at_once(tmp_path: Path) -> None:
    save(tmp_path / "a.png", ramp())
    save(tmp_path / "seven.png", np.full((10, 24), 7, np.uint8))
    save(tmp_path / "small.png", np.zeros((9, 24), np.uint8))
    holed = ramp().astype(np.float32)
    holed[0, 0] = np.nan
    save(tmp_path / "nan.tif", holed)
    lines = ["a.png,seven.png,p,train,", "a.png,small.png,q,train,", "nan.tif,,r,train,", "b.png,,s,train,"]
    with pytest.raises(DataError) as caught:
        load_patients(write_manifest(tmp_path, lines), TWO, 0)
    faults = caught.value.faults
    assert [fault.split(":")[0] for fault in faults] == ["line 2", "line 3", "line 4", "line 5"]
    for fault, word in zip(faults, ["undeclared labels 7", "10x24", "NaN", "exist"], strict=True):
        assert word in fault
    assert "data.classes" in faults[0]


@needs_real
def test_a_real_image_lies_as_its_mask_does() -> None:
    """Vessels are darker than what surrounds them: true only where image and mask are not transposed."""
    folder = REAL / "CHASE_DB1"
    green = load_image(folder / "images" / "Image_01L.jpg", DataConfig()).image[1]
    vessels = torch.from_numpy(read_mask(folder / "masks" / "Image_01L.png") == 255)
    assert green.shape == vessels.shape == (960, 999)
    ring = torch.nn.functional.max_pool2d(vessels[None].float(), 15, 1, 7)[0].bool() & ~vessels
    assert green[vessels].mean() < 0.9 * green[ring].mean()


# --- classes --------------------------------------------------------------------------------------

NESTED = DataConfig(classes=[ClassConfig("organ", 1, also=[2]), ClassConfig("core", 2)])


def masks_from(folder: Path, labels: np.ndarray, data: DataConfig) -> torch.Tensor:
    save(folder / "a.png", ramp(*labels.shape))
    save(folder / "a_mask.png", labels.astype(np.uint8))
    path = write_manifest(folder, ["a.png,a_mask.png,p,train"], "image,mask,patient,split")
    (patient,) = load_patients(path, data, 0)
    mask = patient.samples[0].mask
    assert mask is not None
    return mask


def test_a_class_holds_the_labels_of_its_parts(tmp_path: Path) -> None:
    labels = np.array([[0, 1, 1, 2], [0, 0, 2, 2]])
    assert torch.equal(masks_from(tmp_path, labels, NESTED)[0], torch.from_numpy(labels > 0).byte())
    assert torch.equal(masks_from(tmp_path, labels, NESTED)[1], torch.from_numpy(labels == 2).byte())
    with pytest.raises(DataError, match=r"undeclared labels 3 \(declared: 0, 1/2 = organ, 2 = core\)"):
        masks_from(tmp_path, labels + (labels == 2), NESTED)


def test_resized_masks_of_classes_that_exclude_each_other_do_not_overlap(tmp_path: Path) -> None:
    """A pixel half one class and half another: the plain rule gives it to both."""
    labels = np.zeros((4, 64), int)
    labels[:, 1::2], labels[:, ::2] = 1, 2
    labels[:, 32:] *= np.arange(32) % 4 < 1  # one of four: mostly background
    both = masks_from(tmp_path, labels, replace(TWO, longest_side=32))
    assert (both[:, :, :16] == 1).all()
    apart = masks_from(tmp_path, labels, replace(TWO, longest_side=32, exclusive=True))
    assert (apart.sum(0)[:, :16] == 1).all()
    assert (apart.sum(0)[:, 16:] <= both.sum(0)[:, 16:]).all()
