"""The verbs that belong to neither side: ``teacher`` and ``doctor``."""

from __future__ import annotations

import json
from typing import Any

import click

from common.errors import ConfigError


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


@click.group()
def teacher() -> None:
    """Teachers: the large models that sites adapt together.

    \b
    Example:
      wardround teacher list
    """


@teacher.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def list_command(as_json: bool) -> None:
    """List the teachers that ship with Wardround.

    \b
    Example:
      wardround teacher list --json
    """
    from common.teacher import list_teachers

    cards = list_teachers()
    if as_json:
        print_json(cards)
        return
    for card in cards:
        click.echo(f"{card['name']:<20} {card['params']:>10,} parameters   {card.get('licence', '')}")


@teacher.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def info(name: str, as_json: bool) -> None:
    """Show the model card of teacher NAME: size, digest, what it was trained on.

    \b
    Example:
      wardround teacher info ward-sam-tiny
    """
    from common.teacher import teacher_info

    card = teacher_info(name)
    if as_json:
        print_json(card)
        return
    for key, value in card.items():
        click.echo(f"{key:<16} {value if isinstance(value, str) else json.dumps(value)}")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def doctor(as_json: bool) -> None:
    """Check this machine: versions, devices, memory, disk, ports and files.

    Says the cause and the fix of whatever is wrong. Exits with 10 if something that a run needs is wrong.

    \b
    Example:
      wardround doctor --json
    """
    from common.doctor import examine

    findings = examine()
    broken = [finding for finding in findings if finding.level == "error"]
    if as_json:
        print_json({"healthy": not broken, "findings": [finding.to_json() for finding in findings]})
    else:
        for finding in findings:
            click.echo(f"{finding.level:<8} {finding.subject:<22} {finding.found}")
            if finding.level != "ok":
                click.echo(f"{'':<8} {'':<22} cause: {finding.cause}\n{'':<8} {'':<22} fix: {finding.fix}")
    if broken:
        faults = [f"{finding.subject}: {finding.cause}; {finding.fix}" for finding in broken]
        raise ConfigError("this machine cannot run Wardround as it is", faults)
