"""DICOM segmentation objects (PS3.3 A.51): a binary segment a class, each frame tied to its slice."""

from __future__ import annotations

import hashlib
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.dicom import DicomStack
from client.students import StudentCard
from common.errors import DataError

MANUFACTURER = "Wardround"
CODING_SCHEME = "99WARDROUND"  # private: a class's name is the hospital's own word, no code of a terminology
SERIES_NUMBER = 900


def write_segmentation(path: Path, stack: DicomStack, labels: NDArray[np.uint8], card: StudentCard) -> None:
    """Write (column, row, slice) ``labels`` as segments; where a class includes others, so does its segment.

    The object's identifiers follow from those of the images, the student and the labels: the same run gives
    the same file but for its dates.

    Raises:
        DataError: if the images lack what a segmentation has to quote.
    """
    import highdicom
    from pydicom import dcmread
    from pydicom.uid import generate_uid

    sources = [dcmread(file, stop_before_pixels=True) for file in _files(stack)]
    pixels = _segments(stack, labels, card)
    seed = [
        str(sources[0].get("SeriesInstanceUID", "")),
        str(sources[0].get("SOPInstanceUID", "")),
        card.sha256,
    ]
    try:
        with warnings.catch_warnings():
            # Of an empty mask, which is a finding, and of names that are not in the standard's form.
            warnings.simplefilter("ignore")
            made = highdicom.seg.Segmentation(
                source_images=sources,
                pixel_array=pixels,
                segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=_descriptions(card),
                series_instance_uid=generate_uid(entropy_srcs=[*seed, "series"]),
                series_number=SERIES_NUMBER,
                sop_instance_uid=generate_uid(
                    entropy_srcs=[*seed, hashlib.sha256(labels.tobytes()).hexdigest()]
                ),
                instance_number=1,
                manufacturer=MANUFACTURER,
                manufacturer_model_name=card.name,
                software_versions=version("wardround"),
                device_serial_number=card.sha256[:16],
                content_label="WARDROUND",
                series_description=f"Segmentation by {card.name}",
            )
            made.save_as(path)
    except (AttributeError, KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{stack.files[0]}: no DICOM segmentation can be made of it ({error}): use --to nifti."
        ) from error


def _files(stack: DicomStack) -> list[Path]:
    """In the order of the slices; a multi-frame file once."""
    return list(dict.fromkeys(frame.path for frame in stack.frames))


def _segments(stack: DicomStack, labels: NDArray[np.uint8], card: StudentCard) -> NDArray[np.uint8]:
    """(frames, rows, columns, segments) 0 or 1, in the order in which the files hold the frames."""
    planes = np.ascontiguousarray(labels.transpose(2, 1, 0))
    if len(_files(stack)) == 1 and stack.count > 1:
        planes = planes[np.argsort([frame.number for frame in stack.frames])]
    return np.stack([np.isin(planes, item.values) for item in card.classes], axis=-1).astype(np.uint8)


def _descriptions(card: StudentCard) -> list[Any]:
    import highdicom
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=f"{MANUFACTURER} {card.name}", family=codes.DCM.ArtificialIntelligence, version=card.sha256[:16]
    )
    return [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=item.name,
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=Code(item.name[:16], CODING_SCHEME, item.name),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
            tracking_uid=None,
        )
        for number, item in enumerate(card.classes, start=1)
    ]
