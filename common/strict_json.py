"""JSON from another machine into a dataclass, or an `ArtefactError` that repeats nothing of it."""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass
from enum import StrEnum
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from common.errors import ArtefactError
from common.plan import hints_of, rebuild

MAX_JSON = 4 << 20  # characters

_T = TypeVar("_T")


def parse_strictly(text: object, what: str) -> Any:
    """Plain values. Refuses what is no text, too long, not JSON, repeats a key or is not finite."""
    if not isinstance(text, str):
        raise ArtefactError(f"the message carries no {what}")
    if len(text) > MAX_JSON:
        raise ArtefactError(f"the message's {what} is longer than {MAX_JSON} characters")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"the message's {what} is not plain JSON") from error


def read_strictly(text: object, kind: type[_T], what: str) -> _T:
    """A ``kind`` (dataclass, list or dict of them) with exactly its fields, each of its annotated type."""
    parsed = parse_strictly(text, what)
    try:
        value = rebuild(kind, parsed)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ArtefactError(f"the message's {what} has not the fields it should have") from error
    if not conforms(kind, value):
        raise ArtefactError(f"a field of the message's {what} has the wrong type")
    result: _T = value
    return result


def conforms(kind: Any, value: Any) -> bool:
    """Whether ``value`` is of the annotated type all the way down; numbers must be finite."""
    origin, arms = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(conforms(arm, value) for arm in arms)
    if origin is list:
        return isinstance(value, list) and all(conforms(arms[0], entry) for entry in value)
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(arms) and all(map(conforms, arms, value))
    if origin is dict:
        return isinstance(value, dict) and all(conforms(arms[1], entry) for entry in value.values())
    if isinstance(kind, type) and is_dataclass(kind):
        hints = hints_of(kind)
        return isinstance(value, kind) and all(
            conforms(hints[item.name], getattr(value, item.name)) for item in fields(kind)
        )
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return isinstance(value, kind)
    return type(value) is kind


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a repeated key")
    return found


def _refuse_constant(_: str) -> float:
    raise ValueError("a number that is not finite")
