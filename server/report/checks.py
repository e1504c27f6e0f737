"""Every fault of a report, before a page is made from it."""

from __future__ import annotations

import base64
import binascii
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from server.report.schema import RunReport

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TESTED_ON = ("own", "all")


def faults(report: RunReport) -> list[str]:
    """Wrong types, numbers that are not finite, intervals and pictures that are none, unknown sites."""
    found = list(_wrong_types(report, RunReport, "report"))
    if found:  # the checks below rely on the types
        return found
    return [*_bad_cells(report), *_bad_pictures(report), *_unknown_sites(report)]


def _wrong_types(value: Any, hint: Any, where: str) -> Iterator[str]:
    if get_origin(hint) in (Union, UnionType):
        if value is not None:
            yield from _wrong_types(value, get_args(hint)[0], where)
    elif is_dataclass(hint) and isinstance(hint, type):
        hints = get_type_hints(hint)
        for item in fields(hint):
            yield from _wrong_types(getattr(value, item.name), hints[item.name], f"{where}.{item.name}")
    elif get_origin(hint) in (list, dict):
        container = get_origin(hint)
        if not isinstance(value, container):
            yield f"{where}: {value!r:.40} is no {container.__name__}"
            return
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, entry in entries:
            yield from _wrong_types(entry, get_args(hint)[-1], f"{where}[{key!r}]")
    elif hint in (int, float):
        kinds = int if hint is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
            yield f"{where}: {value!r:.40} is no finite number ({hint.__name__})"
    elif not isinstance(value, hint):
        yield f"{where}: {value!r:.40} is no {hint.__name__}"


def _bad_cells(report: RunReport) -> Iterator[str]:
    for index, cell in enumerate(report.benefit):
        where = f"benefit[{index}] ({cell.site}, {cell.model}, {cell.metric})"
        if cell.tested_on not in TESTED_ON:
            yield f"{where}: tested_on is {cell.tested_on!r}, not one of {TESTED_ON}"
        if cell.ci95 is not None and not (len(cell.ci95) == 2 and cell.ci95[0] <= cell.ci95[1]):
            yield f"{where}: ci95 {cell.ci95} is no interval [low, high]"
    keys = [(c.site, c.model, c.tested_on, c.metric, c.class_name) for c in report.benefit]
    for key, times in Counter(keys).items():
        if times > 1:
            yield f"benefit: {key} stands there {times} times"


def _bad_pictures(report: RunReport) -> Iterator[str]:
    for index, picture in enumerate(report.pictures):
        try:
            data = base64.b64decode(picture.png, validate=True)
        except (binascii.Error, ValueError):
            data = b""
        if not data.startswith(PNG_SIGNATURE):
            yield f"pictures[{index}] ({picture.site}): png is no PNG in base64"


def _unknown_sites(report: RunReport) -> Iterator[str]:
    """Rejections, messages and receipts may also be of sites that took no part, such as one that refused."""
    known = {site.id for site in report.sites}
    named: dict[str, set[str]] = {
        "benefit": {cell.site for cell in report.benefit},
        "students": set(report.students),
        "synthetic": set(report.synthetic),
        "privacy": set(report.privacy),
        "pictures": {picture.site for picture in report.pictures},
    }
    for index, record in enumerate(report.rounds):
        named[f"rounds[{index}]"] = {*record.sites, *record.losses}
    for where, sites in named.items():
        if unknown := sorted(sites - known):
            yield f"{where}: names sites that are not in sites: {', '.join(unknown)}"
