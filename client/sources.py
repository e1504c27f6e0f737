"""What a folder holds to segment: pictures, NIfTI files and DICOM series, each with the name of its mask."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from client import dicom, nifti
from client.dicom import DicomStack
from client.images import READERS, is_nifti, open_stack
from client.stacks import Stack
from common.errors import DataError


class Kind(StrEnum):
    picture = "picture"
    nifti = "nifti"
    dicom = "dicom"


@dataclass(frozen=True)
class Source:
    """One image to segment.

    Attributes:
        path: what messages name: the file, or the folder of a series.
        files: of a DICOM series, in any order.
        name: of its mask, without a suffix.
    """

    path: Path
    kind: Kind
    files: tuple[Path, ...]
    name: str = ""

    def open(self, axis: int | None = None) -> Stack:
        """Raises `DataError`."""
        if self.kind is Kind.dicom:
            return DicomStack(self.files)
        return open_stack(self.path, axis)


def source_of(path: Path) -> Source:
    """One image of a manifest."""
    if path.is_dir():
        series, _ = dicom.series_of(sorted(file for file in path.iterdir() if file.is_file()))
        return Source(path, Kind.dicom, tuple(file for files in series for file in files), path.name)
    return Source(path, _kind_of(path) or Kind.picture, (path,), _stem(path))


def find_sources(folder: Path) -> tuple[list[Source], list[str]]:
    """Pictures first, then scans, each by name; and what is wrong with the DICOM files that were left out.

    Pictures and NIfTI files are those of the folder itself; DICOM files also those of the folders in it, one
    source a series.
    Raises `DataError` if ``folder`` is no folder or there is nothing in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder of images: correct the path")
    here = sorted(path for path in folder.iterdir() if path.is_file())
    kinds = {path: _kind_of(path) for path in here}
    found = [
        Source(path, kind, (path,), _stem(path))
        for kind in (Kind.picture, Kind.nifti)
        for path in here
        if kinds[path] is kind
    ]
    series, faults = _series(folder)
    found += series
    if not found and not faults:
        known = ", ".join([*READERS, *nifti.SUFFIXES, *dicom.SUFFIXES])
        raise DataError(f"{folder} has no image: the files must end in one of {known}")
    return _named(found), faults


def _kind_of(path: Path) -> Kind | None:
    if path.suffix.lower() in READERS:
        return Kind.picture
    if is_nifti(path):
        return Kind.nifti
    return Kind.dicom if dicom.is_dicom(path) else None


def _series(folder: Path) -> tuple[list[Source], list[str]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _kind_of(path) is Kind.dicom)
    series, faults = dicom.series_of(files)
    found = []
    for paths in series:
        parent = paths[0].parent
        # A file alone in its folder's series is named after itself, a series after its folder.
        name = (
            _stem(paths[0]) if len(paths) == 1 else "-".join(parent.relative_to(folder).parts) or parent.name
        )
        found.append(Source(paths[0] if len(paths) == 1 else parent, Kind.dicom, tuple(paths), name))
    return found, faults


def _stem(path: Path) -> str:
    return path.name[: -len(".nii.gz")] if path.name.lower().endswith(".nii.gz") else path.stem


def _named(sources: list[Source]) -> list[Source]:
    """Each mask gets a name of its own: the whole file's name where two share a stem, then a number."""
    stems = Counter(source.name.lower() for source in sources)
    if max(stems.values(), default=0) > 1:
        sources = [
            replace(source, name=source.path.name) if source.path.is_file() else source for source in sources
        ]
    counted: Counter[str] = Counter()
    named = []
    for source in sources:
        counted[source.name.lower()] += 1
        number = counted[source.name.lower()]
        named.append(replace(source, name=f"{source.name}-{number}") if number > 1 else source)
    return named
