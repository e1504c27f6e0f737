"""A set's folders as they were handed out, and everything that is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Pixels:
    """Numbers that are not read yet.

    Attributes:
        where: the file or folder that they come from, for messages.
        read: returns them. Raises `DataError` whose text goes on after ``where``; its ``faults``, if it has
            any, begin with names of files in ``where``.
    """

    where: str
    read: Callable[[], Array]


@dataclass(frozen=True)
class FileKind:
    """How a set names one kind of its files.

    Attributes:
        name: with ``{}`` for the key that an image and its mask have in common.
        key: a regular expression for keys.
        example: one key.
        read: reads one.
        beside: a regular expression for files of the same suffix that lie there too and are not read.
    """

    folder: str
    name: str
    key: str
    example: str
    read: Callable[[Path], Array]
    beside: str = ""

    def path(self, key: str) -> str:
        return f"{self.folder}/{self.name.format(key)}".removeprefix("./")


class Source:
    """A folder to look into; what is found wrong is collected, never raised, so that all of it can be told.

    Attributes:
        root: the folder in which the set's own begin; see `step_into`.
        faults: one line each, with the path from the folder that the user named, and the fix.
        notes: what the user should know and nothing has to be done about.
        also_read: what is no part of an image with its mask, but is read for the faults in it.
    """

    def __init__(self, root: Path) -> None:
        self.root = self.top = root
        self.faults: list[str] = []
        self.notes: list[str] = []
        self.also_read: list[Pixels] = []
        if not root.is_dir():
            self.faults.append(
                f"the folder {root} is missing: name the folder that the set was unpacked into"
            )

    def name_of(self, path: Path) -> str:
        """The path from the folder that the user named, with slashes."""
        name = path.relative_to(self.top).as_posix()
        return "the folder" if name == "." else name

    def fault(self, path: Path, text: str) -> None:
        self.faults.append(f"{self.name_of(path)} {text}")

    def missing_file(self, path: Path) -> None:
        """A fault that also says what is in the folder in its place: it may have been renamed."""
        others = sorted(other.name for other in path.parent.glob(f"*{path.suffix}"))
        there = f" (there is {', '.join(others)})" if others else ""
        self.fault(path, f"is missing{there}: restore the file or its name")

    def step_into(self, *names: str) -> None:
        """Make a folder below the root the root, if one of ``names`` is there: archives differ in it."""
        for name in names:
            if (self.root / name).is_dir():
                self.root = self.root / name
                return

    def folder(self, *choices: str) -> Path | None:
        """The first of ``choices`` that is a folder, or None and a fault that names the first."""
        for choice in choices:
            if (self.root / choice).is_dir():
                return self.root / choice
        if self.root.is_dir():
            self.fault(self.root / choices[0], "is missing: unpack the whole set again")
        return None

    def subfolders(self, folder: Path | None) -> list[Path]:
        """Folders in ``folder``, numbers in their order; hidden ones are left out."""
        if folder is None or not folder.is_dir():
            return []
        found = [path for path in folder.iterdir() if path.is_dir() and not _hidden(path)]
        return sorted(found, key=_natural)

    def files(self, folder: Path | None, pattern: str, example: str, beside: str = "") -> dict[str, Path]:
        """What ``pattern``'s first group matches -> the file, for each file named as ``example``.

        A file with the example's suffix and another name is a fault, unless ``beside`` matches it; what has
        another suffix is not ours.
        """
        if folder is None:
            return {}
        found: dict[str, Path] = {}
        suffix = Path(example).suffix.lower()
        for path in sorted(folder.iterdir(), key=_natural):
            if not path.is_file() or _hidden(path):
                continue
            if match := re.fullmatch(pattern, path.name, re.IGNORECASE):
                key = match[1]
                if key in found:
                    self.fault(path, f"is there twice, {found[key].name} being the same: remove one")
                found[key] = path
            elif path.suffix.lower() == suffix and not re.fullmatch(beside, path.name, re.IGNORECASE):
                self.fault(
                    path, f"is not named as the set names its files (like {example}): restore its name"
                )
        return found

    def pixels(self, path: Path, read: Callable[[Path], Array]) -> Pixels:
        return Pixels(self.name_of(path), partial(read, path))

    def pairs(self, images: FileKind, masks: FileKind) -> list[tuple[str, Pixels, Pixels]]:
        """(key, image, mask) of every key that has both.

        A missing folder is one fault, not one for each file that it should hold; in a folder that is there
        a missing partner is one. What has no partner is read all the same, for the faults in it.
        """
        kinds = images, masks
        folders = [self.folder(kind.folder) for kind in kinds]
        found = [
            self.files(folder, _pattern(kind), kind.name.format(kind.example), kind.beside)
            for folder, kind in zip(folders, kinds, strict=True)
        ]
        for folder, kind, files in zip(folders, kinds, found, strict=True):
            if folder is not None and not files:
                self.fault(
                    folder, f"holds no file like {kind.name.format(kind.example)}: unpack the whole set again"
                )
        read = [
            {key: self.pixels(path, kind.read) for key, path in files.items()}
            for files, kind in zip(found, kinds, strict=True)
        ]
        for mine, other, what in ((0, 1, "has no mask"), (1, 0, "is a mask without its image")):
            for key in read[mine].keys() - read[other].keys():
                if folders[other] is not None:
                    self.fault(found[mine][key], f"{what} {kinds[other].path(key)}: restore it")
                self.also_read.append(read[mine][key])
        return [(key, image, read[1][key]) for key, image in read[0].items() if key in read[1]]


def _pattern(kind: FileKind) -> str:
    return re.escape(kind.name).replace(r"\{\}", f"({kind.key})")


def _hidden(path: Path) -> bool:
    """Of the system, not of the set."""
    return path.name.startswith(".") or path.name in ("__MACOSX", "Thumbs.db")


def _natural(path: Path) -> tuple[tuple[int, str], ...]:
    """``9`` before ``10``."""
    parts = re.split(r"(\d+)", path.name.lower())
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in parts)
