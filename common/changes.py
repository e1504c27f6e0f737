"""What differs between two nested values of plain data, key by key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def changes(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of everything that differs; a list counts as one value.

    A key that one of the two lacks has the value None there.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            yield from changes(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
    elif old != new:
        yield key, old, new
