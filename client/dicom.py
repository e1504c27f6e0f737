"""DICOM: single files, multi-frame files and series folders, put in order and placed in the patient.

Voxel axes are (column, row, slice), so that the affine is that of the NIfTI file which the same scan would
give. Positions in DICOM are mm towards the left, the back and the head (PS3.3 C.7.6.2.1); ours are towards
the right, the front and the head.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.stacks import Affine, Grid, Stack, View
from common.errors import DataError

SUFFIXES = (".dcm", ".dicom", ".ima")
PREAMBLE = 128  # bytes before the letters that mark a DICOM file, whatever its name
LEFT_BACK_TO_RIGHT_FRONT = np.diag([-1.0, -1.0, 1.0, 1.0])
UNEVEN = 0.05  # of the distance between slices: more is a missing slice
TURNED = 1e-3  # of a direction's cosine: more is another orientation
NOT_IMAGES = {"SEG", "SR", "RTSTRUCT", "RTPLAN", "RTDOSE", "PR", "KO", "DOC"}  # modalities
SEQUENCE_OF_REGIONS = "SequenceOfUltrasoundRegions"
CENTIMETRES = 3  # the code of a physical unit in an ultrasound region
DICOM_VIEW = View(axis=2, down=1, across=0)


@dataclass(frozen=True)
class Frame:
    """One slice: which file and frame of it, and where its first pixel lies (left, back, head), if known."""

    path: Path
    number: int
    position: tuple[float, float, float] | None
    directions: tuple[float, ...] | None


def is_dicom(path: Path) -> bool:
    """By its suffix, or where it has none by the letters after the preamble."""
    if path.suffix.lower() in SUFFIXES:
        return True
    if path.suffix and not path.suffix[1:].isdigit():
        return False
    try:
        with path.open("rb") as file:
            return file.read(PREAMBLE + 4)[PREAMBLE:] == b"DICM"
    except OSError:
        return False


def read_header(path: Path) -> Any:
    """The data set without its pixels. Raises `DataError`."""
    return _dataset(path, stop_before_pixels=True)


def _dataset(path: Path, stop_before_pixels: bool = False) -> Any:
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        return pydicom.dcmread(path, stop_before_pixels=stop_before_pixels)
    except (InvalidDicomError, OSError, EOFError, ValueError, KeyError, NotImplementedError) as error:
        raise DataError(
            f"{path} cannot be read as DICOM ({type(error).__name__}): export it again."
        ) from error


def series_of(files: Sequence[Path]) -> tuple[list[list[Path]], list[str]]:
    """The files of each image series, in the order of the files, and what is wrong with those left out.

    Files that are no images (segmentations, reports) are passed over in silence.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    faults = []
    for path in files:
        try:
            header = read_header(path)
        except DataError as error:
            faults.append(error.message)
            continue
        if header.get("Modality") in NOT_IMAGES or "Rows" not in header:
            continue
        # A series may hold several orientations (a scout view first): each is a stack of its own.
        directions = np.round(np.array(header.get("ImageOrientationPatient") or [0] * 6, float), 2)
        loose = "" if header.get("ImagePositionPatient") else str(path)
        key = f"{path.parent}|{header.get('SeriesInstanceUID', path)}|{directions.tolist()}|{loose}"
        found[key].append(path)
    return list(found.values()), faults


class DicomStack(Stack):
    """The frames of one series, ordered along their normal; ``files`` in any order.

    CT is shown in the window of the first file's header, where it has one; everything else, and CT without
    a window, in its own numbers. The percentile stretch of every image follows either way.

    Raises:
        DataError: a file cannot be read, or the files do not make one stack: other sizes, orientations or
            spacings, two slices at one place.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        headers = {path: read_header(path) for path in files}
        self.first = headers[files[0]]
        self.files = list(files)
        self._agree(headers)
        self.frames = _ordered([frame for path in files for frame in _frames(path, headers[path])])
        rows, columns = int(self.first.Rows), int(self.first.Columns)
        self.count, self.size = len(self.frames), (rows, columns)
        self.spacing_mm = _spacing(self.first)
        placed = self.frames[0].position is not None and self.spacing_mm is not None
        self.grid = Grid((columns, rows, self.count), self._affine(placed), placed)
        self.view = DICOM_VIEW
        self.window = _window(self.first)
        self.whole_numbers = float(self.first.get("RescaleSlope", 1)).is_integer()
        self._held: tuple[Path, Any] | None = None

    def _agree(self, headers: dict[Path, Any]) -> None:
        names = ("Rows", "Columns", "PixelSpacing", "SamplesPerPixel")
        for path, header in headers.items():
            if "Rows" not in header or "Columns" not in header:
                raise DataError(f"{path} holds no image: leave it out.")
            for name in names:
                if header.get(name) != self.first.get(name):
                    raise DataError(
                        f"{path}: {name} is not that of the other files of its series: "
                        "put it in another folder."
                    )

    def _affine(self, placed: bool) -> Affine:
        row_mm, column_mm = self.spacing_mm or (1.0, 1.0)
        matrix = np.eye(4)
        if not placed:
            # Rows run down and columns to the left, as in any picture of a patient seen from the feet.
            matrix[:3, :3] = np.diag([-column_mm, -row_mm, 1.0])
            return matrix
        first, last = self.frames[0], self.frames[-1]
        assert first.directions is not None
        along, down = np.array(first.directions[:3]), np.array(first.directions[3:])
        matrix[:3, 0], matrix[:3, 1] = along * column_mm, down * row_mm
        matrix[:3, 2] = np.cross(along, down) * self._thickness()
        if self.count > 1:
            matrix[:3, 2] = np.subtract(last.position, first.position) / (self.count - 1)
        matrix[:3, 3] = first.position
        affine: Affine = LEFT_BACK_TO_RIGHT_FRONT @ matrix
        return affine

    def _thickness(self) -> float:
        measures = _shared(self.first, "PixelMeasuresSequence")
        for holder in (self.first, measures):
            for name in ("SpacingBetweenSlices", "SliceThickness"):
                if holder is not None and (value := holder.get(name)):
                    return abs(float(value))
        return 1.0

    @cached_property
    def gaps(self) -> list[int]:
        """Slices after which the distance is not that of the others: a NIfTI file could not hold them."""
        places = _places(self.frames)
        if places is None or len(places) < 3:
            return []
        steps = np.diff(places)
        usual = float(np.median(steps))
        return [index for index, step in enumerate(steps) if abs(step - usual) > UNEVEN * abs(usual)]

    def _white(self) -> float:
        return self.window[1] if self.window else super()._white()

    def stored(self, index: int) -> NDArray[np.float32]:
        frame = self.frames[index]
        dataset = self._pixels_of(frame.path)
        try:
            pixels = _decoded(dataset, frame.number)
        except Exception as error:  # pydicom's decoders raise whatever their libraries do
            raise DataError(
                f"{frame.path}: its pixels cannot be decoded ({type(error).__name__}): "
                "export it uncompressed, or again."
            ) from error
        if pixels.ndim == 3:
            return np.ascontiguousarray(pixels[..., :3].transpose(2, 0, 1))
        slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
        numbers = pixels * np.float32(slope) + np.float32(intercept)
        if self.window:
            low, width = self.window
            numbers = np.clip(numbers - np.float32(low), 0, width)
        if dataset.get("PhotometricInterpretation") == "MONOCHROME1":  # white is low there
            numbers = (self.window[1] if self.window else _top(dataset, slope, intercept)) - numbers
        return np.ascontiguousarray(numbers[None], dtype=np.float32)

    def _pixels_of(self, path: Path) -> Any:
        if self._held is None or self._held[0] != path:
            self._held = (path, _dataset(path))  # frames of one file follow each other: it is opened once
        return self._held[1]


def _decoded(dataset: Any, number: int) -> NDArray[np.float32]:
    """(H, W) or (H, W, 3); colour comes as RGB."""
    from pydicom.pixels import pixel_array

    several = int(dataset.get("NumberOfFrames") or 1) > 1
    pixels: NDArray[np.float32] = pixel_array(dataset, index=number if several else None).astype(np.float32)
    return pixels[0] if several and pixels.ndim > 3 else pixels


def _top(dataset: Any, slope: float, intercept: float) -> np.float32:
    return np.float32((2 ** int(dataset.BitsStored) - 1) * slope + intercept)


def _window(header: Any) -> tuple[float, float] | None:
    """(lowest number, width) of a CT's first window, PS3.3 C.11.2.1.2; None for other images."""
    if header.get("Modality") != "CT" or not header.get("WindowCenter") or not header.get("WindowWidth"):
        return None
    centre, width = (_first(header[name].value) for name in ("WindowCenter", "WindowWidth"))
    return (centre - 0.5 - (width - 1) / 2, width - 1) if width > 1 else None


def _first(value: Any) -> float:
    return float(value[0] if hasattr(value, "__getitem__") and not isinstance(value, str) else value)


def _shared(header: Any, name: str) -> Any:
    """The first item of a functional group that all frames share, or None."""
    groups = header.get("SharedFunctionalGroupsSequence")
    return groups[0][name].value[0] if groups and name in groups[0] else None


def _spacing(header: Any) -> tuple[float, float] | None:
    """(row, column) mm, from wherever this kind of image keeps it."""
    for holder in (header, _shared(header, "PixelMeasuresSequence")):
        for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
            if holder is not None and (value := holder.get(name)):
                return float(value[0]), float(value[1])
    regions = header.get(SEQUENCE_OF_REGIONS) or []
    if len(regions) == 1 and regions[0].get("PhysicalUnitsXDirection") == CENTIMETRES:
        region = regions[0]
        return 10 * abs(float(region.PhysicalDeltaY)), 10 * abs(float(region.PhysicalDeltaX))
    return None


def _frames(path: Path, header: Any) -> list[Frame]:
    groups = header.get("PerFrameFunctionalGroupsSequence")
    if groups:
        return [_grouped(path, header, number, group) for number, group in enumerate(groups)]
    count = int(header.get("NumberOfFrames") or 1)
    position, directions = header.get("ImagePositionPatient"), header.get("ImageOrientationPatient")
    if count > 1 or not position or not directions:
        return [Frame(path, number, None, None) for number in range(count)]
    return [Frame(path, 0, _three(position), tuple(float(value) for value in directions))]


def _grouped(path: Path, header: Any, number: int, group: Any) -> Frame:
    plane = group.get("PlanePositionSequence")
    turned = group.get("PlaneOrientationSequence")
    directions = turned[0] if turned else _shared(header, "PlaneOrientationSequence")
    if not plane or directions is None:
        return Frame(path, number, None, None)
    cosines = tuple(float(value) for value in directions.ImageOrientationPatient)
    return Frame(path, number, _three(plane[0].ImagePositionPatient), cosines)


def _three(value: Any) -> tuple[float, float, float]:
    return float(value[0]), float(value[1]), float(value[2])


def _ordered(frames: list[Frame]) -> list[Frame]:
    """Along the normal of the slices, whatever the files are called; as they are where nothing says where."""
    if len(frames) == 1 or all(frame.position is None for frame in frames):
        return frames
    first = frames[0]
    for frame in frames:
        if frame.directions is None or frame.position is None or first.directions is None:
            raise DataError(f"{frame.path} does not say where it lies: put it in another folder.")
        if np.abs(np.subtract(frame.directions, first.directions)).max() > TURNED:
            raise DataError(f"{frame.path} is turned against the other slices: put it in another folder.")
    places = _places(frames)
    assert places is not None
    order = np.argsort(places, kind="stable")
    close = np.diff(places[order]) < 1e-3
    if close.any():
        twice = frames[order[int(np.argmax(close)) + 1]]
        raise DataError(
            f"{twice.path} lies where another slice of its series lies: "
            "give each phase or echo a folder of its own."
        )
    return [frames[index] for index in order]


def _places(frames: Sequence[Frame]) -> NDArray[np.float64] | None:
    """mm of each frame along the normal, or None where the files do not say."""
    directions = frames[0].directions
    if directions is None:
        return None
    normal = np.cross(directions[:3], directions[3:])
    return np.array([np.dot(frame.position or (0, 0, 0), normal) for frame in frames])
