"""The verbs that belong to neither side: ``teacher`` and ``doctor``."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click

from common.console import print_json
from common.errors import ConfigError

SHOWN_TARGETS = 4  # of an adapter preset, in a line of `teacher info`; --json has them all


@click.group()
def teacher() -> None:
    """Teachers: the large models that sites adapt together.

    \b
    Example:
      wardround teacher list
    """


@teacher.command("list")
@click.option("--known", is_flag=True, help="List the official checkpoints that can be imported instead.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def list_command(known: bool, as_json: bool) -> None:
    """List the teachers: those that ship with Wardround, then those that were imported.

    Imported teachers are looked for in the folders of WARDROUND_TEACHERS and in ~/.wardround/teachers.

    \b
    Example:
      wardround teacher list --json
    """
    from common.checkpoints import found_models

    if known:
        _list_known(as_json)
        return
    found = found_models()
    for entry in found:
        if entry.hidden_by is not None:
            name = entry.card["name"]
            click.echo(
                f"warning: {name} in {entry.folder} is not used: {entry.hidden_by} has one too", err=True
            )
    cards = [entry.card for entry in found if entry.hidden_by is None]
    if as_json:
        print_json(cards)
        return
    for card in cards:
        click.echo(f"{card['name']:<24} {card['params']:>12,} parameters   {card.get('licence', '')}")


def _list_known(as_json: bool) -> None:
    from common.foundation.catalogue import CATALOGUE

    entries = [
        {"name": entry.name, "hub_id": entry.hub_id, "licence": entry.licence} for entry in CATALOGUE.values()
    ]
    if as_json:
        print_json(entries)
        return
    for entry in entries:
        click.echo(f"{entry['name']:<24} {entry['hub_id']:<42} {entry['licence']}")


@teacher.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def info(name: str, as_json: bool) -> None:
    """Show the model card of teacher NAME: size, digest, what it was trained on, its adapter presets.

    \b
    Example:
      wardround teacher info ward-sam-tiny
    """
    from common.teacher import teacher_info

    card = teacher_info(name)
    if as_json:
        print_json(card)
        return
    presets = card.pop("presets")
    for key, value in card.items():
        click.echo(f"{key:<16} {value if isinstance(value, str) else json.dumps(value)}")
    click.echo("adapter presets  rank   elements  targets in the encoder")
    for preset, about in presets.items():
        targets = " ".join(about["targets"][:SHOWN_TARGETS])
        more = f" and {len(about['targets']) - SHOWN_TARGETS} more" * (len(about["targets"]) > SHOWN_TARGETS)
        click.echo(f"  {preset:<14} {about['rank']:>4} {about['elements']:>10,}  {targets}{more}")
    for preset, about in presets.items():
        if pinned := about.get("a_matrix_sha256"):
            click.echo(f"public A of {preset} at rank {about['rank']}: {pinned[str(about['rank'])]}")


@teacher.command("import")
@click.argument("source")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--model", help="Which model SOURCE is, where its keys cannot tell (see teacher list --known).")
@click.option("--as", "name", help="The teacher's name; by default the model's.")
@click.option("--download", is_flag=True, help="Fetch SOURCE from the Hugging Face hub.")
@click.option("--accept-licence", is_flag=True, help="You accept the terms of a model with its own licence.")
@click.option("--replace", is_flag=True, help="Replace a teacher of this name in DEST.")
@click.option("--json", "as_json", is_flag=True, help="Print the card as one JSON document.")
def import_command(source: str, dest: Path, as_json: bool, **options: Any) -> None:
    """Make a teacher in folder DEST from an official checkpoint: SAM, MedSAM, SAM 2.1, DINOv2 or DINOv3.

    SOURCE is a folder (config.json and model.safetensors, shards or pytorch_model.bin), a .pth or
    .safetensors file, a hub id, or a name of `wardround teacher list --known`. A hub id is looked up in
    this machine's cache; nothing is downloaded without --download. A checkpoint whose keys or shapes are
    not exactly those of a known layout is refused, and every one of them named.

    \b
    Example:
      wardround teacher import medsam_vit_b.pth teachers --model medsam-vit-b
    """
    from common.foundation.importing import ImportOptions, import_teacher

    card = import_teacher(source, dest, ImportOptions(**options))
    if as_json:
        print_json(card)
        return
    keys = card["keys"]
    click.echo(
        f"{card['name']}: {card['params']:,} parameters from {card['source']} ({card['source_layout']}; "
        f"{keys['mapped']} keys taken, {keys['left_out']} left out)\n"
        f"Its decoder is untrained. Use it with:\n"
        f"  export WARDROUND_TEACHERS={shlex.quote(str(dest.resolve()))}\n"
        f"  wardround simulate RECIPE teacher.name={card['name']}"
    )


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
