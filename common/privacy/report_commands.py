"""The verbs ``wardround privacy statement`` and ``wardround privacy page``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from common.console import print_json
from common.privacy.ledger_commands import AS_JSON, FILE

if TYPE_CHECKING:
    from common.privacy.report.record import Inquiry

_Command = TypeVar("_Command", bound=Callable[..., Any])
STATED = ("site", "run", "verdict", "guarantee", "gaps", "statement", "not_covered", "disclaimer")


def _record_options(command: _Command) -> _Command:
    """The options that say what of a site's record is asked about."""
    for option in reversed(
        (
            click.option("--run", help="The run's id; by default the newest."),
            click.option("--officer-key", type=FILE, help="The officer's public key."),
            click.option("--ledger-head", multiple=True, help="A head hash that somebody else has seen."),
            click.option("--witness", "witnesses", type=FILE, multiple=True, help="Heads that others kept."),
        )
    ):
        command = option(command)
    return command


@click.command("statement")
@click.argument("folder", type=FILE, metavar="SITE_FOLDER")
@_record_options
@AS_JSON
@click.option("--registry", is_flag=True, help="Print an entry for the DP Deployments Registry as JSON.")
def statement_command(folder: Path, as_json: bool, registry: bool, **options: Any) -> None:
    """State in five sentences what a run at a site promises its patients, and what it does not.

    Exits with 22 if the site's record does not hold.

    \b
    Example:
      wardround privacy statement runs/demo-0/sites/harbour
    """
    from common.errors import UsageError, VerificationFailed
    from common.privacy.report.facts import document_of
    from common.privacy.report.record import read_record

    if as_json and registry:
        raise UsageError("give one of --json and --registry")
    document = document_of(read_record(folder, _inquiry(options)))
    if registry:
        print_json(document["registry"])
    elif as_json:
        budget, odds = document["budget"]["epsilons"], document["meaning"]["odds"]
        print_json({**{key: document[key] for key in STATED}, "epsilons": budget, "odds": odds})
    else:
        click.echo(
            f"VERDICT: {document['verdict']['word']}. {document['site']}, run {document['run']['id']}."
        )
        for sentence in document["statement"]:
            click.echo(f"\n{sentence['title']}. {sentence['text']}")
        click.echo(f"\n{document['disclaimer']}")
    if document["verification"]["faults"]:
        raise VerificationFailed("the record does not hold", document["verification"]["faults"])


@click.command("page")
@click.argument("folder", type=FILE, metavar="SITE_FOLDER")
@_record_options
@click.option("--check", is_flag=True, help="Only check that the page is what privacy.json gives.")
@AS_JSON
def page_command(folder: Path, check: bool, as_json: bool, **options: Any) -> None:
    """Write privacy.json and privacy.html into SITE_FOLDER: one run at one site, for its officer.

    With --check nothing is written; exits with 22 if the page is not, byte for byte, made of privacy.json.

    \b
    Examples:
      wardround privacy page site --officer-key officer.key.pub
      wardround privacy page site --check
    """
    from common.privacy.report import PRIVACY_HTML, PRIVACY_JSON, check_page, write_page

    if check:
        check_page(folder)
        text = f"{folder / PRIVACY_HTML} is what {PRIVACY_JSON} gives"
    else:
        text = f"page: {write_page(folder, _inquiry(options))}"
    if as_json:
        print_json({"page": str(folder / PRIVACY_HTML), "json": str(folder / PRIVACY_JSON), "checked": check})
    else:
        click.echo(text)


def _inquiry(options: dict[str, Any]) -> Inquiry:
    from common.privacy.keys import read_public_key
    from common.privacy.report.record import Inquiry
    from common.privacy.witness import read_heads

    key = options["officer_key"]
    officer = None if key is None else read_public_key(key)
    witnesses = tuple(head for path in options["witnesses"] for head in read_heads(path))
    return Inquiry(options["run"], officer, tuple(options["ledger_head"]), witnesses)
