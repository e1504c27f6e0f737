"""``data prepare`` and ``data sets``: public image sets on the command line."""

from __future__ import annotations

import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from common.console import print_json
from common.errors import DataError, UsageError

if TYPE_CHECKING:
    from client.preparation.known_set import KnownSet
    from client.preparation.preparing import Preparation

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
WIDTH = 100


@click.command()
@click.argument("name")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--accept-licence", is_flag=True, help="You have read the set's terms and accept them.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True,
    help="Deals patients into train, val and test where the set has no splits of its own.",
)  # fmt: skip
@AS_JSON
def prepare(name: str, source: Path, dest: Path, accept_licence: bool, seed: int, as_json: bool) -> None:
    """Make a manifest with PNG images and masks in DEST of the public set NAME, unpacked in SOURCE.

    SOURCE has the folders in which the set's authors hand it out: `wardround data sets` shows them and
    the names. Nothing is downloaded. Exits with 11, every fault listed, if SOURCE is not the whole set as
    it is handed out; DEST is then not made.

    \b
    Example:
      wardround data prepare drive downloads/DRIVE data/drive --accept-licence
    """
    from client.preparation.catalogue import known_set
    from client.preparation.preparing import prepare as prepare_set

    known = known_set(name)
    _agree(known, accept_licence, ask=not as_json)
    try:
        made = prepare_set(known, source, dest, seed)
    except DataError as error:
        if as_json:
            print_json({"ok": False, "set": name, "faults": list(error.faults) or [error.message]})
        raise
    if as_json:
        print_json({"ok": True, **made.to_json()})
    else:
        _print(made)


def _agree(known: KnownSet, accepted: bool, ask: bool) -> None:
    """Show the terms on standard error. Raises ``UsageError`` unless they are accepted."""
    for line in _terms_of(known):
        click.echo(line, err=True)
    if accepted:
        return
    if (
        ask
        and sys.stdin.isatty()
        and click.confirm("Have you read the terms there, and accept them?", err=True)
    ):
        return
    raise UsageError(f"{known.name} has terms: read them at {known.terms.url}, then add --accept-licence")


def _terms_of(known: KnownSet) -> list[str]:
    terms = known.terms
    commercial = {True: "allowed", False: "not allowed", None: "not told"}[terms.commercial]
    lines = [
        known.title,
        f"terms       {terms.licence}: {terms.conditions} (Our words, from {terms.known_from}.)",
        f"commercial  {commercial}",
        *([f"weights     {terms.weights}"] if terms.weights else []),
        f"cite        {terms.citation}",
        f"read        {terms.url}",
    ]
    return [part for line in lines for part in textwrap.wrap(line, WIDTH, subsequent_indent=" " * 12)]


def _print(made: Preparation) -> None:
    known = made.known
    dealt = "the set's own" if made.seed is None else f"dealt with seed {made.seed}"
    splits = ", ".join(f"{count} {name}" for name, count in made.splits.items())
    click.echo(f"{known.name}: {made.images} images ({made.labelled} labelled) of {made.patients} patients")
    click.echo(f"splits      {splits} patients, {dealt}")
    click.echo(f"patient     {known.unit}")
    for item in known.classes:
        also = f" (and {', '.join(map(str, item.also))}, its parts)" if item.also else ""
        click.echo(f"class       {item.name} = {item.label}{also}")
    for note in made.notes:
        click.echo(f"note        {note}")
    values = dict.fromkeys(value for item in known.classes for value in item.values)
    labels = " ".join(f"--label {value}" for value in values)
    click.echo(f"next        wardround data check {made.manifest} {labels}")


@click.command()
@click.argument("name", required=False)
@AS_JSON
def sets(name: str | None, as_json: bool) -> None:
    """List the public sets that `wardround data prepare` knows, or show the folders and terms of NAME.

    \b
    Examples:
      wardround data sets
      wardround data sets chaos-mr
    """
    from client.preparation.catalogue import CATALOGUE, known_set

    chosen = [known_set(name)] if name else list(CATALOGUE.values())
    if as_json:
        print_json([_to_json(known) for known in chosen])
        return
    for known in chosen:
        if name is None:
            click.echo(f"{known.name:<10} {known.terms.licence:<18} {known.title}")
            continue
        for line in _terms_of(known):
            click.echo(line)
        click.echo(f"patient     {known.unit}")
        for line in known.layout:
            click.echo(f"folders     {line}")


def _to_json(known: KnownSet) -> dict[str, object]:
    return {
        "name": known.name,
        "title": known.title,
        "layout": list(known.layout),
        "unit": known.unit,
        "patients_known": known.patients_known,
        "classes": [asdict(item) for item in known.classes],
        "terms": asdict(known.terms),
    }
