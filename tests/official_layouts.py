"""Small copies of public sets: the folders, names, formats and codings in which they are handed out."""

from __future__ import annotations

import csv
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np

from tests.official_pixels import SHAPE, Layout, Mask, Spoiled, grey, miscode, rename, save, scene
from tests.official_scans import spoil_chaos_ct, spoil_chaos_mr, write_chaos_ct, write_chaos_mr

SHEET = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"


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
