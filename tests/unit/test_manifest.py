"""The manifest: what it may say, and every fault found at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from client.manifest import FaultKind, ManifestCheck, check_manifest, describe_manifest, read_manifest
from client.manifest_rows import parse_spacing
from client.patients import Split
from client.splits import assign_splits, split_sizes
from common.errors import DataError
from common.recipe import ClassConfig

CLASSES = [ClassConfig("lesion", 255, "region")]
HEADER = "image,mask,patient,split,spacing_mm,group"


def picture(path: Path, seed: int, shape: tuple[int, ...] = (12, 16)) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path.name


def mask_of(path: Path, label: int = 255, shape: tuple[int, int] = (12, 16)) -> str:
    labels = np.zeros(shape, np.uint8)
    labels[3:6, 4:9] = label
    Image.fromarray(labels).save(path)
    return path.name


def manifest(folder: Path, lines: list[str], header: str = HEADER) -> Path:
    path = folder / "manifest.csv"
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def clean_lines(folder: Path) -> list[str]:
    lines = []
    for number, split in enumerate(["train", "train", "test"]):
        image = picture(folder / f"clean{number}.png", seed=number)
        lines.append(f"{image},{mask_of(folder / f'clean{number}_mask.png')},clean{number},{split},0.5,a")
    return lines


def found(check: ManifestCheck, kind: FaultKind) -> list[tuple[int, bool]]:
    return [(fault.line, fault.warning) for fault in check.faults if fault.kind is kind]


def test_a_clean_manifest_has_no_fault(tmp_path: Path) -> None:
    check = check_manifest(manifest(tmp_path, clean_lines(tmp_path)), CLASSES, min_patients=2)
    assert check.ok
    assert check.faults == ()
    assert (check.images, check.patients) == (3, 3)


def planted(folder: Path) -> Path:
    """A manifest with every fault of the contract; line 1 is the header, lines 2 to 4 are clean."""
    good = mask_of(folder / "good_mask.png")
    (folder / "broken.png").write_bytes(b"\x89PNG no picture")
    lines = clean_lines(folder)
    whole = (folder / "clean0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    holed = np.full((12, 16), 0.5, np.float32)
    holed[2, 2] = np.nan
    Image.fromarray(holed).save(folder / "nan.tif")
    Image.fromarray(np.zeros((12, 16), np.uint8)).save(folder / "empty.png")
    Image.open(folder / "clean0.png").convert("RGB").save(folder / "copy.tif")  # same pixels, another file
    lines += [
        f"absent.png,{good},p5,train,,",  # 5
        f"broken.png,{good},p6,train,,",  # 6
        f"cut.png,{good},p7,train,,",  # 7
        f"{picture(folder / 'wide.png', 20, (10, 16))},{good},p8,train,,",  # 8
        f"{picture(folder / 'label.png', 21)},{mask_of(folder / 'seven.png', 7)},p9,train,,",  # 9
        f"{picture(folder / 'none.png', 22)},empty.png,p10,train,,",  # 10
        f"copy.tif,{good},p11,test,,",  # 11: copy of line 2, another patient and split
        f"clean1.png,{good},clean1,train,,",  # 12: copy of line 3 within its patient and split
        f"{picture(folder / 'both.png', 23)},{good},clean2,train,,",  # 13: clean2 is in test
        f"nan.tif,{good},p14,train,,",  # 14
        f"{picture(folder / 'maskless.png', 24)},absent_mask.png,p15,train,,",  # 15
        f"{picture(folder / 'unlabelled.png', 25)},,p16,train,,",  # 16: no fault
    ]
    return manifest(folder, lines)


def test_every_planted_fault_of_the_contract_is_found_at_once(tmp_path: Path) -> None:
    check = check_manifest(planted(tmp_path), CLASSES, min_patients=99)
    assert found(check, FaultKind.missing_file) == [(5, False), (15, False)]
    assert found(check, FaultKind.unreadable_file) == [(6, False), (7, False)]
    assert found(check, FaultKind.size_mismatch) == [(8, False)]
    assert found(check, FaultKind.undeclared_label) == [(9, False)]
    assert found(check, FaultKind.empty_mask) == [(10, True)]
    assert found(check, FaultKind.duplicate_pixels) == [(11, False), (12, True)]
    assert found(check, FaultKind.patient_in_two_splits) == [(13, False)]
    assert found(check, FaultKind.not_finite) == [(14, False)]
    assert found(check, FaultKind.too_few_patients) == [(0, False)]
    assert len(check.faults) == 12, "a fault that was not planted, or one told twice"
    assert not check.ok
    assert len(check.warnings) == 2


def test_each_fault_says_what_and_the_fix(tmp_path: Path) -> None:
    check = check_manifest(planted(tmp_path), CLASSES, min_patients=99)
    texts = {fault.kind: str(fault) for fault in check.faults}
    assert "line 9: mask seven.png has undeclared labels 7" in texts[FaultKind.undeclared_label]
    assert "data.classes" in texts[FaultKind.undeclared_label]
    assert "10x16" in texts[FaultKind.size_mismatch]
    assert "12x16" in texts[FaultKind.size_mismatch]
    assert "data.min_patients" in texts[FaultKind.too_few_patients]
    copies = [str(fault) for fault in check.faults if fault.kind is FaultKind.duplicate_pixels]
    assert "line 2, of another patient and in another split" in copies[0]


def test_the_check_as_json(tmp_path: Path) -> None:
    value = json.loads(json.dumps(check_manifest(planted(tmp_path), CLASSES, min_patients=2).to_json()))
    assert value["ok"] is False
    assert value["images"] == 15
    fault = next(item for item in value["faults"] if item["kind"] == "empty_mask")
    assert fault["line"] == 10
    assert fault["warning"] is True


def test_faults_of_the_text_and_of_the_images_are_told_together(tmp_path: Path) -> None:
    lines = clean_lines(tmp_path)
    lines += ["gone.png,,,sideways,-1,x", ",,p,train,,", "clean0.png,clean0_mask.png"]
    check = check_manifest(manifest(tmp_path, lines), CLASSES, min_patients=1)
    assert [line for line, _ in found(check, FaultKind.row)] == [5, 5, 6, 7]
    assert found(check, FaultKind.split_name) == [(5, False)]
    assert found(check, FaultKind.missing_file) == [(5, False)]


def test_reading_lists_all_faults_of_the_text(tmp_path: Path) -> None:
    lines = [
        "a.png,,,train,,",
        "a.png,,p,holdout,,",
        "a.png,,p,train,0.5x,",
        "a.png,,q,,,",
        "a.png,,r,train,1x2x3,",
        "b.png,,r,test,nan,",
    ]
    with pytest.raises(DataError) as caught:
        read_manifest(manifest(tmp_path, lines))
    told = "\n".join(caught.value.faults)
    words = [(2, "patient"), (3, "holdout"), (4, "0.5x"), (5, "no split"), (6, "1x2x3"), (7, "nan")]
    for line, word in [*words, (7, "test and train")]:
        assert any(fault.startswith(f"line {line}:") and word in fault for fault in caught.value.faults), told
    assert len(caught.value.faults) == 7, told


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image,patient\na.png,p\n", "no column 'mask'"),
        ("picture,mask\na.png,b.png\n", "no column 'image'"),
        ("image,mask,patient,spliit\na.png,,p,train\n", "did you mean 'split'"),
        ("image,mask,patient,patient\na.png,,p,q\n", "comes twice"),
        ("image,mask,patient\n", "lists no image"),
        ("", "lists no image"),
        ('image,mask,patient\n"a.png,,p\n', "not a CSV"),
    ],
)
def test_a_broken_table_is_named(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "manifest.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=expected):
        read_manifest(path)
    assert not check_manifest(path, CLASSES, 0).ok


def test_a_manifest_that_is_absent_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be opened"):
        read_manifest(tmp_path / "none.csv")
    (tmp_path / "image.csv").write_bytes(b"\x89PNG\xff\xfe\x00")
    with pytest.raises(DataError, match="not a CSV"):
        read_manifest(tmp_path / "image.csv")


def test_rows_as_read(tmp_path: Path) -> None:
    path = tmp_path / "manifest.csv"
    # A byte-order mark (Excel), blank lines, spaces, a quoted comma and a column of the site's own.
    text = "\ufeffimage,mask,patient,split,spacing_mm,group,note\n\n" + (
        'sub/a.png, m.png ,p1,val,0.5x0.7,"left, upper",fine\nb.png,,p2,test,2,,\n'
    )
    path.write_text(text, encoding="utf-8")
    first, second = read_manifest(path).rows
    assert first.image == tmp_path / "sub" / "a.png"
    assert first.mask == tmp_path / "m.png"
    assert (first.line, first.patient, first.split, first.group) == (3, "p1", Split.val, "left, upper")
    assert first.spacing_mm == (0.5, 0.7)
    assert (second.mask, second.spacing_mm) == (None, (2.0, 2.0))


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_spacing_round_trip(row: float, column: float) -> None:
    assert parse_spacing(f"{row!r}x{column!r}") == (row, column)
    assert parse_spacing(repr(row)) == (row, row)


@pytest.mark.parametrize("text", ["0", "-1", "x", "1x", "1x2x3", "inf", "nan", "a", "1x0"])
def test_spacing_without_meaning(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - float's own text
        parse_spacing(text)


def test_too_few_patients_without_a_split_column(tmp_path: Path) -> None:
    lines = [",".join(line.split(",")[:3]) for line in clean_lines(tmp_path)]
    path = manifest(tmp_path, lines, "image,mask,patient")
    assert check_manifest(path, CLASSES, min_patients=2).ok  # three patients deal as 2 + 0 + 1
    check = check_manifest(path, CLASSES, min_patients=3)
    assert found(check, FaultKind.too_few_patients) == [(0, False)]
    only = manifest(tmp_path, lines[:1], "image,mask,patient")
    assert len(found(check_manifest(only, CLASSES, min_patients=2), FaultKind.too_few_patients)) == 2


def test_unlabelled_patients_do_not_count_as_training_patients(tmp_path: Path) -> None:
    lines = [line.replace(f"clean{n}_mask.png", "") for n, line in enumerate(clean_lines(tmp_path))]
    check = check_manifest(manifest(tmp_path, lines), CLASSES, min_patients=1)
    assert found(check, FaultKind.too_few_patients) == [(0, False), (0, True)]


def test_a_copy_within_a_patient_across_splits_is_an_error(tmp_path: Path) -> None:
    image = picture(tmp_path / "a.png", 50)
    lines = [*clean_lines(tmp_path), f"{image},,p,train,,", f"{image},,p,test,,"]
    check = check_manifest(manifest(tmp_path, lines), CLASSES, 2)
    assert found(check, FaultKind.duplicate_pixels) == [(6, False)]
    assert found(check, FaultKind.patient_in_two_splits) == [(6, False)]


def test_a_turned_image_is_no_duplicate(tmp_path: Path) -> None:
    lines = clean_lines(tmp_path)
    Image.open(tmp_path / "clean0.png").transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png")
    lines.append("turned.png,,p,train,,")
    assert check_manifest(manifest(tmp_path, lines), CLASSES, 2).ok


def test_description(tmp_path: Path) -> None:
    path = manifest(
        tmp_path, [*clean_lines(tmp_path), f"{picture(tmp_path / 'u.png', 9)},,u,train,0.5x0.7,b"]
    )
    value = describe_manifest(path, CLASSES)
    assert (value["patients"], value["images"], value["labelled"]) == (4, 4, 3)
    assert value["splits"]["train"] == {"patients": 3, "images": 3, "labelled": 2}
    assert value["sizes"] == {"12x16": 4}
    assert value["spacing_mm"] == {"0.5x0.5": 3, "0.5x0.7": 1}
    assert value["groups"] == {"a": 3, "b": 1}
    assert value["foreground_share"] == {"lesion": round(15 / (12 * 16), 5)}
    assert 0.4 < value["intensity"]["p50"] < 0.6
    assert json.dumps(value)


@given(st.integers(2, 500))
def test_every_split_of_two_or_more_has_train_and_test(labelled: int) -> None:
    train, val, test = split_sizes(labelled)
    assert train + val + test == labelled
    assert train >= 1
    assert test >= 1
    assert abs(test - 0.25 * labelled) <= 0.5 or labelled == 2
    assert abs(train - 0.60 * labelled) <= 1.5


@given(st.permutations([f"p{number}" for number in range(9)]), st.integers(0, 5))
def test_the_deal_does_not_depend_on_the_order_of_patients(patients: list[str], seed: int) -> None:
    assert assign_splits(patients, ["u"], seed) == assign_splits(sorted(patients), ["u"], seed)


def test_the_deal_depends_on_the_seed_and_keeps_the_unlabelled_in_train() -> None:
    names = [f"p{number}" for number in range(20)]
    deals = {tuple(sorted(assign_splits(names, ["u"], seed).items())) for seed in range(5)}
    assert len(deals) > 1
    assert all(dict(deal)["u"] == Split.train for deal in deals)
    with pytest.raises(DataError, match="label at least two"):
        assign_splits(["p"], names, 0)
