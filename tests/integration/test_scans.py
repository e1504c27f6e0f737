"""Clinical files: what is found in a scan lies in the patient where it was, whatever the file looks like."""

from __future__ import annotations

import gzip
import tracemalloc
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin
from pydicom.uid import UltrasoundImageStorage, generate_uid
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

import client.prediction
from client.data import load_patients
from client.images import open_mask, open_stack
from client.manifest import check_manifest, describe_manifest
from client.mask_files import ScanFormat
from client.prediction import PredictionOptions, SomeFailed, predict_folder
from client.students import LoadedStudent, StudentCard
from common.errors import DataError
from common.recipe import ClassConfig, DataConfig
from tests.scan_files import (
    DARK,
    Placing,
    nifti_places,
    picture,
    planted,
    segment_places,
    write_series,
)

BOX = (2, 10, 5), (4, 20, 12)  # slice, row, column: from, to below
SHAPE = (6, 40, 32)
TO_RIGHT_FRONT = np.array([-1.0, -1.0, 1.0])
NIFTI = PredictionOptions(to=ScanFormat.nifti)
DATA = DataConfig(image_size=32, classes=[ClassConfig("bright", 200)])


class Brightness(nn.Module):
    """Finds what is bright: a student whose right answer is known."""

    def forward(self, tiles: Tensor) -> Tensor:
        return 20 * (tiles[:, :1] - 0.5)


@pytest.fixture(autouse=True)
def student(monkeypatch: pytest.MonkeyPatch) -> None:
    card = StudentCard("unet-xs", DATA.classes, 32, None, False, 0, "5" * 64, "run", "student")
    monkeypatch.setattr(client.prediction, "load_runnable", lambda path: LoadedStudent(Brightness(), card))


def same_places(found: NDArray[np.float64], wanted: NDArray[np.float64]) -> bool:
    """Whether two sets of points are one, within a thousandth of a millimetre."""
    ordered = [points[np.lexsort(np.round(points, 2).T)] for points in (found, wanted)]
    return len(found) == len(wanted) and bool(np.abs(ordered[0] - ordered[1]).max() < 1e-3)


def box_places(placing: Placing) -> NDArray[np.float64]:
    (k0, r0, c0), (k1, r1, c1) = BOX
    return np.array(
        [placing.place(r, c, k) for k in range(k0, k1) for r in range(r0, r1) for c in range(c0, c1)]
    )


# --- NIfTI ----------------------------------------------------------------------------------------


def rotated_affine(zooms: tuple[float, float, float]) -> NDArray[np.float64]:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", (12, -25, 100), degrees=True).as_matrix() @ np.diag(zooms)
    affine[:3, 3] = (40.0, -18.0, 7.5)
    return affine


def write_nifti(path: Path, volume: NDArray[np.generic], affine: NDArray[np.float64]) -> None:
    image = nibabel.Nifti1Image(volume, affine)
    image.header.set_sform(affine, 2)
    image.header.set_qform(affine, 1)
    image.header.set_xyzt_units("mm", "sec")
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_a_nifti_mask_lies_where_its_object_does(tmp_path: Path, suffix: str, axis: int | None) -> None:
    volume = planted((24, 30, 20), (4, 9, 3), (10, 20, 12)).astype(np.int16)
    affine = rotated_affine((0.9, 1.3, 2.5))
    source, out = tmp_path / f"in/scan{suffix}", tmp_path / f"out/scan{suffix}"
    write_nifti(source, volume, affine)
    summary = predict_folder(Path("s"), source.parent, out.parent, PredictionOptions(slice_axis=axis))
    assert summary.masks == (out,)
    assert summary.cuts[0].axis == (2 if axis is None else axis)  # by itself along the thickest voxels
    assert summary.cuts[0].slices == volume.shape[summary.cuts[0].axis]
    wanted = nibabel.affines.apply_affine(affine, np.argwhere(volume > 500))
    assert same_places(nifti_places(out), wanted)
    before, after = nibabel.load(source), nibabel.load(out)
    assert after.get_data_dtype() == np.uint8
    assert np.unique(np.asarray(after.dataobj)).tolist() == [0, 200]
    assert np.array_equal(before.affine, after.affine)
    for name in ("sform_code", "qform_code", "pixdim", "xyzt_units", "srow_x", "quatern_b", "qoffset_x"):
        assert np.array_equal(before.header[name], after.header[name]), name


@pytest.mark.parametrize("shape", [(40, 32), (40, 32, 1), (1, 40, 32)])
def test_a_nifti_of_one_slice_keeps_its_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    flat = planted((40, 32), (5, 6), (20, 15))
    write_nifti(tmp_path / "in/flat.nii.gz", flat.reshape(shape).astype(np.float32) * 0.5, np.eye(4))
    predict_folder(
        Path("s"),
        tmp_path / "in",
        tmp_path / "out",
        PredictionOptions(slice_axis=shape.index(1) if 1 in shape else 2),
    )
    mask = nibabel.load(tmp_path / "out/flat.nii.gz")
    assert mask.shape == nibabel.load(tmp_path / "in/flat.nii.gz").shape
    assert np.array_equal(np.asarray(mask.dataobj).reshape(40, 32) > 0, flat > 500)


def test_scaled_numbers_are_scaled_and_the_other_byte_order_is_read(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.arange(24, dtype=">i2").reshape(2, 3, 4), np.eye(4))
    image.header.set_slope_inter(0.5, -3)
    nibabel.save(image, tmp_path / "a.nii")
    raw = nibabel.load(tmp_path / "a.nii")
    stack = open_stack(tmp_path / "a.nii", axis=2)
    assert stack.view is not None
    for index in range(4):
        wanted = stack.view.picture(np.asarray(raw.get_fdata(), np.float32), index)
        assert np.allclose(stack.stored(index)[0], wanted)


def test_a_compressed_volume_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    volume = np.broadcast_to(np.arange(3000, dtype=np.int16), (64, 64, 3000))  # 25 MB
    write_nifti(tmp_path / "a.nii.gz", volume, np.eye(4))
    size = volume.nbytes
    del volume
    open_stack(tmp_path / "a.nii.gz", axis=2).stored(0)  # what is loaded once is loaded
    tracemalloc.start()
    stack = open_stack(tmp_path / "a.nii.gz", axis=2)
    total = sum(float(stack.raster(index).pixels.sum()) for index in range(stack.count))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 0
    assert peak < size / 3


# --- DICOM ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", [(0, 0, 0), (20, -15, 30), (90, 0, 0), (-100, 70, 160)])
def test_a_shuffled_oblique_series_gives_masks_in_place(tmp_path: Path, turn: tuple[float, ...]) -> None:
    placing = Placing(turn=(float(turn[0]), float(turn[1]), float(turn[2])))
    write_series(tmp_path / "in/knee", planted(SHAPE, *BOX), placing, seed=3)
    segmented = predict_folder(Path("s"), tmp_path / "in", tmp_path / "seg")
    assert segmented.masks == (tmp_path / "seg/knee.dcm",)
    assert same_places(segment_places(segmented.masks[0]), box_places(placing))
    as_nifti = predict_folder(Path("s"), tmp_path / "in", tmp_path / "nifti", NIFTI)
    assert as_nifti.masks == (tmp_path / "nifti/knee.nii.gz",)
    assert same_places(nifti_places(as_nifti.masks[0]), box_places(placing) * TO_RIGHT_FRONT)


def test_each_frame_of_a_segmentation_names_the_slice_that_it_marks(tmp_path: Path) -> None:
    placing = Placing()
    files = write_series(tmp_path / "in/knee", planted(SHAPE, *BOX), placing, seed=1)
    headers = [pydicom.dcmread(path) for path in files]
    corners = {header.SOPInstanceUID: header.ImagePositionPatient for header in headers}
    predict_folder(Path("s"), tmp_path / "in", tmp_path / "out")
    found = pydicom.dcmread(tmp_path / "out/knee.dcm")
    assert found.Modality == "SEG"
    assert found.PatientID == headers[0].PatientID
    assert found.FrameOfReferenceUID == headers[0].FrameOfReferenceUID
    assert found.SegmentSequence[0].SegmentLabel == "bright"
    groups = found.PerFrameFunctionalGroupsSequence
    assert len(groups) == BOX[1][0] - BOX[0][0]
    for group in groups:
        named = group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        position = group.PlanePositionSequence[0].ImagePositionPatient
        assert np.allclose(np.array(position, float), np.array(corners[named], float), atol=1e-3)


def test_a_class_that_includes_others_has_their_pixels_in_its_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WholeAndPart(nn.Module):
        def forward(self, tiles: Tensor) -> Tensor:
            whole = 20 * (tiles[:, :1] - 0.5)
            part = whole.clone()
            part[..., 16:] = -9.0
            return torch.cat([whole, part], 1)

    classes = [ClassConfig("whole", 1, also=[2]), ClassConfig("part", 2)]
    card = StudentCard("unet-xs", classes, 32, None, False, 0, "5" * 64, "run", "student")
    monkeypatch.setattr(client.prediction, "load_runnable", lambda path: LoadedStudent(WholeAndPart(), card))
    placing = Placing(rows=32, columns=32)
    write_series(tmp_path / "in/a", planted((3, 32, 32), (1, 4, 10), (2, 12, 22)), placing)
    predict_folder(Path("s"), tmp_path / "in", tmp_path / "out")
    whole, part = (segment_places(tmp_path / "out/a.dcm", number) for number in (1, 2))
    assert (len(whole), len(part)) == (8 * 12, 8 * 6)
    assert same_places(part, np.array([placing.place(r, c, 1) for r in range(4, 12) for c in range(10, 16)]))


def test_an_empty_mask_is_an_answer(tmp_path: Path) -> None:
    write_series(tmp_path / "in/a", np.full((3, 32, 32), DARK, np.uint16), Placing(rows=32, columns=32))
    predict_folder(Path("s"), tmp_path / "in", tmp_path / "out")
    assert len(segment_places(tmp_path / "out/a.dcm")) == 0


def test_single_files_two_series_in_a_folder_and_what_is_no_image(tmp_path: Path) -> None:
    volume, flat = planted(SHAPE, *BOX), planted((32, 32), (4, 4), (12, 9))
    write_series(tmp_path / "in", volume, Placing(turn=(0, 0, 0)))
    for path in sorted((tmp_path / "in").glob("*.dcm")):
        path.rename(path.with_name(path.stem))  # without a suffix, as on a disc
    picture(flat, tmp_path / "in/us.dcm", generate_uid(), UltrasoundImageStorage).save_as(
        tmp_path / "in/us.dcm", enforce_file_format=True
    )
    predict_folder(Path("s"), tmp_path / "in", tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["in.dcm", "us.dcm"]
    assert np.array_equal(pydicom.dcmread(tmp_path / "out/us.dcm").pixel_array > 0, flat > 500)
    (tmp_path / "out/in.dcm").rename(tmp_path / "in/old-mask.dcm")  # a segmentation is no image
    again = predict_folder(Path("s"), tmp_path / "in", tmp_path / "again")
    assert sorted(path.name for path in again.masks) == names


def test_frames_of_one_file_are_put_in_order(tmp_path: Path) -> None:
    """An enhanced multi-frame image whose frames are stored in another order than they lie."""
    import highdicom

    placing = Placing(turn=(10.0, 20.0, 30.0))
    files = write_series(tmp_path / "single", planted(SHAPE, *BOX), placing)
    headers = [pydicom.dcmread(path) for path in files]
    order = [3, 0, 5, 2, 4, 1]
    enhanced = picture(
        planted(SHAPE, *BOX)[0], tmp_path / "x.dcm", generate_uid(), "1.2.840.10008.5.1.4.1.1.4.1"
    )
    enhanced.FrameOfReferenceUID = headers[0].FrameOfReferenceUID
    enhanced.NumberOfFrames = len(order)
    shared, groups = pydicom.Dataset(), []
    shared.PlaneOrientationSequence = highdicom.PlaneOrientationSequence(
        "PATIENT", headers[0].ImageOrientationPatient
    )
    shared.PixelMeasuresSequence = highdicom.PixelMeasuresSequence(placing.spacing, placing.step)
    for number in order:
        group = pydicom.Dataset()
        group.PlanePositionSequence = highdicom.PlanePositionSequence(
            "PATIENT", headers[number].ImagePositionPatient
        )
        groups.append(group)
    enhanced.SharedFunctionalGroupsSequence, enhanced.PerFrameFunctionalGroupsSequence = [shared], groups
    enhanced.PixelData = np.concatenate([planted(SHAPE, *BOX)[number] for number in order]).tobytes()
    (tmp_path / "in").mkdir()
    enhanced.save_as(tmp_path / "in/x.dcm", enforce_file_format=True)
    predict_folder(Path("s"), tmp_path / "in", tmp_path / "nifti", NIFTI)
    assert same_places(nifti_places(tmp_path / "nifti/x.nii.gz"), box_places(placing) * TO_RIGHT_FRONT)
    predict_folder(Path("s"), tmp_path / "in", tmp_path / "seg")
    assert same_places(segment_places(tmp_path / "seg/x.dcm"), box_places(placing))


def test_numbers_are_rescaled_windowed_and_white_is_high(tmp_path: Path) -> None:
    pixels = np.array([[0, 500, 1024, 1064, 1124, 3000]], np.uint16).repeat(4, 0)
    tags = {
        "Modality": "CT",
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        "WindowCenter": [40, 300],
        "WindowWidth": [201, 9],
    }
    placing = Placing(tags=tags)
    (ct,) = write_series(tmp_path / "ct", pixels[None], placing)
    raster = open_stack(ct).raster(0)
    assert raster.full_scale == 200  # PS3.3 C.11.2.1.2: from c - 0.5 - (w - 1) / 2, w - 1 wide
    assert raster.pixels[0, 0].tolist() == [0, 0, 60.5, 100.5, 160.5, 200]
    (inverted,) = write_series(
        tmp_path / "x", pixels[None], Placing(tags={"PhotometricInterpretation": "MONOCHROME1"})
    )
    assert open_stack(inverted).raster(0).pixels[0, 0].tolist() == [4095, 3595, 3071, 3031, 2971, 1095]
    (plain,) = write_series(tmp_path / "mr", pixels[None], Placing(tags=tags | {"Modality": "MR"}))
    assert open_stack(plain).raster(0).pixels[0, 0].tolist() == (pixels[0] - 1024.0).tolist()


def test_a_missing_slice_is_refused_where_the_format_cannot_say_so(tmp_path: Path) -> None:
    files = write_series(tmp_path / "in/a", planted(SHAPE, *BOX), Placing())
    files[4].unlink()
    predict_folder(Path("s"), tmp_path / "in", tmp_path / "seg")
    assert same_places(segment_places(tmp_path / "seg/a.dcm"), box_places(Placing()))
    with pytest.raises(SomeFailed, match="1 of 1") as caught:
        predict_folder(Path("s"), tmp_path / "in", tmp_path / "nifti", NIFTI)
    assert "after slice 4" in caught.value.faults[0]
    assert not list((tmp_path / "nifti").iterdir())


def test_two_slices_at_one_place_are_refused(tmp_path: Path) -> None:
    files = write_series(tmp_path / "in/a", planted(SHAPE, *BOX), Placing())
    twice = pydicom.dcmread(files[2])
    twice.SOPInstanceUID = twice.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    twice.save_as(tmp_path / "in/a/again.dcm")
    with pytest.raises(SomeFailed, match="1 of 1") as caught:
        predict_folder(Path("s"), tmp_path / "in", tmp_path / "out")
    assert "each phase or echo" in caught.value.faults[0]


def test_a_tilted_gantry_is_written_as_a_sheared_grid(tmp_path: Path) -> None:
    upright = Placing(turn=(0.0, 0.0, 0.0))
    tilt = np.array([0.0, 1.0, 0.0])  # mm to the back from slice to slice, across the slices' normal
    files = write_series(tmp_path / "in/head", planted(SHAPE, *BOX), upright)
    for number, path in enumerate(files):
        header = pydicom.dcmread(path)
        header.ImagePositionPatient = [float(v) for v in upright.place(0, 0, number) + number * tilt]
        header.save_as(path)
    predict_folder(Path("s"), tmp_path / "in", tmp_path / "out", NIFTI)
    (k0, r0, c0), (k1, r1, c1) = BOX
    wanted = np.array(
        [
            upright.place(r, c, k) + k * tilt
            for k in range(k0, k1)
            for r in range(r0, r1)
            for c in range(c0, c1)
        ]
    )
    assert same_places(nifti_places(tmp_path / "out/head.nii.gz"), wanted * TO_RIGHT_FRONT)
    header = nibabel.load(tmp_path / "out/head.nii.gz").header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 0)


# --- pictures with a resolution -------------------------------------------------------------------


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_sixteen_bit_tiff_keeps_its_resolution(tmp_path: Path, orientation: int) -> None:
    pixels = planted((40, 30), (5, 8), (15, 20)) * 60  # beyond 8 bits
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[282], tags[283], tags[296] = 254 / 3, 127.0, 2  # 0.3048 mm across, 0.2 mm down
    tags[274] = orientation
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in/a.tif", tiffinfo=tags)
    predict_folder(Path("s"), tmp_path / "in", tmp_path / "out")
    with Image.open(tmp_path / "in/a.tif") as image, Image.open(tmp_path / "out/a.tif") as mask:
        before = [float(image.tag_v2[tag]) for tag in (282, 283)]
        after = [float(mask.tag_v2[tag]) for tag in (282, 283)]
        found = np.array(mask)
        assert mask.tag_v2[296] == 2
        assert mask.tag_v2.get(274, 1) == 1  # the mask is stored upright
    assert after == pytest.approx(before if orientation == 1 else before[::-1], rel=1e-6)
    # 6: the stored rows run across the upright picture, from its right edge.
    upright = pixels if orientation == 1 else np.rot90(pixels, -1)
    assert np.array_equal(found > 0, upright > 500 * 60)
    extent = [(np.ptp(np.nonzero(found)[axis]) + 1) * 25.4 / after[1 - axis] for axis in (0, 1)]
    box = [10 * 25.4 / before[1], 12 * 25.4 / before[0]]
    assert extent == pytest.approx(box if orientation == 1 else box[::-1])


# --- faults ---------------------------------------------------------------------------------------


def test_corrupt_scans_are_named_and_the_others_done(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_nifti(folder / "good.nii.gz", planted((20, 20, 4), (2, 2, 1), (9, 9, 3)), np.eye(4))
    whole = (folder / "good.nii.gz").read_bytes()
    (folder / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "short.nii").write_bytes(gzip.decompress(whole)[:-100])
    (folder / "nothing.nii").write_bytes(b"nothing")
    series = write_series(folder / "series", planted(SHAPE, *BOX), Placing())
    write_series(folder / "torn", planted(SHAPE, *BOX), Placing())
    torn = sorted((folder / "torn").iterdir())[2]
    torn.write_bytes(torn.read_bytes()[:-1000])
    (folder / "letter.dcm").write_bytes(b"no DICOM")
    (folder / "timeline.nii.gz").write_bytes(b"")
    write_nifti(folder / "timeline.nii.gz", np.zeros((4, 4, 4, 3), np.int16), np.eye(4))
    with pytest.raises(SomeFailed) as caught:
        predict_folder(Path("s"), folder, tmp_path / "out")
    names = ("cut.nii.gz", "letter.dcm", "nothing.nii", "short.nii", "timeline.nii.gz", torn.name)
    assert len(caught.value.faults) == len(names)
    for name in names:
        assert sum(name in fault for fault in caught.value.faults) == 1, name
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good.nii.gz", "series.dcm"]
    assert len(series) == 6


# --- manifests ------------------------------------------------------------------------------------


def test_volumes_of_a_manifest_are_read_slice_by_slice(tmp_path: Path) -> None:
    """A series with its NIfTI mask, and a NIfTI volume whose mask another program stored the other way."""
    placing = Placing()
    volume = planted(SHAPE, *BOX)
    write_series(tmp_path / "knee", volume, placing)
    predict_folder(Path("s"), tmp_path, tmp_path / "masks", NIFTI)
    affine = rotated_affine((1.0, 1.5, 3.0))
    other = planted((20, 24, 5), (3, 4, 1), (9, 15, 4))
    write_nifti(tmp_path / "b.nii.gz", other, affine)
    write_nifti(tmp_path / "plain.nii.gz", (other > 500).astype(np.uint8) * 200, affine)
    turned = nibabel.as_closest_canonical(nibabel.load(tmp_path / "plain.nii.gz"))
    assert turned.shape != other.shape  # the axes stand in another order
    nibabel.save(turned, tmp_path / "b-mask.nii.gz")
    lines = ["image,mask,patient,split", "knee,masks/knee.nii.gz,p,train", "b.nii.gz,b-mask.nii.gz,q,test"]
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("\n".join(lines) + "\n")
    assert check_manifest(manifest, DATA.classes, 1).ok
    described = describe_manifest(manifest, DATA.classes)
    assert described["sizes"] == {"40x32x6": 1, "20x24x5": 1}
    knee, b = load_patients(manifest, DATA, 0)
    assert (len(knee.samples), len(b.samples)) == (6, 5)
    assert knee.samples[0].spacing_mm == pytest.approx(placing.spacing)
    assert b.samples[0].spacing_mm == pytest.approx((1.0, 1.5))
    for number, sample in enumerate(knee.samples):
        assert sample.mask is not None
        assert np.array_equal(sample.mask[0].numpy() > 0, volume[number] > 500)
    found = sum(int(sample.mask.sum()) for sample in b.samples if sample.mask is not None)
    assert found == int((other > 500).sum())
    for sample in b.samples:
        assert sample.mask is not None
        assert bool(((sample.image[0] > 0.5) == (sample.mask[0] > 0)).all())
    (tmp_path / "given.csv").write_text(
        "image,mask,patient,split,spacing_mm\nb.nii.gz,b-mask.nii.gz,q,test,2x3\n"
    )
    assert load_patients(tmp_path / "given.csv", DATA, 0)[0].samples[0].spacing_mm == (2.0, 3.0)


def test_a_mask_on_another_grid_is_refused(tmp_path: Path) -> None:
    affine = rotated_affine((1.0, 1.0, 3.0))
    write_nifti(tmp_path / "a.nii.gz", planted((20, 24, 5), (3, 4, 1), (9, 15, 4)), affine)
    moved = affine.copy()
    moved[0, 3] += 1.0
    write_nifti(tmp_path / "moved.nii.gz", np.zeros((20, 24, 5), np.uint8), moved)
    write_nifti(tmp_path / "coarse.nii.gz", np.zeros((10, 12, 5), np.uint8), affine @ np.diag([2, 2, 1, 1]))
    image = open_stack(tmp_path / "a.nii.gz")
    for name in ("moved.nii.gz", "coarse.nii.gz"):
        with pytest.raises(DataError, match="another grid"):
            open_mask(tmp_path / name, image)
    (tmp_path / "m.csv").write_text("image,mask,patient\na.nii.gz,moved.nii.gz,p\n")
    faults = check_manifest(tmp_path / "m.csv", DATA.classes, 1).errors
    assert any("another grid" in fault.text for fault in faults)


def test_a_student_sees_the_same_pictures_of_a_scan_in_either_format(tmp_path: Path) -> None:
    """Front on top and the patient's right on the left, as DICOM stores axial slices."""
    placing = Placing(turn=(5.0, -8.0, 4.0))
    volume = planted(SHAPE, *BOX)
    write_series(tmp_path / "a", volume, placing)
    series = open_stack(tmp_path / "a")
    assert series.grid is not None
    stored = nibabel.Nifti1Image(volume.transpose(2, 1, 0), series.grid.affine)
    for name, image in {"same": stored, "canonical": nibabel.as_closest_canonical(stored)}.items():
        nibabel.save(image, tmp_path / f"{name}.nii.gz")
        found = open_stack(tmp_path / f"{name}.nii.gz")
        assert found.spacing_mm == pytest.approx(placing.spacing)
        for index in range(found.count):
            assert np.array_equal(found.stored(index), series.stored(index)), name


def test_overlays_are_drawn_slice_by_slice(tmp_path: Path) -> None:
    write_series(tmp_path / "in/a", planted(SHAPE, *BOX), replace(Placing(), turn=(0.0, 0.0, 0.0)))
    summary = predict_folder(Path("s"), tmp_path / "in", tmp_path / "out", PredictionOptions(overlay=True))
    assert [path.name for path in summary.overlays] == [f"a-{number:04d}.png" for number in range(6)]
    with Image.open(summary.overlays[2]) as drawn:
        assert drawn.size == (32, 40)
