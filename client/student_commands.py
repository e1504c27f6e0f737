"""The verbs of a hospital's student on the command line: ``student predict``, ``evaluate`` and ``export``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.console import print_json

if TYPE_CHECKING:
    from common.guard_api import Metric

FORMAT_NAMES = ("onnx", "onnx-int8", "torchscript", "monai")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
WEIGHTS = click.argument("weights", type=click.Path(path_type=Path))


@click.group()
def student() -> None:
    """Use a student: the small model that a hospital keeps.

    WEIGHTS is a student's .safetensors file or an export of it: .onnx, .ts, or the folder of a MONAI bundle.

    \b
    Example:
      wardround student predict student.safetensors images/ --out masks/
    """


@student.command()
@WEIGHTS
@click.argument("images", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the masks.")
@click.option(
    "--threshold", type=click.FloatRange(0, 1), default=0.5, show_default=True,
    help="A pixel whose probability is at least this belongs to the class.",
)  # fmt: skip
@click.option("--overlay", is_flag=True, help="Also write each image with the outline drawn on it.")
@click.option(
    "--slice-axis", type=click.Choice(["auto", "0", "1", "2"]), default="auto", show_default=True,
    help="The axis of NIfTI volumes that is cut into slices; auto: that of the thickest voxels.",
)  # fmt: skip
@click.option(
    "--to", type=click.Choice(["dicom-seg", "nifti"]), default="dicom-seg", show_default=True,
    help="What the masks of DICOM images are written as.",
)  # fmt: skip
@AS_JSON
def predict(weights: Path, images: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Segment every image in the folder IMAGES with the student in WEIGHTS; masks go to --out.

    PNG, JPEG and TIFF give masks of the same size and resolution, NIfTI gives NIfTI on the same grid, and
    DICOM files and series (in IMAGES or in folders in it) give DICOM segmentations. A file that cannot be
    read is named, the others are done, and the command exits with 11.

    \b
    Example:
      wardround student predict runs/demo/sites/harbour/student.safetensors images/ --out masks/
    """
    from client.prediction import SomeFailed, predict_folder

    try:
        written = predict_folder(weights, images, out, _options(**options))
    except SomeFailed as error:
        if as_json:
            print_json(error.summary.to_json())
        raise
    if as_json:
        print_json(written.to_json())
        return
    for cut in written.cuts:
        click.echo(f"{cut.mask.name}: {cut.slices} slices along axis {cut.axis} ({cut.shown})")
    click.echo(f"{len(written.masks)} masks in {out}")


def _options(threshold: float, overlay: bool, slice_axis: str, to: str) -> Any:
    from client.mask_files import ScanFormat
    from client.prediction import PredictionOptions

    axis = None if slice_axis == "auto" else int(slice_axis)
    return PredictionOptions(threshold, overlay, axis, ScanFormat(to))


@student.command()
@WEIGHTS
@click.argument("manifest", type=click.Path(path_type=Path))
@AS_JSON
def evaluate(weights: Path, manifest: Path, as_json: bool) -> None:
    """Measure the student in WEIGHTS on the labelled images of MANIFEST (its test split, if it has splits).

    \b
    Example:
      wardround student evaluate student.safetensors data/manifest.csv --json
    """
    from client.prediction import evaluate_manifest

    metrics = evaluate_manifest(weights, manifest)
    if as_json:
        print_json([asdict(metric) for metric in metrics])
    else:
        _print_metrics(metrics)


def _print_metrics(metrics: list[Metric]) -> None:
    click.echo(f"{'class':<16} {'metric':<6} {'mean':>8}   95 % interval   patients")
    for metric in metrics:
        mean = "-" if metric.value is None else f"{metric.value:.3f}"
        interval = "-" if metric.ci95 is None else f"{metric.ci95[0]:.3f} to {metric.ci95[1]:.3f}"
        click.echo(
            f"{metric.class_name:<16} {metric.metric:<6} {mean:>8}   {interval:<16}{metric.patients:>8}"
        )


@student.command()
@WEIGHTS
@click.option("--format", "kind", type=click.Choice(FORMAT_NAMES), required=True, help="What to write.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True,
    help="The file to write (.onnx, .ts), or the folder of a MONAI bundle. The model card goes beside it.",
)  # fmt: skip
@click.option(
    "--calibrate", type=click.Path(path_type=Path),
    help="For onnx-int8: a manifest or folder of this hospital's own images.",
)  # fmt: skip
@click.option(
    "--evaluate", "labelled", type=click.Path(path_type=Path),
    help="A labelled manifest to measure the student on for its model card.",
)  # fmt: skip
@AS_JSON
def export(
    weights: Path, kind: str, out: Path, calibrate: Path | None, labelled: Path | None, as_json: bool
) -> None:
    """Export the student in WEIGHTS for other programs, with a model card beside it.

    The export is run against the student first, and refused where a logit differs by more than 1e-4; what
    int8 changes is measured and printed. A student saw its hospital's labelled images: handing an export on
    is a release without differential privacy, which the model card says too.

    \b
    Example:
      wardround student export student.safetensors --format onnx --out exports/student.onnx
    """
    from client.export import ExportRequest, export_student
    from client.prediction import measured_for_card

    measured = None if labelled is None else measured_for_card(weights, labelled)
    card = export_student(weights, ExportRequest(kind, out, calibrate, measured))
    folder = out if out.is_dir() else out.parent
    made = [entry for entry in card["exports"] if folder / entry["file"] == out or out == folder]
    if as_json:
        print_json(
            {"exports": made, "model_card": str(folder / "model-card.json"), "privacy": card["privacy"]}
        )
        return
    for entry in made:
        click.echo(f"{folder / entry['file']}: {entry['bytes']:,} bytes, sha256 {entry['sha256']}")
    for key, value in made[0]["about"].items():
        click.echo(
            f"  {key.replace('_', ' ')}: {value:.3g}"
            if isinstance(value, float)
            else f"  {key.replace('_', ' ')}: {value}"
        )
    click.echo(f"{folder / 'model-card.md'}: {card['privacy']['verdict']} for whoever gets these files")
