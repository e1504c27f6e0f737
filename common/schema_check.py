"""Plain values against a dataclass: every fault at once, and the instance that remains.

A value that is wrong is reported and left at its default, so that one mistake does not hide the next.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import StrEnum
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong. ``key`` is a dotted path (``sites[0].name``), empty for the whole file."""

    key: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.key}: {self.what}; {self.fix}" if self.key else f"{self.what}; {self.fix}"


_WRONG = object()
_SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def read_section(kind: type, value: Any) -> tuple[Any, list[Fault]]:
    """An instance of the dataclass ``kind`` from plain values, and every fault found on the way.

    Each field of ``kind``, and of the sections below it, must have a default.
    """
    faults: list[Fault] = []
    section = _read(kind, value, "", None, kind, faults)
    return (kind() if section is _WRONG else section), faults


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known name that ``word`` most likely means, or None."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return close[0] if close else None


def choose_from(word: str, known: Sequence[str]) -> str:
    """The fix for a name that is not among ``known``: the nearest one first, then all."""
    close = nearest(word, known)
    choices = f"choose from {', '.join(known)}"
    return f"did you mean {close}? {choices}" if close else choices


def _read(kind: Any, value: Any, key: str, example: Any, root: type, faults: list[Fault]) -> Any:
    if get_origin(kind) in (Union, UnionType):
        if value is None:
            return None
        kind = next(arm for arm in get_args(kind) if arm is not type(None))
    if is_dataclass(kind) and isinstance(kind, type):
        return _read_dataclass(kind, value, key, root, faults)
    if get_origin(kind) is list:
        return _read_list(get_args(kind)[0], value, key, root, faults)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        choices = [str(member) for member in kind]
        if value in choices:
            return kind(value)
        faults.append(Fault(key, f"{value!r} is not a choice", choose_from(str(value), choices)))
        return _WRONG
    return _read_scalar(kind, value, key, example, faults)


def _read_dataclass(kind: type, value: Any, key: str, root: type, faults: list[Fault]) -> Any:
    known = {item.name: item for item in fields(kind)}
    if not isinstance(value, Mapping):
        what = "is empty" if value is None else f"expects a section, not {value!r}"
        fix = f"give it keys ({', '.join(list(known)[:4])}, ...) or delete the line"
        faults.append(Fault(key, what, fix))
        return _WRONG
    hints = get_type_hints(kind)
    read: dict[str, Any] = {}
    for name, entry in value.items():
        path = f"{key}.{name}" if key else str(name)
        if name not in known:
            faults.append(Fault(path, "unknown key", _suggest_key(str(name), key, list(known), root)))
            continue
        item = _read(hints[name], entry, path, _default(known[name]), root, faults)
        if item is not _WRONG:
            read[name] = item
    return kind(**read)


def _read_list(kind: Any, value: Any, key: str, root: type, faults: list[Fault]) -> Any:
    if not isinstance(value, list):
        faults.append(
            Fault(key, f"expects a list, not {value!r}", "write it as [a, b] or one '- item' a line")
        )
        return _WRONG
    before = len(faults)
    items = [_read(kind, entry, f"{key}[{index}]", None, root, faults) for index, entry in enumerate(value)]
    wrong_items = [item for item in items if item is _WRONG]
    # A list of sections keeps its good ones; a list of numbers means something only as a whole.
    if wrong_items and not (is_dataclass(kind) and len(faults) > before):
        return _WRONG
    return [item for item in items if item is not _WRONG]


def _read_scalar(kind: Any, value: Any, key: str, example: Any, faults: list[Fault]) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is kind and not (kind is float and not math.isfinite(value)):
        return value
    fix = "put it in quotes" if kind is str and isinstance(value, bool | int | float) else "correct it"
    if example is not None and kind is not str:
        fix = f"write it as in {key}={str(example).lower() if kind is bool else example}"
    faults.append(Fault(key, f"expects {_SCALARS[kind]}, not {value!r}", fix))
    return _WRONG


def _default(item: Field[Any]) -> Any:
    return None if item.default is MISSING else item.default


def _suggest_key(name: str, section: str, siblings: list[str], root: type) -> str:
    """The same key in another section; else a sibling that looks like it; else a key elsewhere that does."""
    by_leaf = {path.rpartition(".")[2]: path for path in reversed(list(known_keys(root)))}
    if name in by_leaf:
        return f"did you mean {by_leaf[name]}?"
    close = nearest(name, siblings)
    if close:
        return f"did you mean {section + '.' if section else ''}{close}?"
    leaf = nearest(name, list(by_leaf))
    if leaf:
        return f"did you mean {by_leaf[leaf]}?"
    return f"known keys here: {', '.join(siblings)}"


def known_keys(kind: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a schema; the items of a list of sections stand as ``[0]``."""
    hints = get_type_hints(kind)
    for item in fields(kind):
        path = f"{prefix}{item.name}"
        yield path
        inner, here = hints[item.name], path
        if get_origin(inner) in (Union, UnionType):
            inner = next(arm for arm in get_args(inner) if arm is not type(None))
        if get_origin(inner) is list:
            inner, here = get_args(inner)[0], f"{path}[0]"
        if is_dataclass(inner) and isinstance(inner, type):
            yield from known_keys(inner, f"{here}.")
