"""The file formats of public sets: pictures, masks, a workbook."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.preparation.pictures import read_binary, read_picture
from client.preparation.workbook import read_rows
from common.errors import DataError
from tests import official_layouts as official
from tests.official_pixels import grey, save


def test_a_workbook_is_read_as_text(tmp_path: Path) -> None:
    path = tmp_path / "book.xlsx"
    official.write_workbook(path, [["Name", "Number"], ["a", 1], ["b", 22]])
    assert read_rows(path) == [{"Name": "a", "Number": "1"}, {"Name": "b", "Number": "22"}]
    header = '<row><c r="A1" t="inlineStr"><is><t>N</t></is></c></row>'
    sheet = f'<worksheet xmlns="{official.SHEET}"><sheetData>{header}'
    with zipfile.ZipFile(path, "w") as book:
        book.writestr(
            "xl/worksheets/sheet1.xml", f'{sheet}<row><c r="A2"><v>7.0</v></c></row></sheetData></worksheet>'
        )
    assert read_rows(path) == [{"N": "7"}]


def test_masks_may_be_one_bit_grey_a_palette_or_three_equal_channels(tmp_path: Path) -> None:
    disc = np.zeros((9, 11), bool)
    disc[2:5, 3:8] = True
    labels = grey(disc)
    save(disc, tmp_path / "bit.png")
    save(labels, tmp_path / "grey.gif")
    save(np.stack([labels] * 3, axis=2), tmp_path / "colour.bmp")
    Image.fromarray(labels).convert("P").save(tmp_path / "palette.png")
    for path in tmp_path.iterdir():
        assert np.array_equal(read_binary(path), labels), path.name


def test_a_mask_in_colour_is_refused(tmp_path: Path) -> None:
    save(np.dstack([np.full((4, 4), value, np.uint8) for value in (0, 255, 0)]), tmp_path / "a.png")
    with pytest.raises(DataError, match="in colour"):
        read_binary(tmp_path / "a.png")


def test_a_grey_picture_stays_grey_and_alpha_goes(tmp_path: Path) -> None:
    ramp = np.arange(20, dtype=np.uint8).reshape(4, 5)
    save(np.dstack([ramp, np.full_like(ramp, 9)]), tmp_path / "la.png")
    assert np.array_equal(read_picture(tmp_path / "la.png"), ramp)
