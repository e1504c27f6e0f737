"""One student, one format, one file that was checked before it got its name."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from client.export.bundle import export_bundle
from client.export.int8 import export_int8
from client.export.model_card import Document, earlier, entry_of, write_card
from client.export.onnx_file import export_onnx
from client.export.torchscript import export_torchscript
from client.students import LoadedStudent, load_student
from common.durable import disk_fault
from common.errors import UsageError


@dataclass(frozen=True)
class ExportRequest:
    """``calibrate``: a manifest or a folder of images, for int8; ``measured``: see `write_card`."""

    format: str
    out: Path
    calibrate: Path | None = None
    measured: Document | None = None


@dataclass(frozen=True)
class Format:
    """``suffix`` of its file, empty for a folder; ``make`` writes it and says what was measured."""

    suffix: str
    make: Callable[[LoadedStudent, Path, Path | None], Any]
    calibrated: bool = False


def _int8(student: LoadedStudent, path: Path, calibrate: Path | None) -> Any:
    assert calibrate is not None
    return export_int8(student, path, calibrate)


FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", lambda student, path, _: export_onnx(student, path)),
    "onnx-int8": Format(".onnx", _int8, calibrated=True),
    "torchscript": Format(".ts", lambda student, path, _: export_torchscript(student, path)),
    "monai": Format("", lambda student, path, _: export_bundle(student, path)),
}


def export_student(weights: Path, request: ExportRequest) -> Document:
    """Write ``request.out`` and the model card beside it; return the card.

    Guarantees: a file of that name is one whose logits were compared with the student's; if anything fails,
    what was there before stays as it was.

    Raises:
        UsageError: the name does not fit the format, images for the calibration are missing, or the folder
            is taken by something else.
        ArtefactError: ``weights`` is no student, or the export is not what was trained.
        DataError: images for the calibration cannot be used.
    """
    kind = FORMATS[request.format]
    _check_request(request, kind)
    student = load_student(weights)
    folder = request.out.parent if kind.suffix else request.out
    earlier(folder, student.card)
    try:
        request.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=request.out.parent, prefix=".export-") as temporary:
            made = Path(temporary) / (request.out.name if kind.suffix else "bundle")
            about = asdict(kind.make(student, made, request.calibrate))
            _put(made, request.out)
    except OSError as error:
        raise disk_fault(request.out.parent, error, 0) from error
    files = [request.out] if kind.suffix else sorted((request.out / "models").iterdir())
    entries = [entry_of(file, folder, request.format, about) for file in files]
    return write_card(folder, weights, student, entries, request.measured)


def _check_request(request: ExportRequest, kind: Format) -> None:
    faults = []
    if kind.suffix and request.out.suffix != kind.suffix:
        faults.append(f"--out must end in {kind.suffix} for {request.format}: {request.out.name} does not")
    if kind.suffix and request.out.is_dir():
        faults.append(f"{request.out} is a folder: give the file a name in it")
    if not kind.suffix and request.out.is_file():
        faults.append(f"{request.out} is a file, and {request.format} makes a folder: give another name")
    if not kind.suffix and _holds_other_files(request.out):
        faults.append(f"{request.out} holds other files: give a new folder for the bundle")
    if kind.calibrated and request.calibrate is None:
        faults.append("int8 needs --calibrate: a manifest or a folder of this hospital's own images")
    if not kind.calibrated and request.calibrate is not None:
        faults.append(f"--calibrate has no use for {request.format}: leave it out")
    if faults:
        raise UsageError(f"the student cannot be exported as {request.format}", faults)


def _holds_other_files(folder: Path) -> bool:
    """An earlier bundle is replaced; nothing else is."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    return not (folder / "configs" / "metadata.json").is_file()


def _put(made: Path, out: Path) -> None:
    if made.is_file():
        made.replace(out)
        return
    shutil.rmtree(out, ignore_errors=True)  # an earlier bundle, or an empty folder
    made.replace(out)
