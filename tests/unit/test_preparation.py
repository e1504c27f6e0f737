"""Public sets, one by one: what is read of them, in which order, and what is left out."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from client.preparation import dsb2018
from client.preparation.catalogue import CATALOGUE
from client.preparation.dicom_series import read_slice, read_stored, series_fault
from client.preparation.kidneyus import VALUES
from client.preparation.pictures import read_binary, read_labels
from client.preparation.preparing import Preparation, prepare
from common.errors import DataError
from tests import official_layouts as official
from tests import official_scans as scans
from tests.official_layouts import LAYOUTS
from tests.official_pixels import SHAPE, save

SAGITTAL = [0, 1, 0, 0, 0, -1]  # its normal is (-1, 0, 0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str) -> Path:
    LAYOUTS[name].write(Path("source"), 3)
    return Path("source")


def made(name: str) -> tuple[Preparation, list[dict[str, str]]]:
    """The copy in ``source``, prepared: what is told, and the manifest's rows."""
    told = prepare(CATALOGUE[name], Path("source"), Path("made"), 0)
    with told.manifest.open(newline="") as file:
        return told, list(csv.DictReader(file))


def faults(name: str) -> list[str]:
    with pytest.raises(DataError) as caught:
        prepare(CATALOGUE[name], Path("source"), Path("made"), 0)
    assert not Path("made").exists()
    return list(caught.value.faults)


def pixels(row: dict[str, str], kind: str = "image") -> np.ndarray:
    return np.asarray(Image.open(Path("made") / row[kind]))


# --- CHAOS ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("folder")
def test_a_shuffled_ct_series_comes_out_in_the_order_of_the_patient_with_its_own_masks() -> None:
    """The copies' file numbers run 0, 1, 2 and lie at the places 1, 2, 0; a corner holds 40 HU a place."""
    write("chaos-ct")
    _, rows = made("chaos-ct")
    for case in range(0, len(rows), scans.SLICES):
        series = rows[case : case + scans.SLICES]
        assert len({row["patient"] for row in series}) == 1
        marks = [int(pixels(row)[0, 0]) for row in series]
        assert marks == [round((40 * place + 160) * 255 / 400) for place in range(scans.SLICES)]
    first = scans.ORDER.index(0)
    stored = read_binary(Path(f"source/Train_Sets/CT/1/Ground/liver_GT_{first:03d}.png")) > 0
    assert np.array_equal(pixels(rows[0], "mask"), stored)
    assert {row["spacing_mm"] for row in rows} == {"0.75x0.5"}


@pytest.mark.usefixtures("folder")
def test_mr_sequences_keep_their_numbers_and_the_two_phases_share_their_masks() -> None:
    write("chaos-mr")
    _, rows = made("chaos-mr")
    mine = [row for row in rows if row["patient"] == "mr-1"]
    groups = ["t1-in-phase", "t1-out-of-phase", "t2-spir"]
    assert [row["group"] for row in mine] == [name for name in groups for _ in range(scans.SLICES)]
    assert pixels(mine[0]).dtype == np.uint16 or pixels(mine[0]).dtype == np.int32
    assert [int(pixels(row)[0, 0]) for row in mine] == [0, 100, 200] * 3
    phases = [[pixels(row, "mask") for row in mine if row["group"] == name] for name in groups[:2]]
    assert np.array_equal(*phases)
    assert {int(value) for row in rows for value in np.unique(pixels(row, "mask"))} == {0, 1, 2, 3, 4}


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("value", [63, 55, 70])
def test_an_mr_code_is_a_range(value: int) -> None:
    source = write("chaos-mr")
    path = source / "Train_Sets/MR/1/T2SPIR/Ground/IMG-0004-00001.png"
    labels = read_labels(path)
    labels[labels == 63] = value
    save(labels, path)
    _, rows = made("chaos-mr")
    assert any((pixels(row, "mask") == 1).any() for row in rows if row["patient"] == "mr-1")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("gone", ["Ground/liver_GT_001.png", "DICOM_anon/i0000,0000b.dcm"])
def test_a_slice_or_a_mask_that_is_missing_shifts_no_other(gone: str) -> None:
    source = write("chaos-ct")
    (source / "Train_Sets/CT/1" / gone).unlink()
    (line,) = faults("chaos-ct")
    assert "CT/1/Ground" in line


@pytest.mark.usefixtures("folder")
def test_a_gap_in_each_at_another_place_is_no_pairing() -> None:
    source = write("chaos-ct")
    (source / "Train_Sets/CT/1/Ground/liver_GT_001.png").unlink()
    (source / "Train_Sets/CT/1/DICOM_anon/i0002,0000b.dcm").unlink()
    assert len(faults("chaos-ct")) == 1


def test_slices_are_ordered_along_their_own_normal(tmp_path: Path) -> None:
    stored = np.zeros(SHAPE, np.uint16)
    for number, x in enumerate((10.0, -5.0, 2.5)):
        tags = {"ImageOrientationPatient": SAGITTAL, "ImagePositionPatient": [x, 0, 0]}
        scans.write_dicom(tmp_path / f"{number}.dcm", stored, 0, **tags)
    slices = sorted((read_slice(path) for path in tmp_path.iterdir()), key=lambda one: one.place_mm)
    assert [one.path.stem for one in slices] == ["0", "2", "1"], "towards the left the normal falls"
    assert series_fault(slices) == ""


@pytest.mark.parametrize(
    ("tags", "told"),
    [
        ({"ImageOrientationPatient": SAGITTAL}, "orientations"),
        ({"PixelSpacing": [0.7, 0.7]}, "spacings"),
        ({"ImagePositionPatient": [-100.0, -80.0, -50.0]}, "one place"),
    ],
)
def test_what_is_no_series_is_told(tmp_path: Path, tags: dict[str, list[float]], told: str) -> None:
    stored = np.zeros(SHAPE, np.uint16)
    scans.write_dicom(tmp_path / "0.dcm", stored, 0)
    scans.write_dicom(tmp_path / "1.dcm", stored, 1, **tags)
    assert told in series_fault([read_slice(path) for path in sorted(tmp_path.iterdir())])


@pytest.mark.parametrize("tag", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
def test_a_header_without_geometry_names_what_it_lacks(tmp_path: Path, tag: str) -> None:
    scans.write_dicom(tmp_path / "0.dcm", np.zeros(SHAPE, np.uint16), 0, **{tag: None})
    with pytest.raises(DataError, match=tag):
        read_slice(tmp_path / "0.dcm")


def test_stored_numbers_get_slope_and_intercept(tmp_path: Path) -> None:
    stored = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    scans.write_dicom(tmp_path / "0.dcm", stored, 0, RescaleSlope=2)
    assert np.array_equal(read_stored(tmp_path / "0.dcm"), 2.0 * stored + scans.HU_INTERCEPT)


@pytest.mark.usefixtures("folder")
def test_ct_is_windowed_to_soft_tissue() -> None:
    source = write("chaos-ct")
    hu = np.linspace(-1000, 1000, int(np.prod(SHAPE))).round().reshape(SHAPE)
    path = source / "Train_Sets/CT/1/DICOM_anon/i0002,0000b.dcm"  # at place 0
    scans.write_dicom(path, hu - scans.HU_INTERCEPT, 0)
    _, rows = made("chaos-ct")
    image = pixels(rows[0]).astype(float)
    assert (image[hu <= -160] == 0).all()
    assert (image[hu >= 240] == 255).all()
    inside = (hu > -160) & (hu < 240)
    assert np.abs(image[inside] - (hu[inside] + 160) * 255 / 400).max() <= 0.51


# --- KidneyUS ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("folder")
def test_polygons_are_painted_over_the_capsule_whatever_their_order() -> None:
    write("kidneyus")
    _, rows = made("kidneyus")
    mask = pixels(rows[0], "mask")
    for anatomy, (left, top, right, bottom) in official.KIDNEY_REGIONS.items():
        value = VALUES[anatomy]
        centre = mask[(top + bottom) // 2, (left + right) // 2]
        assert centre == value or anatomy == "Capsule"
        assert (mask[top, left : right + 1] >= value).all(), "the border belongs to it"
    left, top, right, bottom = official.KIDNEY_REGIONS["Capsule"]
    kidney = np.zeros(SHAPE, bool)
    kidney[top : bottom + 1, left : right + 1] = True
    assert np.array_equal(mask > 0, kidney), "the class kidney has every value"


@pytest.mark.usefixtures("folder")
def test_images_whose_names_begin_alike_stay_together() -> None:
    write("kidneyus")
    _, rows = made("kidneyus")
    pair = [row for row in rows if row["patient"] == "130"]
    assert len(pair) == 2
    assert len({row["split"] for row in pair}) == 1
    assert {row["group"] for row in rows} == {"transverse"}


@pytest.mark.usefixtures("folder")
def test_regions_that_are_no_polygons_are_counted_and_an_image_without_any_is_unlabelled() -> None:
    table = write("kidneyus") / "labels/reviewed_labels_1.csv"
    lines = list(csv.reader(table.read_text().splitlines()))
    name = lines[1][0]
    kept = [line for line in lines if line[0] != name]
    kept.append([*lines[1][:5], '{"name":"rect","x":1,"y":2,"width":0,"height":0}', '{"Anatomy":"Cortex"}'])
    kept.append([*lines[1][:5], lines[1][5], "{}"])
    kept.append([*lines[1][:5], "{}", "{}"])
    with table.open("w", newline="") as file:
        csv.writer(file).writerows(kept)
    told, rows = made("kidneyus")
    assert [row["mask"] for row in rows if row["image"] == f"images/{name}"] == [""]
    assert told.labelled == told.images - 1
    notes = " ".join(told.notes)
    for part in ("1 regions that are no polygon", "1 regions without an anatomy", "1 images have no polygon"):
        assert part in notes


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("place", ["kidneyUS_images_25_june_2025", "."])
def test_kidney_images_may_lie_where_their_archive_puts_them(place: str) -> None:
    source = write("kidneyus")
    if place == ".":
        for path in (source / "images").iterdir():
            path.rename(source / path.name)
        (source / "images").rmdir()
        (source / "labels/reviewed_labels_1.csv").rename(source / "reviewed_labels_1.csv")
    else:
        (source / "images").rename(source / place)
    assert made("kidneyus")[0].labelled == LAYOUTS["kidneyus"].images


@pytest.mark.usefixtures("folder")
def test_a_table_that_is_missing_or_no_table_is_told() -> None:
    table = write("kidneyus") / "labels/reviewed_labels_1.csv"
    table.write_text("filename,regions\na.png,1\n")
    assert "region_shape_attributes" in faults("kidneyus")[0]
    table.unlink()
    assert "reviewed_labels_1.csv is missing" in faults("kidneyus")[0]


# --- nuclei -----------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9))
def test_run_lengths_come_back_as_the_mask_they_were_made_of(seed: int, height: int, width: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < 0.4
    text = official.run_lengths(mask)
    assert np.array_equal(dsb2018._decode([(text, height, width)]) > 0, mask)


@pytest.mark.parametrize("text", ["1", "0 2", "5 3", "1 2 x 1", "6 2", "1 0", "-1 2"])
def test_run_lengths_that_do_not_fit_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="run lengths"):
        dsb2018._decode([(text, 2, 3)])


@pytest.mark.usefixtures("folder")
def test_the_test_half_is_left_out_without_its_solution() -> None:
    (write("dsb2018") / "stage1_solution.csv").unlink()
    told, rows = made("dsb2018")
    assert len(rows) == 5
    assert told.seed == 0
    assert "stage1_solution.csv" in told.notes[0]


@pytest.mark.usefixtures("folder")
def test_every_nucleus_is_in_the_one_mask() -> None:
    source = write("dsb2018")
    _, rows = made("dsb2018")
    nuclei = sorted((source / "stage1_train" / rows[0]["patient"] / "masks").iterdir())
    union = np.logical_or.reduce([read_binary(path) > 0 for path in nuclei])
    assert len(nuclei) == 3
    assert np.array_equal(pixels(rows[0], "mask") > 0, union)
    assert pixels(rows[0]).shape[-1] == 3, "without its alpha channel"


# --- fundus photographs -----------------------------------------------------------------------------


@pytest.mark.usefixtures("folder")
def test_both_eyes_of_a_child_are_one_patient_in_one_split() -> None:
    write("chase_db1")
    _, rows = made("chase_db1")
    eyes = {
        row["patient"]: [other["split"] for other in rows if other["patient"] == row["patient"]]
        for row in rows
    }
    assert eyes == {
        "child-01": ["train"] * 2, "child-02": ["train"] * 2, "child-03": ["train"] * 2,
        "child-11": ["test"] * 2, "child-12": ["test"] * 2,
    }  # fmt: skip


@pytest.mark.usefixtures("folder")
def test_drive_without_masks_of_its_test_half_deals_its_training_half() -> None:
    shutil.rmtree(write("drive") / "test/1st_manual")
    told, rows = made("drive")
    assert [row["patient"] for row in rows] == ["21", "22", "23", "24"]
    assert told.seed == 0
    assert told.splits["test"] == 1
    assert "left out" in told.notes[0]


@pytest.mark.usefixtures("folder")
def test_drive_keeps_its_own_split() -> None:
    write("drive")
    told, rows = made("drive")
    assert told.seed is None
    assert {row["patient"]: row["split"] for row in rows if row["patient"] in ("21", "01")} == {
        "21": "train", "01": "test",
    }  # fmt: skip


@pytest.mark.usefixtures("folder")
def test_hrf_says_what_each_eye_has() -> None:
    write("hrf")
    groups = {row["patient"]: row["group"] for row in made("hrf")[1]}
    assert groups["01_dr"] == "diabetic retinopathy"
    assert groups["02_g"] == "glaucoma"
    assert groups["01_h"] == "healthy"


@pytest.mark.usefixtures("folder")
def test_stare_may_be_unpacked() -> None:
    import gzip

    for path in write("stare").rglob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert made("stare")[0].labelled == 8


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("name", "outer"), [("drive", "DRIVE"), ("ph2", "PH2Dataset"), ("les_av", "LES-AV")])
def test_the_folder_around_may_be_named_instead_and_what_unpackers_leave_is_ignored(
    name: str, outer: str
) -> None:
    write(name).rename("inner")
    Path("source").mkdir()
    Path("inner").rename(f"source/{outer}")
    for path in [path for path in Path("source").rglob("*") if path.is_dir()]:
        (path / "._21_training.tif").write_bytes(b"of the system")
        (path / "Thumbs.db").write_bytes(b"of the system")
        (path / "readme.txt").write_text("about the set")
    assert made(name)[0].images == LAYOUTS[name].images


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", [name for name, known in CATALOGUE.items() if not known.patients_known])
def test_a_set_without_patients_says_that_an_image_stands_for_one(name: str) -> None:
    write(name)
    told, rows = made(name)
    assert told.patients == told.images == len(rows)
    assert any("a patient is an image" in note for note in told.notes)


# --- ulcers -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("folder")
def test_patients_are_those_of_the_workbook() -> None:
    write("autooral")
    patients = {Path(row["image"]).stem: row["patient"] for row in made("autooral")[1]}
    assert patients["train-0001"] == patients["train-0002"] == "train-P1"
    assert patients["train-0003"] == "train-P2"
    assert patients["test-0001"] == "test-P1"


@pytest.mark.usefixtures("folder")
def test_an_image_that_the_workbook_does_not_know_is_told() -> None:
    source = write("autooral")
    workbook = source / "Training Set disease classification.xlsx"
    official.write_workbook(workbook, [["Patient ID", "Image Number"], ["P1", 1], ["P2", 2]])
    assert len(faults("autooral")) == 4
    workbook.write_bytes(b"no workbook")
    assert "workbook" in faults("autooral")[0]


@pytest.mark.usefixtures("folder")
def test_without_a_test_half_patients_are_dealt() -> None:
    shutil.rmtree(write("autooral") / "Test")
    told, rows = made("autooral")
    assert told.seed == 0
    assert len({row["split"] for row in rows if row["patient"] == "train-P1"}) == 1
