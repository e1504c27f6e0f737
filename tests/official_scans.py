"""A small copy of CHAOS: DICOM series whose files lie shuffled, with masks as PNG."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

from tests.official_pixels import SHAPE, Spoiled, miscode, rename, save, scene

SLICES = 3
SPACING_MM = (0.75, 0.5)  # between rows, between columns
SLICE_MM = 3.0
ORDER = (1, 2, 0)  # file number -> place in the patient
MR_CODES = (63, 126, 189, 252)
HU_INTERCEPT = -1024


def write_dicom(path: Path, stored: NDArray[Any], place: int, modality: str = "CT", **tags: object) -> None:
    """One slice at ``place`` of a series whose normal is not an axis' own; ``tags`` replace header values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage if modality == "CT" else MRImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(path)])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = (
        meta.MediaStorageSOPClassUID,
        meta.MediaStorageSOPInstanceUID,
    )
    dataset.Modality, dataset.PatientID = modality, "anonymous"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.PixelSpacing = list(SPACING_MM)
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.ImagePositionPatient = [-100.0, -80.0, -50.0 + SLICE_MM * place]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    if modality == "CT":
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, HU_INTERCEPT
    dataset.PixelData = stored.astype(np.uint16).tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)


def write_chaos_ct(root: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for case in (1, 2, 5, 6, 8, 10, 14, 16):
        folder = root / "Train_Sets/CT" / str(case)
        for number, place in enumerate(ORDER):
            pixels, (liver,) = scene(rng)
            name = f"i{number:04d},0000b.dcm" if case < 10 else f"IMG-0002-{number + 1:05d}.dcm"
            stored = pixels[..., 0].astype(np.int32) - HU_INTERCEPT  # 20 to 209 HU
            stored[0, 0] = 40 * place - HU_INTERCEPT  # a mark of where it lies
            write_dicom(folder / "DICOM_anon" / name, stored, place)
            save(liver, folder / "Ground" / f"liver_GT_{number:03d}.png")


def spoil_chaos_ct(root: Path) -> Spoiled:
    folder = root / "Train_Sets/CT"
    shutil.rmtree(folder / "1/Ground")
    return Spoiled(
        "CT/1/Ground is missing",
        rename(folder / "2/DICOM_anon/i0001,0000b.dcm", "slice-1.dcm"),
        miscode(folder / "5/Ground/liver_GT_001.png"),
    )


def write_chaos_mr(root: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for case in (1, 2, 3, 5, 8, 10, 13, 15):
        folder = root / "Train_Sets/MR" / str(case)
        for number, place in enumerate(ORDER):
            for sequence, phases in (("T1DUAL", ("InPhase", "OutPhase")), ("T2SPIR", (".",))):
                pixels, organs = scene(rng, len(MR_CODES))
                labels = np.zeros(SHAPE, np.uint8)
                for code, organ in zip(MR_CODES, organs, strict=True):
                    labels[organ] = code
                # Of a dual echo the phases take turns: 2, 4, 6 in phase and 1, 3, 5 out of it.
                numbers = [2 * number + 2, 2 * number + 1] if len(phases) == 2 else [number + 1]
                for phase, shown in zip(phases, numbers, strict=True):
                    stored = pixels[..., 0].astype(np.uint16) * 4 + (shown % 2)
                    stored[0, 0] = 100 * place
                    path = folder / sequence / "DICOM_anon" / phase / f"IMG-0004-{shown:05d}.dcm"
                    write_dicom(path, stored, place, "MR")
                save(labels, folder / sequence / "Ground" / f"IMG-0004-{numbers[0]:05d}.png")


def spoil_chaos_mr(root: Path) -> Spoiled:
    folder = root / "Train_Sets/MR"
    shutil.rmtree(folder / "1/T2SPIR/Ground")
    return Spoiled(
        "MR/1/T2SPIR/Ground is missing",
        rename(folder / "2/T1DUAL/DICOM_anon/OutPhase/IMG-0004-00003.dcm", "IMG-3.dcm"),
        miscode(folder / "3/T1DUAL/Ground/IMG-0004-00004.png", 100),
    )
