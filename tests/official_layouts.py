"""Small copies of public sets: the folders, names, formats and codings in which they are handed out."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

SHAPE = (40, 48)  # rows, columns
SLICES = 3
SPACING_MM = (0.75, 0.5)  # between rows, between columns
SLICE_MM = 3.0
ORDER = (1, 2, 0)  # file number -> place in the patient: the files lie shuffled
MR_CODES = (63, 126, 189, 252)
HU_INTERCEPT = -1024
SHEET = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Spoiled:
    """What was done to a copy, as it is told: what is missing, a renamed file's new name, a mask."""

    missing: str
    renamed: str
    miscoded: str


@dataclass(frozen=True)
class Layout:
    """``write(folder, seed)`` makes a copy; ``spoil`` breaks it in three places at once."""

    name: str
    write: Callable[[Path, int], None]
    spoil: Callable[[Path], Spoiled]
    folders: tuple[str, ...]  # each needed
    images: int
    patients: int


# --- pixels -----------------------------------------------------------------------------------------


def scene(rng: np.random.Generator, objects: int = 1) -> tuple[NDArray[np.uint8], list[Mask]]:
    """(H, W, 3) noise with bright discs, and the mask of each."""
    image = rng.integers(20, 90, (*SHAPE, 3))
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    masks = []
    for number in range(objects):
        centre = 10 + 20 * (number // 2) + rng.integers(0, 3), 12 + 22 * (number % 2) + rng.integers(0, 3)
        mask = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < 36
        image[mask] += 120
        masks.append(mask)
    return image.astype(np.uint8), masks


def save(array: NDArray[np.uint8] | Mask, path: Path) -> None:
    """A Boolean array becomes a black-and-white picture (1 bit)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(array)
    if path.suffix == ".gz":
        buffer = io.BytesIO()
        picture.save(buffer, "PPM")
        path.write_bytes(gzip.compress(buffer.getvalue()))
    else:
        picture.save(path)


def grey(mask: Mask) -> NDArray[np.uint8]:
    return mask.astype(np.uint8) * 255


def rename(path: Path, name: str) -> str:
    path.rename(path.with_name(name))
    return name


def miscode(path: Path, value: int = 7) -> str:
    """Rewrite a mask with a value that no set has; its name, as it is told."""
    save(np.full(SHAPE, value, np.uint8), path)
    return path.name


# --- fundus photographs -----------------------------------------------------------------------------


def _pairs(root: Path, keys: list[str], image: str, mask: str, seed: int, one_bit: bool = False) -> None:
    rng = np.random.default_rng(seed)
    for key in keys:
        pixels, (disc,) = scene(rng)
        save(pixels, root / image.format(key))
        save(disc if one_bit else grey(disc), root / mask.format(key))


def write_drive(root: Path, seed: int) -> None:
    half = "{0}/images/{{}}_{0}.tif", "{0}/1st_manual/{{}}_manual1.gif"
    _pairs(root, ["21", "22", "23", "24"], *(part.format("training") for part in half), seed)
    _pairs(root, ["01", "02", "03"], *(part.format("test") for part in half), seed + 1)
    for part, keys in (("training", ["21", "22", "23", "24"]), ("test", ["01", "02", "03"])):
        for key in keys:
            save(np.full(SHAPE, 255, np.uint8), root / part / "mask" / f"{key}_{part}_mask.gif")


def spoil_drive(root: Path) -> Spoiled:
    shutil.rmtree(root / "training/1st_manual")
    return Spoiled(
        "training/1st_manual is missing",
        rename(root / "test/images/01_test.tif", "1_test.tif"),
        miscode(root / "test/1st_manual/02_manual1.gif"),
    )


def write_chase(root: Path, seed: int) -> None:
    keys = [f"{child}{eye}" for child in ("01", "02", "03", "11", "12") for eye in "LR"]
    _pairs(root, keys, "Image_{}.jpg", "Image_{}_1stHO.png", seed, one_bit=True)
    for key in keys:
        shutil.copy(root / f"Image_{key}_1stHO.png", root / f"Image_{key}_2ndHO.png")


def spoil_chase(root: Path) -> Spoiled:
    (root / "Image_01L.jpg").unlink()  # one flat folder: there is no other that can be missing
    return Spoiled(
        "without its image Image_01L.jpg",
        rename(root / "Image_02R.jpg", "Image_2R.jpg"),
        miscode(root / "Image_11L_1stHO.png"),
    )


def write_hrf(root: Path, seed: int) -> None:
    for suffix, kinds in (
        ("JPG", ["01_dr", "02_dr", "03_dr"]),
        ("jpg", ["01_g", "02_g", "03_g", "01_h", "02_h"]),
    ):
        _pairs(root, kinds, f"images/{{}}.{suffix}", "manual1/{}.tif", seed + len(kinds))


def spoil_hrf(root: Path) -> Spoiled:
    shutil.rmtree(root / "images")
    return Spoiled(
        "images is missing",
        rename(root / "manual1/01_g.tif", "01_glaucoma.tif"),
        miscode(root / "manual1/02_h.tif"),
    )


def write_stare(root: Path, seed: int) -> None:
    keys = [f"im{number:04d}" for number in (1, 2, 3, 4, 5, 44, 77, 81)]
    _pairs(root, keys, "stare-images/{}.ppm.gz", "labels-ah/{}.ah.ppm.gz", seed)


def spoil_stare(root: Path) -> Spoiled:
    shutil.rmtree(root / "stare-images")
    return Spoiled(
        "stare-images is missing",
        rename(root / "labels-ah/im0001.ah.ppm.gz", "im1.ah.ppm.gz"),
        miscode(root / "labels-ah/im0077.ah.ppm.gz"),
    )


def write_les_av(root: Path, seed: int) -> None:
    keys = ["6", "24", "111", "129", "271", "275", "276", "277"]
    _pairs(root, keys, "images/{}.png", "vessel-segmentations/{}.png", seed, one_bit=True)


def spoil_les_av(root: Path) -> Spoiled:
    shutil.rmtree(root / "images")
    return Spoiled(
        "images is missing",
        rename(root / "vessel-segmentations/6.png", "six.png"),
        miscode(root / "vessel-segmentations/111.png"),
    )


# --- dermoscopy, nuclei, ulcers, ultrasound ----------------------------------------------------------


def write_ph2(root: Path, seed: int) -> None:
    case = "PH2 Dataset images/{0}/{0}_"
    keys = [f"IMD{number:03d}" for number in (2, 3, 4, 6, 8, 9, 10, 13)]
    _pairs(root, keys, case + "Dermoscopic_Image/{0}.bmp", case + "lesion/{0}_lesion.bmp", seed, one_bit=True)


def spoil_ph2(root: Path) -> Spoiled:
    folder = root / "PH2 Dataset images"
    shutil.rmtree(folder / "IMD003/IMD003_lesion")
    return Spoiled(
        "IMD003_lesion is missing",
        rename(folder / "IMD004/IMD004_Dermoscopic_Image/IMD004.bmp", "IMD4.bmp"),
        miscode(folder / "IMD006/IMD006_lesion/IMD006_lesion.bmp"),
    )


def run_lengths(mask: Mask) -> str:
    """Down the columns, counted from 1."""
    flat = np.concatenate([[0], mask.T.ravel().astype(np.int8), [0]])
    starts, ends = np.flatnonzero(np.diff(flat) == 1), np.flatnonzero(np.diff(flat) == -1)
    return " ".join(f"{start + 1} {end - start}" for start, end in zip(starts, ends, strict=True))


def write_dsb2018(root: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lines = [["ImageId", "EncodedPixels", "Height", "Width", "Usage"]]
    for number in range(8):
        part, key = ("stage1_train", "stage1_test")[number > 4], f"{number:02x}" * 32
        pixels, nuclei = scene(rng, 3)
        alpha = np.full((*SHAPE, 1), 255, np.uint8)
        save(np.concatenate([pixels, alpha], axis=2), root / part / key / "images" / f"{key}.png")
        for place, nucleus in enumerate(nuclei):
            if part == "stage1_train":
                save(grey(nucleus), root / part / key / "masks" / f"{place:02x}{key[2:]}.png")
            else:
                lines.append([key, run_lengths(nucleus), str(SHAPE[0]), str(SHAPE[1]), "Public"])
    with (root / "stage1_solution.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)


def spoil_dsb2018(root: Path) -> Spoiled:
    folder = root / "stage1_train"
    shutil.rmtree(folder / ("00" * 32) / "masks")
    first = sorted((folder / ("02" * 32) / "masks").glob("*.png"))[0]
    return Spoiled(
        f"{'00' * 32}/masks is missing",
        rename(folder / ("01" * 32) / "images" / f"{'01' * 32}.png", "01.png"),
        miscode(first),
    )


def write_workbook(path: Path, rows: list[list[str | int]]) -> None:
    """An .xlsx with texts in the shared table and numbers in the cells, as spreadsheets write it."""
    texts: list[str] = []
    lines = []
    for number, row in enumerate(rows, 1):
        cells = []
        for column, value in zip("ABCDEFG", row, strict=False):
            if isinstance(value, int):
                cells.append(f'<c r="{column}{number}"><v>{value}</v></c>')
            else:
                texts.append(value)
                cells.append(f'<c r="{column}{number}" t="s"><v>{len(texts) - 1}</v></c>')
        lines.append(f'<row r="{number}">{"".join(cells)}</row>')
    table = "".join(f"<si><t>{text}</t></si>" for text in texts)
    with zipfile.ZipFile(path, "w") as book:
        book.writestr("xl/worksheets/sheet1.xml", f'<worksheet xmlns="{SHEET}"><sheetData>{"".join(lines)}</sheetData></worksheet>')  # fmt: skip # noqa: E501
        book.writestr("xl/sharedStrings.xml", f'<sst xmlns="{SHEET}">{table}</sst>')


def write_autooral(root: Path, seed: int) -> None:
    for part, word, count in (("Train", "Training", 6), ("Test", "Test", 3)):
        keys = [f"{number:04d}" for number in range(1, count + 1)]
        names = f"{part}/data_{part.lower()}/{{}}.png", f"{part}/mask_{part.lower()}/{{}}.png"
        _pairs(root, keys, *names, seed + count)
        rows: list[list[str | int]] = [["Patient ID", "Image Number", "Ulcer type"]]
        rows += [[f"P{max(1, int(key) - 1)}", int(key), "aphthous"] for key in keys]  # 1 and 2: one patient
        write_workbook(root / f"{word} Set disease classification.xlsx", rows)


def spoil_autooral(root: Path) -> Spoiled:
    shutil.rmtree(root / "Test/data_test")
    return Spoiled(
        "Test/data_test is missing",
        rename(root / "Train/data_train/0003.png", "three.png"),
        miscode(root / "Train/mask_train/0004.png"),
    )


KIDNEY_NAMES = [
    "1_IM-0001-0059_anon", "2_IM-0383-0001_anon", "3_IM-0359-0014_anon", "5_IM-0040-0020_anon",
    "11_IM-0288-0017-0002_anon", "12_IM-0464-17664_anon", "13_IM-0293-0055_anon",
    "130_IM-0650-0033_anon", "130_IM-0650-0053_anon",
]  # fmt: skip
KIDNEY_COLUMNS = [
    "filename", "file_size", "file_attributes", "region_count", "region_id", "region_shape_attributes",
    "region_attributes",
]  # fmt: skip
# The corners of a rectangle: left, top, right, bottom.
KIDNEY_REGIONS = {
    "Cortex": (10, 8, 40, 14), "Capsule": (8, 6, 42, 34), "Central Echo Complex": (20, 18, 30, 26),
    "Medulla": (12, 28, 38, 32),
}  # fmt: skip


def kidney_rows(name: str, regions: dict[str, tuple[int, int, int, int]]) -> list[list[str]]:
    rows = []
    for number, (anatomy, (left, top, right, bottom)) in enumerate(regions.items()):
        shape = {
            "name": "polygon",
            "all_points_x": [left, right, right, left],
            "all_points_y": [top, top, bottom, bottom],
        }
        about = json.dumps({"Quality": "Fair", "View": "Transverse", "Comments": "n/a"})
        what = json.dumps({"Anatomy": anatomy})
        rows.append([f"{name}.png", "1", about, str(len(regions)), str(number), json.dumps(shape), what])
    return rows


def write_kidneyus(root: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lines = [KIDNEY_COLUMNS]
    for name in KIDNEY_NAMES:
        pixels = rng.integers(20, 50, (*SHAPE, 3)).astype(np.uint8)
        for left, top, right, bottom in KIDNEY_REGIONS.values():
            pixels[top : bottom + 1, left : right + 1] += 60
        save(pixels, root / "images" / f"{name}.png")
        lines += kidney_rows(name, KIDNEY_REGIONS)
    (root / "labels").mkdir()
    for sonographer in (1, 2):
        with (root / f"labels/reviewed_labels_{sonographer}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(lines)


def spoil_kidneyus(root: Path) -> Spoiled:
    (root / "images/1_IM-0001-0059_anon.png").unlink()  # in place of a folder: there are but two
    table = root / "labels/reviewed_labels_1.csv"
    table.write_text(table.read_text().replace('""Medulla""', '""Marrow""', 1))
    return Spoiled(
        "1_IM-0001-0059_anon.png, which is not there",
        rename(root / "images/2_IM-0383-0001_anon.png", "two.png"),
        "the anatomy 'Marrow'",
    )


# --- CHAOS ------------------------------------------------------------------------------------------


def write_dicom(
    path: Path, stored: NDArray[np.uint16], place: int, modality: str = "CT", **tags: object
) -> None:
    """One slice at ``place`` of a series whose normal is not an axis' own; ``tags`` replace header values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage if modality == "CT" else MRImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(path)])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = (
        meta.MediaStorageSOPClassUID,
        meta.MediaStorageSOPInstanceUID,
    )
    dataset.Modality, dataset.PatientID = modality, "anonymous"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.PixelSpacing = list(SPACING_MM)
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.ImagePositionPatient = [-100.0, -80.0, -50.0 + SLICE_MM * place]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    if modality == "CT":
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, HU_INTERCEPT
    dataset.PixelData = stored.astype(np.uint16).tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)


def write_chaos_ct(root: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for case in (1, 2, 5, 6, 8, 10, 14, 16):
        folder = root / "Train_Sets/CT" / str(case)
        for number, place in enumerate(ORDER):
            pixels, (liver,) = scene(rng)
            name = f"i{number:04d},0000b.dcm" if case < 10 else f"IMG-0002-{number + 1:05d}.dcm"
            stored = pixels[..., 0].astype(np.int32) - HU_INTERCEPT  # 20 to 209 HU
            stored[0, 0] = 40 * place - HU_INTERCEPT  # a mark of where it lies
            write_dicom(folder / "DICOM_anon" / name, stored, place)
            save(liver, folder / "Ground" / f"liver_GT_{number:03d}.png")


def spoil_chaos_ct(root: Path) -> Spoiled:
    folder = root / "Train_Sets/CT"
    shutil.rmtree(folder / "1/Ground")
    return Spoiled(
        "CT/1/Ground is missing",
        rename(folder / "2/DICOM_anon/i0001,0000b.dcm", "slice-1.dcm"),
        miscode(folder / "5/Ground/liver_GT_001.png"),
    )


def write_chaos_mr(root: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for case in (1, 2, 3, 5, 8, 10, 13, 15):
        folder = root / "Train_Sets/MR" / str(case)
        for number, place in enumerate(ORDER):
            for sequence, phases in (("T1DUAL", ("InPhase", "OutPhase")), ("T2SPIR", (".",))):
                pixels, organs = scene(rng, len(MR_CODES))
                labels = np.zeros(SHAPE, np.uint8)
                for code, organ in zip(MR_CODES, organs, strict=True):
                    labels[organ] = code
                # Of a dual echo the phases take turns: 2, 4, 6 in phase and 1, 3, 5 out of it.
                numbers = [2 * number + 2, 2 * number + 1] if len(phases) == 2 else [number + 1]
                for phase, shown in zip(phases, numbers, strict=True):
                    stored = pixels[..., 0].astype(np.uint16) * 4 + (shown % 2)
                    stored[0, 0] = 100 * place
                    path = folder / sequence / "DICOM_anon" / phase / f"IMG-0004-{shown:05d}.dcm"
                    write_dicom(path, stored, place, "MR")
                save(labels, folder / sequence / "Ground" / f"IMG-0004-{numbers[0]:05d}.png")


def spoil_chaos_mr(root: Path) -> Spoiled:
    folder = root / "Train_Sets/MR"
    shutil.rmtree(folder / "1/T2SPIR/Ground")
    return Spoiled(
        "MR/1/T2SPIR/Ground is missing",
        rename(folder / "2/T1DUAL/DICOM_anon/OutPhase/IMG-0004-00003.dcm", "IMG-3.dcm"),
        miscode(folder / "3/T1DUAL/Ground/IMG-0004-00004.png", 100),
    )


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("kidneyus", write_kidneyus, spoil_kidneyus, ("images",), 9, 8),
        Layout("autooral", write_autooral, spoil_autooral, ("Train/data_train", "Train/mask_train"), 9, 7),
        Layout("chaos-ct", write_chaos_ct, spoil_chaos_ct, ("Train_Sets/CT/5/DICOM_anon",), 24, 8),
        Layout("chaos-mr", write_chaos_mr, spoil_chaos_mr,
               ("Train_Sets/MR/2/T1DUAL/DICOM_anon/InPhase", "Train_Sets/MR/2/T1DUAL/Ground"), 72, 8),
        Layout("ph2", write_ph2, spoil_ph2, ("PH2 Dataset images",), 8, 8),
        Layout("drive", write_drive, spoil_drive, ("training/images", "test/images"), 7, 7),
        Layout("chase_db1", write_chase, spoil_chase, (), 10, 5),
        Layout("hrf", write_hrf, spoil_hrf, ("images", "manual1"), 8, 8),
        Layout("stare", write_stare, spoil_stare, ("stare-images", "labels-ah"), 8, 8),
        Layout("les_av", write_les_av, spoil_les_av, ("images", "vessel-segmentations"), 8, 8),
        Layout("dsb2018", write_dsb2018, spoil_dsb2018, ("stage1_train",), 8, 8),
    )
}  # fmt: skip
