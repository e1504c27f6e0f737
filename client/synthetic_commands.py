"""``wardround synthetic``: what of a hospital's synthetic images may be shown to others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.console import print_json

if TYPE_CHECKING:
    from client.curation.release import Checked

FOLDER = click.Path(path_type=Path)


@click.group("synthetic")
def synthetic() -> None:
    """A hospital's synthetic images: are there copies of patients among them, and may they leave?

    \b
    Example:
      wardround synthetic check runs/demo/sites/harbour
    """


@synthetic.command("check")
@click.argument("site_folder", type=FOLDER)
@click.option(
    "--anyway", is_flag=True, help="Look for copies even if no patient's image trained the generator."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def check(site_folder: Path, anyway: bool, as_json: bool) -> None:
    """Test the synthetic images of the last run at the site in SITE_FOLDER; nothing leaves.

    Opens patients' images: at the hospital only. Exits with 20 if the tests or the policy keep the set in.

    \b
    Example:
      wardround synthetic check runs/demo/sites/harbour
    """
    from client.curation.release import check_set
    from client.site import Site
    from common.privacy.terms import refuse

    found = check_set(Site.open(site_folder), anyway)
    if as_json:
        print_json(_document(found))
    else:
        for line in _lines(found):
            click.echo(line)
    refuse(found.refusals)


@synthetic.command("export")
@click.argument("site_folder", type=FOLDER)
@click.argument("dest", type=FOLDER)
def export(site_folder: Path, dest: Path) -> None:
    """Let the synthetic images of the site in SITE_FOLDER leave to the new folder DEST, if they may.

    Exits with 20, and names the policy field, unless the signed policy allows it and no test says no.
    What leaves is on a receipt and booked in the ledger as a release without noise.

    \b
    Example:
      wardround synthetic export site released
    """
    from client.curation.release import export_set
    from client.site import Site

    receipt = export_set(Site.open(site_folder), dest)
    click.echo(f"{dest}: {receipt.bytes} bytes, sha256 {receipt.sha256}, booked in the ledger as EXPORT")


def _document(found: Checked) -> dict[str, Any]:
    return {
        "schema": 1,
        "origin": str(found.origin),
        "images": len(found.saved.images),
        **found.findings.to_json(),
        "refusals": [{"field": name, "why": why} for name, why in found.refusals],
    }


def _lines(found: Checked) -> list[str]:
    lines = [f"{len(found.saved.images)} images of a generator that was {found.origin}"]
    lines += found.findings.lines()
    if not found.refusals:
        lines.append("the policy allows them to leave: wardround synthetic export SITE_FOLDER DEST")
    return lines
