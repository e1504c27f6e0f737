"""Small scans for tests: DICOM series and NIfTI volumes with an object at a place that is known in mm."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid
from scipy.spatial.transform import Rotation

DARK, BRIGHT = 100, 900


@dataclass(frozen=True)
class Placing:
    """A DICOM stack in space: mm left, back, head. ``turn``: Euler angles in degrees."""

    rows: int = 40
    columns: int = 32
    slices: int = 6
    spacing: tuple[float, float] = (1.5, 0.8)  # between rows, between columns
    step: float = 4.0
    turn: tuple[float, float, float] = (20.0, -15.0, 30.0)
    corner: tuple[float, float, float] = (-30.0, 12.0, 55.0)
    tags: dict[str, Any] = field(default_factory=dict)

    @property
    def directions(self) -> NDArray[np.float64]:
        """Columns: along a row, down a column, to the next slice."""
        return Rotation.from_euler("xyz", self.turn, degrees=True).as_matrix()

    def place(self, row: float, column: float, number: float) -> NDArray[np.float64]:
        """mm left, back, head of a voxel's centre, by the standard's equation (PS3.3 C.7.6.2.1.1)."""
        offsets = np.array([column * self.spacing[1], row * self.spacing[0], number * self.step])
        place: NDArray[np.float64] = np.array(self.corner) + self.directions @ offsets
        return place


def planted(shape: tuple[int, ...], low: tuple[int, ...], high: tuple[int, ...]) -> NDArray[np.uint16]:
    """A bright box from voxel ``low`` to below ``high`` on a dark ground that is not quite even."""
    volume = np.full(shape, DARK, np.uint16) + np.random.default_rng(0).integers(0, 10, shape, np.uint16)
    volume[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = BRIGHT
    return volume


def write_series(folder: Path, volume: NDArray[np.uint16], placing: Placing, seed: int = 0) -> list[Path]:
    """(slices, rows, columns) as one file a slice; the names' order has nothing to do with the slices'."""
    folder.mkdir(parents=True, exist_ok=True)
    names = np.random.default_rng(seed).permutation(len(volume))
    series, study, frame = (generate_uid(entropy_srcs=[str(folder), part]) for part in ("a", "b", "c"))
    paths = []
    for number, pixels in enumerate(volume):
        dataset = picture(pixels, folder / f"IM{names[number]:04d}.dcm", generate_uid())
        dataset.SeriesInstanceUID, dataset.StudyInstanceUID = series, study
        dataset.FrameOfReferenceUID = frame
        dataset.InstanceNumber = int(names[number]) + 1
        dataset.PixelSpacing = list(placing.spacing)
        dataset.SliceThickness = placing.step
        along, down, _ = placing.directions.T
        dataset.ImageOrientationPatient = [round(float(value), 12) for value in (*along, *down)]
        dataset.ImagePositionPatient = [round(float(value), 9) for value in placing.place(0, 0, number)]
        for name, value in placing.tags.items():
            setattr(dataset, name, value)
        dataset.save_as(folder / f"IM{names[number]:04d}.dcm", enforce_file_format=True)
        paths.append(folder / f"IM{names[number]:04d}.dcm")
    return paths


def picture(pixels: NDArray[np.uint16], path: Path, uid: str, kind: str = MRImageStorage) -> FileDataset:
    """A grey image of one frame without a place."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = kind, uid
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    about: dict[str, Any] = {
        "SOPClassUID": kind, "SOPInstanceUID": uid, "Modality": "MR", "PatientID": "p",
        "PatientName": "P", "PatientBirthDate": "", "PatientSex": "", "StudyDate": "", "StudyTime": "",
        "StudyID": "1", "AccessionNumber": "", "ReferringPhysicianName": "", "SeriesNumber": 1,
        "InstanceNumber": 1, "StudyInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid(),
        "Manufacturer": "none", "PositionReferenceIndicator": "",
        "Rows": pixels.shape[0], "Columns": pixels.shape[1], "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 12, "HighBit": 11,
        "PixelRepresentation": 0,
    }  # fmt: skip
    for name, value in about.items():
        setattr(dataset, name, value)
    dataset.PixelData = np.ascontiguousarray(pixels).tobytes()
    return dataset


def segment_places(path: Path, number: int = 1) -> NDArray[np.float64]:
    """(n, 3) mm left, back, head of every marked voxel of one segment, from the object's own frames alone."""
    import pydicom

    found: Dataset = pydicom.dcmread(path)
    shared = found.SharedFunctionalGroupsSequence[0]
    frames = np.atleast_3d(found.pixel_array.reshape(-1, found.Rows, found.Columns))
    places = []
    for group, frame in zip(found.PerFrameFunctionalGroupsSequence, frames, strict=True):
        # With one segment its number stands once, for all frames.
        holder = group if "SegmentIdentificationSequence" in group else shared
        if holder.SegmentIdentificationSequence[0].ReferencedSegmentNumber != number:
            continue
        corner = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        turned = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
        row_mm, column_mm = (float(v) for v in shared.PixelMeasuresSequence[0].PixelSpacing)
        rows, columns = np.nonzero(frame)
        places.append(
            corner + np.outer(columns * column_mm, turned[:3]) + np.outer(rows * row_mm, turned[3:])
        )
    return np.concatenate(places) if places else np.zeros((0, 3))


def nifti_places(path: Path) -> NDArray[np.float64]:
    """(n, 3) mm right, front, head of every marked voxel."""
    image: Any = nibabel.load(path)
    indices = np.argwhere(np.asarray(image.dataobj).reshape((*image.shape, 1)[:3]) > 0)
    places: NDArray[np.float64] = nibabel.affines.apply_affine(image.affine, indices)
    return places
