"""The first sheet of an .xlsx workbook as text, for a set whose patients are told in one.

A workbook is a ZIP of XML (ECMA-376): texts lie in a table of their own, to which cells point.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from xml.etree import ElementTree

from common.errors import DataError

NAMESPACE = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
FIRST_SHEET, TEXTS = "xl/worksheets/sheet1.xml", "xl/sharedStrings.xml"


def read_rows(path: Path) -> list[dict[str, str]]:
    """One dict a row below the header, by the header's names; whole numbers have no ``.0``.

    Raises `DataError` for a file that is no workbook.
    """
    try:
        with zipfile.ZipFile(path) as book:
            texts = []
            if TEXTS in book.namelist():
                entries = ElementTree.fromstring(book.read(TEXTS)).iter(f"{NAMESPACE}si")
                texts = [
                    "".join(part.text or "" for part in entry.iter(f"{NAMESPACE}t")) for entry in entries
                ]
            sheet = ElementTree.fromstring(book.read(FIRST_SHEET))
            rows = [_cells(row, texts) for row in sheet.iter(f"{NAMESPACE}row")]
    except (OSError, KeyError, IndexError, ValueError, zipfile.BadZipFile, ElementTree.ParseError) as error:
        raise DataError(f"cannot be read as a workbook ({type(error).__name__}): restore it") from error
    header = rows[0] if rows else {}
    return [
        {name: row.get(column, "") for column, name in header.items()}
        for row in rows[1:]
        if any(row.values())
    ]


def _cells(row: ElementTree.Element, texts: list[str]) -> dict[str, str]:
    """Column letters -> text."""
    found = {}
    for cell in row.iter(f"{NAMESPACE}c"):
        value = cell.find(f"{NAMESPACE}v")
        if cell.get("t") == "inlineStr":
            text = "".join(part.text or "" for part in cell.iter(f"{NAMESPACE}t"))
        else:
            text = "" if value is None else value.text or ""
            text = texts[int(text)] if cell.get("t") == "s" and text else text
        found[re.sub(r"\d", "", cell.get("r", ""))] = re.sub(r"^(\d+)\.0+$", r"\1", text.strip())
    return found
