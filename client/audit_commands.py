"""``wardround privacy audit``: the one of the officer's verbs that opens patients' images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.console import print_json

if TYPE_CHECKING:
    from client.audit import Audit

FOLDER = click.Path(path_type=Path)


@click.command("audit")
@click.argument("site_folder", type=FOLDER)
@click.option(
    "--run", type=FOLDER, help="The run's folder, with the teacher; by default two above the site's."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def audit(site_folder: Path, run: Path | None, as_json: bool) -> None:
    """Audit the site in SITE_FOLDER after a run: rehearse the noise, and try to tell who was trained on.

    Findings are written to SITE_FOLDER/audits and booked in the ledger; nothing leaves the site. Exits with
    22 if a finding contradicts what is claimed. Bounds on epsilon want a run with holdout: coin.

    \b
    Example:
      wardround privacy audit runs/private/sites/harbour
    """
    from client.audit import audit_site, keep
    from client.site import Site
    from common.errors import VerificationFailed

    site = Site.open(site_folder)
    found = audit_site(site, run)
    booked = keep(site, found)
    if as_json:
        print_json(_document(found, booked))
    else:
        for line in _lines(found, booked, site_folder):
            click.echo(line)
    if found.contradictions:
        raise VerificationFailed("the audit contradicts what is claimed", found.contradictions)


def _document(found: Audit, booked: bool) -> dict[str, Any]:
    return {
        "schema": 1,
        "run": found.plan.run_id,
        "rehearsal": None if found.rehearsal is None else found.rehearsal.to_json(),
        "artefacts": [one.to_json() for one in found.artefacts],
        "missing": found.missing,
        "contradictions": found.contradictions,
        "booked": booked,
    }


def _lines(found: Audit, booked: bool, folder: Path) -> list[str]:
    lines = ["REHEARSAL  none: the run has no noise"] if found.rehearsal is None else found.rehearsal.lines()
    for one in found.artefacts:
        lines += ["", *one.lines()]
    lines += ["", *(f"not audited: {what}" for what in found.missing)]
    where = "and booked in the ledger" if booked else "and booked nowhere: this site has no ledger"
    return [*lines, f"written to {folder / 'audits'}, {where}"]
