"""A hospital's images on the command line: ``data``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.console import print_json
from common.errors import DataError

if TYPE_CHECKING:
    from common.recipe import ClassConfig

LABELS = click.option(
    "--label", "labels", type=click.IntRange(1, 255), multiple=True, default=(255,), show_default=True,
    help="A class's pixel value in the masks; give it once a class.",
)  # fmt: skip
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
MANIFEST = click.argument("manifest", type=click.Path(path_type=Path))


def _classes(labels: tuple[int, ...]) -> list[ClassConfig]:
    from common.recipe import ClassConfig

    return [ClassConfig(name=f"label-{label}", label=label) for label in dict.fromkeys(labels)]


def _print_table(value: dict[str, Any]) -> None:
    for key, entry in value.items():
        click.echo(f"{key:<18} {entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False)}")


@click.group()
def data() -> None:
    """A hospital's images: check and describe a manifest.

    \b
    Example:
      wardround data check data/manifest.csv
    """


@data.command()
@MANIFEST
@LABELS
@click.option(
    "--min-patients", type=click.IntRange(1), default=2, show_default=True,
    help="Fewer labelled training patients than this is a fault.",
)  # fmt: skip
@AS_JSON
def check(manifest: Path, labels: tuple[int, ...], min_patients: int, as_json: bool) -> None:
    """Check MANIFEST (CSV) and every image and mask it names; all faults are listed at once.

    Exits with 11 if there is a fault that forbids training. Warnings do not.

    \b
    Example:
      wardround data check data/manifest.csv --label 1 --label 2 --min-patients 10
    """
    from client.manifest import check_manifest

    found = check_manifest(manifest, _classes(labels), min_patients)
    if as_json:
        print_json(found.to_json())
    else:
        click.echo(f"{found.manifest}: {found.images} images of {found.patients} patients")
        for fault in found.faults:
            if fault.warning:
                click.echo(f"  warning: {fault}")
    if found.errors:
        raise DataError(f"{manifest} cannot be used as it is", [str(fault) for fault in found.errors])
    if not as_json:
        click.echo("in order")


@data.command()
@MANIFEST
@LABELS
@AS_JSON
def describe(manifest: Path, labels: tuple[int, ...], as_json: bool) -> None:
    """Summarise MANIFEST: counts, sizes, spacings, intensities and foreground shares.

    \b
    Example:
      wardround data describe data/manifest.csv --json
    """
    from client.manifest import describe_manifest

    summary = describe_manifest(manifest, _classes(labels))
    if as_json:
        print_json(summary)
    else:
        _print_table(summary)
